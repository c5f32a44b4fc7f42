"""One ONNX file: written, checked by each reader's rules, and run."""
