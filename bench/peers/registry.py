"""The peers of each op by name, and the memory that a peer may take."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from interformer_bench import timing, workloads
from interformer_bench.ops.table import TABLE
from interformer_bench.peers.peer import OURS, Peer

# Bytes that a peer may allocate for one forward call on the CPU; with gradients it is assumed to need twice as much.
MAX_PEER_BYTES = 6 * 2**30
_COMPILED_ON_GPU = ("torch.compile", "FlexAttention")


def max_peer_bytes(device: str) -> int:
    """Bytes that a peer may allocate for one call: on a GPU, half of the free memory."""
    return timing.free_bytes(device) // 2 if device.startswith("cuda") else MAX_PEER_BYTES


@functools.cache
def _peers_of(op: str) -> dict[str, Peer]:
    return TABLE[op].peers()


def candidates(op: str, backend: str | None = None, compile_too: bool = True) -> dict[str, Peer]:
    """This package's implementation first, then its peers."""
    peers = {name: peer for name, peer in _peers_of(op).items() if compile_too or not peer.compiled}
    return {OURS: Peer(workloads.ours(op, backend)), **peers}


def gpu_peers(op: str, lengths: Sequence[int], compile_them: bool = False) -> dict[str, Peer]:
    """The peers of `op` on a GPU and rows of these lengths; with `compile_them`, only those `torch.compile` makes."""
    if compile_them:
        return {name: peer for name, peer in _peers_of(op).items() if name in _COMPILED_ON_GPU}
    make = TABLE[op].gpu_peers
    assert make is not None, f"{op} is not measured on GPUs"
    return make(lengths)
