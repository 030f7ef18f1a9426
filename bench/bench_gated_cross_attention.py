"""`pytest bench/bench_gated_cross_attention.py`: dense queries over packed keys, under pytest-benchmark."""

from interformer_bench.suite import suite

test_gated_cross_attention = suite("gated_cross_attention")
