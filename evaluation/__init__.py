"""What an encoder's vectors are worth. Needs no torch: every measure takes an encode function or its vectors."""
