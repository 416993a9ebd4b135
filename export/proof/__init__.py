"""Prove artifacts: compare their vectors with PyTorch's, and certify the result."""
