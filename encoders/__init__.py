"""The PyTorch encoder: found, read, run packed or padded, and written. Used by training, export and evaluation."""
