"""Models as releases: export to ONNX, compress, sign and verify."""
