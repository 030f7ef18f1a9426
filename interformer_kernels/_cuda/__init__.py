"""Adapters of the native module's CUDA part, one for each op: outputs and workspaces come from torch's allocator."""
