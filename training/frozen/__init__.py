"""What is never trained: base, encoders, sampling, and the metrics that judge by an encoder."""
