"""Checkpoints on disk: written atomically, and loaded only if the checksum of the whole file matches.

The file is `torch.save`'s with a checksum appended, which ZIP readers, and so `torch.load`, ignore. (ZIP's own
checksums cover only its entries, and PyTorch does not verify them.) A checkpoint is loaded with `weights_only`, so that
no code in it can run.
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

from interformer.checks import short_repr
from interformer.files import DamagedFileError, replacing

SEAL = b"interformer-sha256:"
ADVICE = "remove it to start again"
RECORD = {"epoch": int, "loss": float, "valid": dict, "seconds": float}


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `torch.save`'s bytes and their checksum to `path`, atomically."""
    with replacing(path) as file:
        recording = _RecordingFile(file)
        try:
            torch.save(state, recording)
        except RuntimeError:  # PyTorch raises it for a failed write, without the cause.
            if recording.failure is not None:
                raise recording.failure from None
            raise
        file.write(SEAL + recording.digest.hexdigest().encode())


class _RecordingFile:
    """A file that keeps the checksum of its bytes, and the error of a failed write, which PyTorch does not report."""

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
    path: Path, current: Mapping[str, Any], shapes: Sequence[torch.Size], device: torch.device
) -> dict[str, Any]:
    """The state in the checkpoint `path`, for a run whose current state is `current`.

    Args:
        shapes: shapes of the optimizer's parameters, in its order.

    Raises:
        OSError: the file cannot be read.
        DamagedFileError: the file is damaged, or not a checkpoint.
        ValueError: it is a checkpoint of another run.
    """
    state = _load(path, device)
    if not isinstance(state, dict) or "identity" not in state:
        raise DamagedFileError(f"{path}: wanted a checkpoint of this program, found something else; {ADVICE}")
    changed = differences(state["identity"], current["identity"])
    if changed:
        raise ValueError(f"{path}: this run is not the one of the checkpoint: {'; '.join(changed)}")
    reason = _mismatch(state, current, shapes)
    if reason is not None:
        raise DamagedFileError(f"{path}: wanted the state of this run, found {reason}; {ADVICE}")
    return state


def _load(path: Path, device: torch.device) -> Any:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        remaining = os.fstat(file.fileno()).st_size - len(SEAL) - 2 * digest.digest_size
        while remaining > 0 and (data := file.read(min(remaining, 1 << 22))):
            digest.update(data)
            remaining -= len(data)
        seal = file.read()
        if not seal.startswith(SEAL):
            problem = "wanted a checkpoint of this program, with its checksum at the end, found something else"
            raise DamagedFileError(f"{path}: {problem}; {ADVICE}")
        if seal != SEAL + digest.hexdigest().encode():
            raise DamagedFileError(f"{path}: damaged: its checksum does not match; {ADVICE}")
        file.seek(0)
        try:
            return torch.load(file, map_location=device, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            message = " ".join(str(error).split())[:160]
            raise DamagedFileError(f"{path}: wanted a checkpoint of this program, found {message}; {ADVICE}") from error


def _mismatch(state: Mapping[str, Any], current: Mapping[str, Any], shapes: Sequence[torch.Size]) -> str | None:
    """The reason why this run cannot resume from `state`, which was edited or another program wrote; None if it can."""
    if set(state) != set(current):
        return f"the entries {', '.join(sorted(map(str, state)))}"
    if not _same_tensors(state["model"], current["model"]):
        return "parameters of other names, shapes or kinds"
    if not _optimizer_fits(state["optimizer"], current["optimizer"], shapes):
        return "the state of another optimizer"
    if not _random_state_fits(state):
        return "no state of PyTorch's random numbers"
    history, best = state["history"], state["best_epoch"]
    if not isinstance(history, list) or not all(map(_is_record, range(len(history)), history)):
        return "no history of epochs"
    if type(best) is not int or not (0 <= best < len(history) or (best == -1 and not history)):
        return f"best_epoch {short_repr(best)} in {len(history)} epochs"
    if not (_same_tensors(state["best"], current["model"]) if history else state["best"] == {}):
        return "best parameters of other names, shapes or kinds"
    step_seconds = state["step_seconds"]
    if not isinstance(step_seconds, list) or not all(type(s) is float for s in [*step_seconds, state["seconds"]]):
        return "no times"
    return None


def _same_tensors(stored: object, expected: Mapping[str, Tensor]) -> bool:
    """Whether these are tensors of the same names, shapes and dtypes."""
    return (
        isinstance(stored, dict)
        and set(stored) == set(expected)
        and all(
            isinstance(stored[name], Tensor) and (stored[name].shape, stored[name].dtype) == (x.shape, x.dtype)
            for name, x in expected.items()
        )
    )


def _optimizer_fits(stored: Any, expected: Mapping[str, Any], shapes: Sequence[torch.Size]) -> bool:
    if not isinstance(stored, dict) or set(stored) != {"state", "param_groups"}:
        return False
    groups, moments = stored["param_groups"], stored["state"]
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return False
    if [{**group, "lr": 0} for group in groups] != [{**group, "lr": 0} for group in expected["param_groups"]]:
        return False
    if not isinstance(moments, dict) or not set(moments) <= set(range(len(shapes))):
        return False
    return all(
        isinstance(entry, dict)
        and set(entry) == {"step", "exp_avg", "exp_avg_sq"}
        and all(isinstance(value, Tensor) and value.dtype.is_floating_point for value in entry.values())
        and entry["step"].dim() == 0
        and entry["exp_avg"].shape == entry["exp_avg_sq"].shape == shapes[index]
        for index, entry in moments.items()
    )


def _random_state_fits(state: Mapping[str, Any]) -> bool:
    cpu_state, device_state = state["rng"], state["device_rng"]
    if not (device_state is None or (isinstance(device_state, Tensor) and device_state.dtype == torch.uint8)):
        return False
    try:
        torch.Generator().set_state(cpu_state.cpu())
    except (RuntimeError, TypeError, AttributeError):
        return False
    return True


def _is_record(epoch: int, record: object) -> bool:
    return (
        isinstance(record, dict)
        and {name: type(value) for name, value in record.items()} == RECORD
        and record["epoch"] == epoch
        and set(record["valid"]) == {"auc", "gauc", "logloss", "ne"}
        and all(type(value) is float for value in record["valid"].values())
    )


def differences(stored: Any, current: Any, name: str = "") -> list[str]:
    """Descriptions of all entries in which two nested dictionaries differ."""
    if isinstance(stored, dict) and isinstance(current, dict):
        all_differences = []
        for key in sorted({*stored, *current}, key=str):
            full_key = f"{name}.{key}" if name else str(key)
            all_differences += differences(stored.get(key), current.get(key), full_key)
        return all_differences
    return [] if stored == current else [f"{name} was {short_repr(stored)} and is {short_repr(current)}"]
