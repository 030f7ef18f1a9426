"""Facts about the offsets of a batch that a user's plan keeps on the host, and the lists that launchers keep with them.

Launchers look them up by the memory of the offsets that they are given. Facts hold their offsets, so no other tensor
can lie there meanwhile; they are gone with the last plan that holds them.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

_numbers = itertools.count()


class Facts:
    """The rows of a batch as the host knows them."""

    def __init__(self, offsets: Tensor) -> None:
        self.offsets, self._version = offsets, offsets._version
        self.number = next(_numbers)  # of no other facts, ever
        self.bounds = offsets.detach().to("cpu", torch.int64, copy=True)
        self.longest = int(self.bounds.diff().max()) if len(self.bounds) > 1 else 0
        self._kept: dict[Hashable, object] = {}

    @property
    def changed(self) -> bool:
        """Whether the offsets have been written to since they were read."""
        return self.offsets._version != self._version

    def kept(self, key: Hashable, make: Callable[[], object]) -> object:
        """The value of `key`, made by `make` where there is none yet."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def lengths(self, tokens: int) -> Tensor:
        """Tokens of each row, of a tensor of `tokens`, as kernels clamp them."""
        return self.bounds.clamp(max=tokens).diff()

    def tail(self, tokens: int) -> int:
        """Tokens behind the last row."""
        return max(0, tokens - int(self.bounds[-1]))


_facts: weakref.WeakValueDictionary[Hashable, Facts] = weakref.WeakValueDictionary()
_making = threading.Lock()


def _place(offsets: Tensor) -> Hashable:
    """The place of contiguous offsets."""
    return offsets.data_ptr(), offsets.numel(), offsets.dtype


def make(offsets: Tensor) -> Facts:
    """The facts of these offsets, read from the device unless a plan holds them already."""
    with _making:
        facts = _facts.get(_place(offsets))
        if facts is None or facts.changed:
            facts = Facts(offsets)
            _facts[_place(offsets)] = facts
        return facts


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured, which will be replayed with other contents of tensors."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def any_facts() -> bool:
    """Whether any plan holds facts."""
    return bool(_facts)


def facts_of(offsets: Tensor) -> Facts | None:
    """The facts of a call's offsets; None where no plan holds them, or a graph is captured."""
    if not _facts:
        return None
    facts = _facts.get(_place(offsets))
    if facts is None or not offsets.is_contiguous() or capturing(offsets):
        return None
    if facts.changed:
        raise RuntimeError(
            "the offsets were written to after interformer_kernels.plan(offsets) had read them: close that plan first, "
            "or make another one of the new offsets"
        )
    return facts
