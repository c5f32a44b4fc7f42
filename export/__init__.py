"""From an nn.Module to a bundle: fold, strip, ONNX, conformance."""
