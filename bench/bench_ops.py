"""`pytest bench/bench_ops.py -k pma_pooling`: an op and its peers under pytest-benchmark."""

from interformer_bench.ops.table import TABLE
from interformer_bench.suite import suite

globals().update({f"test_{op}": suite(op) for op in TABLE})
