"""The certificate of an artifact: its vectors against PyTorch's."""
