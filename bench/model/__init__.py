"""The whole model against itself on padded rows: speed, latency and memory of training and inference."""
