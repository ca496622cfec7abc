"""NVIDIA GPUs: the CUDA compiler, and kernels written in CUDA C++ for tensor cores."""
