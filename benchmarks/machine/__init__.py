"""What the machine is, and what it could do at best: facts, bare matrix products, memory bandwidth."""
