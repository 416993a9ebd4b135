"""The PyTorch encoder: find it, load it, run it packed or padded, and write it. Used by training and export."""
