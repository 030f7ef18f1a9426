"""The contract of each operation: schema, checks, fake, autograd, FLOP formula, docstring, public function."""
