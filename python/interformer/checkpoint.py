"""Checkpoints on disk: written whole or not at all, and read only where every byte is the one that was written.

The file is `torch.save`'s with a checksum of all its bytes behind them, where ZIP's readers, and so `torch.load`, do
not look. (ZIP's own checksums are of its entries alone, and PyTorch does not look at them either.) Nothing in a
checkpoint is run: it is loaded with `weights_only`.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from interformer.checks import shown
from interformer.files import DamagedFileError, replacing

SEAL = b"interformer-sha256:"
ADVICE = "remove it to start anew"
RECORD = {"epoch": int, "loss": float, "valid": dict, "seconds": float}


def write_atomically(path: Path, state: dict[str, Any]) -> None:
    """`torch.save` to a neighbour of `path`, and its checksum, flushed to the disk, then renamed over it."""
    with replacing(path) as file:
        noting = _Noting(file)
        try:
            torch.save(state, noting)
        except RuntimeError:  # what PyTorch makes of a write that failed
            if noting.failure is not None:
                raise noting.failure from None
            raise
        file.write(SEAL + noting.digest.hexdigest().encode())


class _Noting:
    """A file with the checksum of what was written, and the error of a write, which PyTorch does not tell."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        self.file.flush()


def read_checkpoint(
    path: Path, own: Mapping[str, Any], shapes: Sequence[torch.Size], device: torch.device
) -> dict[str, Any]:
    """What was written to `path`, for a run whose present state is `own`.

    Args:
        shapes: of the optimizer's parameters, in its order.

    Raises:
        OSError: the file cannot be read.
        DamagedFileError: it is not what was written, or no checkpoint.
        ValueError: it is another run's.
    """
    state = _load(path, device)
    if not isinstance(state, dict) or "identity" not in state:
        raise DamagedFileError(f"{path}: wanted a checkpoint of this program, found something else; {ADVICE}")
    changed = differences(state["identity"], own["identity"])
    if changed:
        raise ValueError(f"{path}: this run is not the one of the checkpoint: {'; '.join(changed)}")
    reason = _why_unfit(state, own, shapes)
    if reason is not None:
        raise DamagedFileError(f"{path}: wanted the state of this run, found {reason}; {ADVICE}")
    return state


def _load(path: Path, device: torch.device) -> Any:
    with open(path, "rb") as file:
        left, digest = os.fstat(file.fileno()).st_size - len(SEAL) - 2 * hashlib.sha256().digest_size, hashlib.sha256()
        while left > 0 and (data := file.read(min(left, 1 << 22))):
            digest.update(data)
            left -= len(data)
        seal = file.read()
        if not seal.startswith(SEAL):
            wanted = "wanted a checkpoint of this program, with its checksum at the end, found something else"
            raise DamagedFileError(f"{path}: {wanted}; {ADVICE}")
        if seal != SEAL + digest.hexdigest().encode():
            raise DamagedFileError(f"{path}: damaged: its checksum is another one; {ADVICE}")
        file.seek(0)
        try:
            return torch.load(file, map_location=device, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            why = " ".join(str(error).split())[:160]
            raise DamagedFileError(f"{path}: wanted a checkpoint of this program, found {why}; {ADVICE}") from error


def _why_unfit(state: Mapping[str, Any], own: Mapping[str, Any], shapes: Sequence[torch.Size]) -> str | None:
    """In what the state of another program, or of hands, differs from what this run can go on from."""
    if set(state) != set(own):
        return f"the entries {', '.join(sorted(map(str, state)))}"
    if not _alike(state["model"], own["model"]):
        return "parameters of other names, shapes or kinds"
    if not _optimizer_fits(state["optimizer"], own["optimizer"], shapes):
        return "the state of another optimizer"
    if not _random_state_fits(state):
        return "no state of PyTorch's random numbers"
    history, best = state["history"], state["best_epoch"]
    if not isinstance(history, list) or not all(map(_is_record, range(len(history)), history)):
        return "no history of epochs"
    if type(best) is not int or not (0 <= best < len(history) or (best == -1 and not history)):
        return f"best_epoch {shown(best)} in {len(history)} epochs"
    if not (_alike(state["best"], own["model"]) if history else state["best"] == {}):
        return "best parameters of other names, shapes or kinds"
    seconds = state["step_seconds"]
    if not isinstance(seconds, list) or not all(type(one) is float for one in [*seconds, state["seconds"]]):
        return "no times"
    return None


def _alike(theirs: object, ours: Mapping[str, Tensor]) -> bool:
    """Whether these are tensors of the same names, shapes and kinds."""
    return (
        isinstance(theirs, dict)
        and set(theirs) == set(ours)
        and all(
            isinstance(theirs[name], Tensor) and (theirs[name].shape, theirs[name].dtype) == (mine.shape, mine.dtype)
            for name, mine in ours.items()
        )
    )


def _optimizer_fits(theirs: Any, ours: Mapping[str, Any], shapes: Sequence[torch.Size]) -> bool:
    if not isinstance(theirs, dict) or set(theirs) != {"state", "param_groups"}:
        return False
    groups, moments = theirs["param_groups"], theirs["state"]
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return False
    if [{**group, "lr": 0} for group in groups] != [{**group, "lr": 0} for group in ours["param_groups"]]:
        return False
    if not isinstance(moments, dict) or not set(moments) <= set(range(len(shapes))):
        return False
    return all(
        isinstance(held, dict)
        and set(held) == {"step", "exp_avg", "exp_avg_sq"}
        and all(isinstance(value, Tensor) and value.dtype.is_floating_point for value in held.values())
        and held["step"].dim() == 0
        and held["exp_avg"].shape == held["exp_avg_sq"].shape == shapes[at]
        for at, held in moments.items()
    )


def _random_state_fits(state: Mapping[str, Any]) -> bool:
    own, device = state["rng"], state["device_rng"]
    if not (device is None or (isinstance(device, Tensor) and device.dtype == torch.uint8)):
        return False
    try:
        torch.Generator().set_state(own.cpu())
    except (RuntimeError, TypeError, AttributeError):
        return False
    return True


def _is_record(epoch: int, found: object) -> bool:
    return (
        isinstance(found, dict)
        and {name: type(value) for name, value in found.items()} == RECORD
        and found["epoch"] == epoch
        and set(found["valid"]) == {"auc", "gauc", "logloss", "ne"}
        and all(type(value) is float for value in found["valid"].values())
    )


def differences(theirs: Any, ours: Any, name: str = "") -> list[str]:
    """Where two nested dictionaries differ, in words."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        found = []
        for key in sorted({*theirs, *ours}, key=str):
            inner = f"{name}.{key}" if name else str(key)
            found += differences(theirs.get(key), ours.get(key), inner)
        return found
    return [] if theirs == ours else [f"{name} was {shown(theirs)} and is {shown(ours)}"]
