"""The only door to the Triton kernels and the C++/CUDA extension. One op, one name, one file."""
