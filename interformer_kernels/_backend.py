"""The choice of the backend that serves a call, and the reasons against the others."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from types import ModuleType

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")

_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
# Channels of a head, at most, in the ops of the attention family; no entry: any number.
_MOST_CHANNELS = {"cuda": 256}
_DEVICES = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
# Backends that `backend=None` tries on a device, fastest first; the reference serves all other calls.
_PREFERENCE = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}

_log = logging.getLogger("interformer_kernels")


@functools.cache
def _load_native() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("interformer_kernels._C"), ""
    except ImportError as error:
        return None, f"the native module interformer_kernels._C cannot be imported: {error}"


def native() -> ModuleType | None:
    """The native module, or None where it was not built or cannot be loaded."""
    return _load_native()[0]


def interprets_triton() -> bool:
    """Whether Triton interprets its kernels, on the CPU, for tensors of any device: a tool for tests and debugging."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _missing(backend: str) -> str | None:
    """Why this machine or build lacks the backend altogether; None where it is there."""
    if backend == "cpu" and native() is None:
        return _load_native()[1]
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return _cuda_missing() if backend == "cuda" else None


def _cuda_missing() -> str | None:
    module = native()
    if module is None:
        return _load_native()[1]
    built = module.build_info()
    if not built["cuda_built"]:
        return f"the native module has no CUDA part: {built['cuda']}"
    if torch.version.hip:
        return "it serves GPUs of NVIDIA, and this torch is for those of AMD"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"it serves GPUs of compute capability 8.0 and above, found {major}.{minor}"
    return None


def unsupported_reason(op: str, backend: str, device_type: str, dtype: torch.dtype, channels: int = 0) -> str | None:
    """Why `backend` cannot serve this op on this device and dtype, or heads of so many channels; None where it can."""
    if backend == "reference":
        return None
    if device_type != _DEVICES[backend] and not (backend == "triton" and device_type == "cpu" and interprets_triton()):
        also = ", or cpu tensors under TRITON_INTERPRET=1" if backend == "triton" else ""
        return f"it serves {_DEVICES[backend]} tensors{also}, found {device_type}"
    if dtype not in _DTYPES[backend]:
        return f"it serves {', '.join(str(d) for d in _DTYPES[backend])}, found {dtype}"
    most = _MOST_CHANNELS.get(backend, channels)
    if channels > most:
        return f"it serves heads of at most {most} channels, found {channels}"
    return _missing(backend)


@functools.cache
def choose(op: str, device_type: str, dtype: torch.dtype, channels: int = 0) -> str:
    """The fastest backend that can serve; its name and the reason are logged once per op, device, dtype and head size.

    `channels` are those of the widest head, of ops that attend; 0 for others.
    """
    module, passed_over = native(), []
    for backend in _PREFERENCE.get(device_type, ()):
        reason = unsupported_reason(op, backend, device_type, dtype, channels)
        if backend == "triton" and interprets_triton():
            reason = "its interpreter serves only where it is named"
        if reason is None:
            kind = f", instruction set {module.build_info()['cpu_level']}" if backend == "cpu" and module else ""
            _log.info("%s on %s with %s: backend %r serves%s", op, device_type, dtype, backend, kind)
            return backend
        passed_over.append(f"{backend}: {reason}")
    because = "; ".join(passed_over) or f"no kernel backend serves {device_type} tensors"
    _log.info("%s on %s with %s: backend 'reference' serves (%s)", op, device_type, dtype, because)
    return "reference"


@functools.cache
def kernels(
    module: str, op: str, backend: str, device_type: str, dtype: torch.dtype, channels: int = 0
) -> ModuleType | None:
    """The module of this name whose `forward` and `backward` serve the call; None stands for the reference.

    `backend` is a name, which never falls back, or `""` for the fastest that can serve. `op` is the public function's
    name, for messages.
    """
    chosen = backend or choose(op, device_type, dtype, channels)
    reason = unsupported_reason(op, chosen, device_type, dtype, channels)
    if reason is not None:
        raise RuntimeError(f"{op}: backend {chosen!r} cannot serve: {reason}")
    return None if chosen == "reference" else importlib.import_module(f"interformer_kernels._{chosen}.{module}")


def report() -> dict[str, object]:
    """The versions and builds of this installation, for `interformer-kernels info` and bug reports."""
    module = native()
    return {
        "torch": torch.__version__,
        "native": module.build_info() if module is not None else _load_native()[1],
        "cpu_features": module.cpu_features() if module is not None else [],
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "missing": {backend: _missing(backend) for backend in BACKENDS},
    }
