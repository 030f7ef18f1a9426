"""The commands behind `python -m interformer`, a file each."""
