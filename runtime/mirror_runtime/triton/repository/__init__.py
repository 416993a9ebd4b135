"""The model repository that Triton reads, rendered from a bundle's manifest."""
