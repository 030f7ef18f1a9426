"""Users kept between requests: what candidates read of them is computed once, and held within a budget of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from interformer import checks
from interformer.batch import spans
from interformer.shared import RequestState

# `InterFormer.read_requests`, or the program of `export_user`.
ReadRequests = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]]


class _User(NamedTuple):
    """One user's inputs `[...]`, `[...]`, `[L, k]`, and state, without the axis of requests."""

    dense: Tensor
    categorical: Tensor
    sequences: Tensor
    keys_values: tuple[Tensor, ...]
    summaries: tuple[Tensor, ...]

    def bytes(self) -> int:
        return sum(x.nbytes for x in (*self[:3], *self.keys_values, *self.summaries))


class UserCache:
    """States of users for `InterFormer.score`, the most recently used ones within `max_bytes`.

    A user's tokens are held packed, of every Cross Arch; inputs are held, too, since a new event changes the state of
    all events: `append` computes the user again. Reading one user copies nothing, unless `dtype` is another one than
    the model's. Not for several Python threads at once.

    Args:
        read_requests: `InterFormer.read_requests`, or the program of `export_user`.
        max_bytes: the budget for all that is held of users.
        dtype: floating dtype in which states are held, `torch.bfloat16` for half the bytes; None: that of the model,
            and then what is read is what was computed, bit for bit.
        max_history: the events of a user that are kept, the latest ones; None: all.

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(
        self,
        read_requests: ReadRequests,
        *,
        max_bytes: int,
        dtype: torch.dtype | None = None,
        max_history: int | None = None,
    ) -> None:
        checks.whole("max_bytes", max_bytes, 0, 1 << 62)
        if max_history is not None:
            checks.whole("max_history", max_history, 0)
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating one, found {dtype}")
        self.read_requests, self.max_bytes, self.dtype, self.max_history = read_requests, max_bytes, dtype, max_history
        self.bytes = 0
        self._users: OrderedDict[Hashable, _User] = OrderedDict()
        self._computed: list[torch.dtype] = []  # dtypes of the model's states, keys and values first

    def __len__(self) -> int:
        return len(self._users)

    def __contains__(self, user: object) -> bool:
        return user in self._users

    def put(
        self, users: Sequence[Hashable], dense: Tensor, categorical: Tensor, sequences: Tensor, offsets: Tensor
    ) -> None:
        """Compute and hold users, in place of what was held of them.

        Args:
            users: a key of each.
            dense, categorical: their columns, `[R, ...]` (`SplitEmbedding.request_inputs`).
            sequences, offsets: their events `[T, k]`, oldest first, and `[R+1]`.

        Raises:
            TypeError: the users are tensors, which are no keys.
            ValueError: there are not as many users as rows, a user comes twice, or one alone exceeds the budget; then
                nothing has changed.
        """
        _check_users(users, offsets)
        if self.max_history is not None:
            length = offsets.diff().clamp(max=self.max_history)
            offsets, events = spans(offsets[1:] - length, length)
            sequences = sequences[events]
        with torch.no_grad():
            state = RequestState(*self.read_requests(dense, categorical, sequences, offsets))
        self._computed = [state.keys_values[0].dtype, state.summaries[0].dtype]
        first, with_cls = offsets.tolist(), state.offsets.tolist()
        made: dict[Hashable, _User] = {}
        for i, user in enumerate(users):
            tokens = slice(with_cls[i], with_cls[i + 1])
            made[user] = _User(
                dense[i].clone(),
                categorical[i].clone(),
                sequences[first[i] : first[i + 1]].clone(),
                tuple(x[tokens].to(self.dtype or x.dtype, copy=True) for x in state.keys_values),
                tuple(x[i].to(self.dtype or x.dtype, copy=True) for x in state.summaries),
            )
            if (size := made[user].bytes()) > self.max_bytes:
                raise ValueError(f"max_bytes must hold a user, user {user!r} of {size}; found {self.max_bytes}")
        for user, held in made.items():
            self._hold(user, held)

    def append(self, users: Sequence[Hashable], sequences: Tensor, offsets: Tensor) -> None:
        """Add later events `[T, k]`, `[R+1]`, to held users, and compute these again.

        Raises:
            KeyError: a user is not held.
            TypeError, ValueError: as `put`.
        """
        _check_users(users, offsets)
        if not len(users):
            return
        held = [self._user(user) for user in users]
        first = offsets.tolist()
        events = [torch.cat((user.sequences, sequences[first[i] : first[i + 1]])) for i, user in enumerate(held)]
        lengths = torch.tensor([len(x) for x in events], device=offsets.device)
        self.put(
            users,
            torch.stack([user.dense for user in held]),
            torch.stack([user.categorical for user in held]),
            torch.cat(events),
            torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        )

    def get(self, users: Sequence[Hashable]) -> RequestState:
        """The state of held users, as requests `0 .. R-1` in this order, in the model's dtype.

        That of one user is the cache's own memory: it is to be read, not written.

        Raises:
            KeyError: a user is not held.
            ValueError: there is no user.
        """
        held = [self._user(user) for user in users]
        if not held:
            raise ValueError("users must name at least one, found none")
        kv_dtype, summary_dtype = self._computed
        keys_values = tuple(
            _joined(parts).to(kv_dtype) for parts in zip(*(user.keys_values for user in held), strict=True)
        )
        summaries = tuple(
            torch.stack(parts).to(summary_dtype) for parts in zip(*(user.summaries for user in held), strict=True)
        )
        lengths = torch.tensor([len(user.keys_values[0]) for user in held])
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(keys_values[0].device)
        return RequestState(keys_values, summaries, offsets)

    def evict(self, user: Hashable) -> None:
        """Forget a user.

        Raises:
            KeyError: the user is not held.
        """
        self._user(user)
        self._forget(user)

    def _user(self, user: Hashable) -> _User:
        if user not in self._users:
            raise KeyError(f"user {user!r} is not held: it was never put, or evicted within {self.max_bytes} bytes")
        self._users.move_to_end(user)
        return self._users[user]

    def _hold(self, user: Hashable, state: _User) -> None:
        if user in self._users:
            self._forget(user)
        self._users[user] = state
        self.bytes += state.bytes()
        while self.bytes > self.max_bytes:
            self._forget(next(iter(self._users)))

    def _forget(self, user: Hashable) -> None:
        self.bytes -= self._users.pop(user).bytes()


def _check_users(users: Sequence[Hashable], offsets: Tensor) -> None:
    if isinstance(users, Tensor) or any(isinstance(user, Tensor) for user in users):
        raise TypeError("users must be keys, such as users.tolist(); found tensors")
    if len(set(users)) != len(users) or len(users) != offsets.shape[0] - 1:
        raise ValueError(f"users must be {offsets.shape[0] - 1} different keys (from offsets), found {users!r}")


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts])
