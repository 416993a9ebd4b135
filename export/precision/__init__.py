"""Graphs of other precisions: fp16, bf16, int8 and fp8, written into the ONNX file."""
