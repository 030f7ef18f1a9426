"""`interformer-kernels info`: versions, the machine, the backends that are report or missing, each op's backend."""

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
    """Print the result of `collect`."""
    info = collect()
    if arguments.json:
        print(json.dumps(info, indent=1))
    else:
        show(info)
    return 0


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> tuple[str, ...]:
    """The device types of this machine that some backend serves."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def collect() -> dict[str, Any]:
    """Everything, ready for JSON: `versions`, `machine`, `native`, `missing` and `backends[op][device][dtype]`."""
    report = _backend.report()
    gpu_names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {
            "interformer-kernels": version_of("interformer-kernels"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": version_of("triton"),
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpus": report["cpu_count"],
            "threads": report["threads"],
            "cpu_features": report["cpu_features"],
            "gpus": gpu_names,
        },
        "native": report["native"],
        "missing": report["missing"],
        "backends": {op: {device: _served(op, device) for device in devices()} for op in testing.OPS},
    }


def _served(op: str, device: str) -> dict[str, dict[str, Any]]:
    """By dtype: the backend that `backend=None` chooses, and why others cannot serve."""
    by_dtype = {}
    for dtype in FLOAT_DTYPES:
        reasons = {backend: _backend.unsupported_reason(op, backend, device, dtype) for backend in _backend.BACKENDS}
        cannot = {backend: reason for backend, reason in reasons.items() if reason is not None}
        name = str(dtype).removeprefix("torch.")
        by_dtype[name] = {"backend": _backend.choose(op, device, dtype), "cannot_serve": cannot}
    return by_dtype


def show(info: dict[str, Any]) -> None:
    """Print `info` as tables."""
    versions = {name: version or "not installed" for name, version in info["versions"].items()}
    machine = {**info["machine"], "cpu_features": " ".join(info["machine"]["cpu_features"]) or "unknown"}
    machine["gpus"] = ", ".join(machine["gpus"]) or "none that torch can use"
    native = info["native"] if isinstance(info["native"], dict) else {"missing": info["native"]}
    sections = {"": versions, "machine": machine, "native module": native}
    lines = [
        (f"{section}: {name}" if section else name, _text(value))
        for section, entries in sections.items()
        for name, value in entries.items()
    ]
    for name, reason in info["missing"].items():
        lines.append((f"backend: {name}", f"missing: {reason}" if reason else "available"))
    print_table("interformer-kernels", ("item", "value"), lines)
    print()
    columns = ("op", "device", *(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES))
    served = [
        (op, device, *(dtype["backend"] for dtype in dtypes.values()))
        for op, by_device in info["backends"].items()
        for device, dtypes in by_device.items()
    ]
    print_table("The choice of backend=None", columns, served)


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
