"""What computes: C++ operators of torch on the CPU, Triton kernels on a GPU, the same functions in each."""
