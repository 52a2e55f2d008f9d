"""Train with quantized weights, around the steps of a Trainer."""
