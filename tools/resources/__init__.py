"""Registers, spills and shared memory of the GPU kernels, measured without a GPU (`make resources`)."""
