"""`pytest bench/bench_apply_rotary.py`: rotary embedding of packed tokens, and its peers, under pytest-benchmark."""

from interformer_bench.suite import suite

test_apply_rotary = suite("apply_rotary")
