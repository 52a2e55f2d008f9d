"""A checkpoint as it is at one moment, on its way from a device to host memory."""
