"""What the backends' launchers share: calls as kernels take them, and tensors made fit to be read. Knows no backend."""
