"""TensorRT: what can be checked of a graph without a GPU, the build itself, and its script for a bare GPU container."""
