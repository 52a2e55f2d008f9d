"""Copy a checkpoint as it is at one moment, and bring it to host memory."""
