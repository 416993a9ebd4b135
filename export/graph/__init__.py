"""The padded and the packed ONNX graph of an encoder, with the pooling head inside."""
