"""`pytest bench/bench_personalized_ffn.py`: a linear layer per row, and its peers, under pytest-benchmark."""

from interformer_bench.suite import suite

test_personalized_ffn = suite("personalized_ffn")
