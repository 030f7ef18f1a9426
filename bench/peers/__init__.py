"""The other ways to compute an op, as users write them today, padding and unpadding included.

Which there are for an op, its module in `interformer_bench.ops` says; a peer takes the op's keyword arguments and
returns its output. None is timed before `interformer_bench.checks` has found its answers right.
"""

from interformer_bench.peers.peer import OURS, Peer

__all__ = ["OURS", "Peer"]
