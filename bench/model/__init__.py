"""The whole model against the same model on padded rows: speed, latency and memory of training and inference."""
