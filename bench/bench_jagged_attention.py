"""`pytest bench/bench_jagged_attention.py`: attention inside rows, and its peers, under pytest-benchmark."""

from interformer_bench.suite import suite

test_jagged_attention = suite("jagged_attention")
