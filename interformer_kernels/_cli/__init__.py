"""The commands behind `interformer-kernels`, a file each; torch alone is enough for `info` and `parity`."""
