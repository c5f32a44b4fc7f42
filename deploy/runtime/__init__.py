"""From encoded image to logits: decoding, pre-processing, and the runners that execute a model."""
