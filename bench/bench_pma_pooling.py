"""`pytest bench/bench_pma_pooling.py`: pooling by seeds, and its peers, under pytest-benchmark."""

from interformer_bench.suite import suite

test_pma_pooling = suite("pma_pooling")
