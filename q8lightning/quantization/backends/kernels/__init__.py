"""Triton kernels; imported when the first CUDA tensor arrives."""
