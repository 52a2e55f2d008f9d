"""What is done before the first save: say what will come, load kernels."""
