"""Corpus files to vector files."""
