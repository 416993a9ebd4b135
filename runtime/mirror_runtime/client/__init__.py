"""Vectors from a running Triton server. Needs the `client` extra alone."""
