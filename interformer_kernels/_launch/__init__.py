"""Code that the kernels' modules of several backends share. It knows no backend."""
