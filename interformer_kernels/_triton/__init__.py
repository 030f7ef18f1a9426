"""Kernels in Triton, for NVIDIA and AMD GPUs from one source; under `TRITON_INTERPRET=1` they serve CPU tensors."""
