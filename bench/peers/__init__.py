"""The other ways to compute an op, as users write them today, padding and unpadding included.

Which there are for an op, `candidates` says; a peer takes the op's keyword arguments and returns its output. None is
timed before `interformer_bench.checks` has found its answers right.
"""

from interformer_bench.peers.registry import OURS, Peer, candidates

__all__ = ["OURS", "Peer", "candidates"]
