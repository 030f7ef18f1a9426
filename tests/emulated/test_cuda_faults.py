"""The emulation finds planted faults of kernels: a test of the other tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import emulation
import pytest
import torch

# Arguments of `configure`: the seed of the order of the fibers, and whether copies land late (runtime/scheduler.h).
IN_ORDER, SHUFFLED, EARLY = (0, True), (3, True), (0, False)


def exchanged(module: ModuleType, fault: str, how: tuple[int, bool]) -> bool:
    """Whether the kernel with this fault gives the right result."""
    module.configure(*how)
    x, out = torch.randn(128), torch.empty(128)
    module.exchange(fault, x, out)
    reversed_x = x.flip(0)
    y = torch.cat((reversed_x[:1], reversed_x[:-1]))
    return torch.equal(out, (y.view(-1, 2) + y.view(-1, 2).flip(1)).flatten())


@pytest.mark.parametrize("how", [IN_ORDER, SHUFFLED, EARLY], ids=str)
def test_the_kernel_without_a_fault(emulated: ModuleType, how: tuple[int, bool]) -> None:
    assert exchanged(emulated, "", how)


@pytest.mark.parametrize(
    ("fault", "finds", "misses"),
    [
        ("no wait", (IN_ORDER, SHUFFLED), (EARLY,)),
        ("no barrier after the copy", (IN_ORDER, SHUFFLED, EARLY), ()),
        ("no barrier after the write", (SHUFFLED,), (IN_ORDER, EARLY)),
    ],
)
def test_a_fault_shows_in_the_numbers(
    emulated: ModuleType, fault: str, finds: tuple[tuple[int, bool], ...], misses: tuple[tuple[int, bool], ...]
) -> None:
    """A fault shows only in some orders, or where copies land late, so every case runs in more than one way."""
    assert not any(exchanged(emulated, fault, how) for how in finds)
    assert all(exchanged(emulated, fault, how) for how in misses)


def reversed_right(module: ModuleType, fault: str, how: tuple[int, bool], resident: int) -> bool:
    """Whether the kernel with this fault gives the right result by so many persistent blocks."""
    module.configure(*how, resident=resident)
    x, out = torch.randn(20, 128), torch.empty(20, 128)
    try:
        module.reverse_rows(fault, x, torch.zeros(1, dtype=torch.int64), out)
    except RuntimeError:  # threads of a block went on to different rows: a deadlock
        return False
    return torch.equal(out, x.flip(1))


@pytest.mark.parametrize("resident", [1, 3])
@pytest.mark.parametrize(
    ("fault", "misses"),
    [
        ("", (IN_ORDER, SHUFFLED, EARLY)),
        ("next item read too early", (IN_ORDER, EARLY)),
        ("memory reused too early", ()),
    ],
)
def test_a_fault_between_items_of_a_persistent_block(
    emulated: ModuleType, fault: str, misses: tuple[tuple[int, bool], ...], resident: int
) -> None:
    """Items use the same memory one after another; running threads in order hides one of the faults."""
    for how in (IN_ORDER, SHUFFLED, EARLY):
        assert reversed_right(emulated, fault, how, resident) == (how in misses), how


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("misaligned copy", r"a copy of 8 bytes is not aligned \(block 0, thread 1\)"),
        ("returned before a barrier", "waits in vain: 1 threads have returned, 127 threads at __syncthreads"),
        ("half a warp", "waits in vain: 64 threads have returned, 16 threads at __shfl_xor_sync of warp 0"),
    ],
)
def test_a_fault_is_named(emulated: ModuleType, fault: str, said: str) -> None:
    for how in (IN_ORDER, SHUFFLED):
        with pytest.raises(RuntimeError, match=said):
            exchanged(emulated, fault, how)


def test_a_grid_that_no_device_accepts_is_refused_by_name(emulated: ModuleType) -> None:
    """The message has the op and the tensor, like errors of the CUDA runtime."""
    with pytest.raises(RuntimeError, match=r"^exchange of float32 \[128\] on the CPU: invalid argument$"):
        exchanged(emulated, "too much shared memory", IN_ORDER)


# ---------------------------------------------------------------- under AddressSanitizer


def sanitized(*command: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the sanitizer's runtime, which must be there first, and the emulation built for it."""
    libraries = [
        subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "INTERFORMER_SANITIZE": "address,undefined",
        "INTERFORMER_EMULATE": "1",
        "LD_PRELOAD": " ".join(libraries),
    }
    environment |= {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0", "PYTHONMALLOC": "malloc"}
    paths = [str(emulation.ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=900)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("fault", "said"),
    [("beyond the tensor", "heap-buffer-overflow"), ("beyond shared memory", "use-after-poison"), ("", "")],
)
def test_out_of_bounds_is_found(fault: str, said: str) -> None:
    code = "import emulation, torch; x = torch.randn(128); "
    code += f"emulation.load().exchange({fault!r}, x, torch.empty(128)); print('ran')"
    done = sanitized("-c", code)
    if not fault:
        assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr
        return
    assert done.returncode != 0
    assert f"AddressSanitizer: {said}" in done.stderr, done.stderr
    assert "planted.cu" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_stay_inside_their_tensors() -> None:
    """Some cases of every op, each tensor in its own allocation, so that the sanitizer finds accesses beside it."""
    done = sanitized("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
                     str(Path(__file__).with_name("test_cuda_bounds.py")))  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
