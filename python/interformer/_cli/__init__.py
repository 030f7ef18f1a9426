"""The commands of `python -m interformer`, one file each."""
