"""Kernels for CUDA GPUs, in Triton: imported only where a tensor is on one."""
