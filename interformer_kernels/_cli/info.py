"""`interformer-kernels info`: versions, what is built and why not, the machine, which backend each op takes."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from typing import Any

import torch

from interformer_kernels import _backend, testing
from interformer_kernels._checks import FLOAT_DTYPES
from interformer_kernels._cli.tables import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(arguments: argparse.Namespace) -> int:
    """Print what `collect` finds."""
    found = collect()
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
    return 0


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> tuple[str, ...]:
    """The device types of this machine that backends serve."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def collect() -> dict[str, Any]:
    """Everything, ready for JSON: `versions`, `machine`, `native`, `missing` and `backends[op][device][dtype]`."""
    built = _backend.report()
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {
            "interformer-kernels": version_of("interformer-kernels"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": version_of("triton"),
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpus": built["cpu_count"],
            "threads": built["threads"],
            "cpu_features": built["cpu_features"],
            "gpus": names,
        },
        "native": built["native"],
        "missing": built["missing"],
        "backends": {op: {device: _served(op, device) for device in devices()} for op in testing.OPS},
    }


def _served(op: str, device: str) -> dict[str, dict[str, Any]]:
    """By dtype: the backend that `backend=None` takes, and why the others do not serve."""
    found = {}
    for dtype in FLOAT_DTYPES:
        reasons = {backend: _backend.unsupported_reason(op, backend, device, dtype) for backend in _backend.BACKENDS}
        cannot = {backend: reason for backend, reason in reasons.items() if reason is not None}
        name = str(dtype).removeprefix("torch.")
        found[name] = {"backend": _backend.choose(op, device, dtype), "cannot_serve": cannot}
    return found


def show(found: dict[str, Any]) -> None:
    """The tables for people."""
    versions = {name: version or "not installed" for name, version in found["versions"].items()}
    machine = {**found["machine"], "cpu_features": " ".join(found["machine"]["cpu_features"]) or "unknown"}
    machine["gpus"] = ", ".join(machine["gpus"]) or "none that torch can use"
    native = found["native"] if isinstance(found["native"], dict) else {"not there": found["native"]}
    parts = {"": versions, "machine": machine, "native module": native}
    lines = [
        (f"{part}: {name}" if part else name, _text(value)) for part, of in parts.items() for name, value in of.items()
    ]
    lines += [(f"backend: {name}", f"missing: {why}" if why else "there") for name, why in found["missing"].items()]
    print_table("interformer-kernels", ("what", "found"), lines)
    print()
    columns = ("op", "device", *(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES))
    served = [
        (op, device, *(dtype["backend"] for dtype in dtypes.values()))
        for op, by_device in found["backends"].items()
        for device, dtypes in by_device.items()
    ]
    print_table("What backend=None takes", columns, served)


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
