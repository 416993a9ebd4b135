"""Encode corpus files into vector files."""
