"""What lies where in a checkpoint: sections, states under a user's own keys, and what optimizers remember."""
