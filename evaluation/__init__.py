"""Evaluation of encoders without torch: every measure takes an `encode` function or its vectors."""
