"""What saves and quantized weights lost, on the loggers and in the Trainer's metrics."""
