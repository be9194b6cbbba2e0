"""The CPU's own kernels, in C++, compiled on the machine that runs them."""
