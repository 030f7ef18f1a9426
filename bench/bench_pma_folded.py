"""`pytest bench/bench_pma_folded.py`: pooling of tokens that others would project, under pytest-benchmark."""

from interformer_bench.suite import suite

test_pma_folded = suite("pma_folded")
