"""The native module: views of tensors, and the libraries and symbols of its file."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

_C = pytest.importorskip("interformer_kernels._C", exc_type=ImportError)

IN_MEMORY = "first_bad_offset: offsets must be a dense tensor in memory, found "


def first_bad(offsets: Any, total: int = 9) -> int:
    return int(_C.first_bad_offset(offsets, total))


# ---------------------------------------------------------------- objects without a view


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.zeros(3, dtype=torch.int64)


def wrapper() -> Tensor:
    class Wrapper(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    return torch.Tensor._make_wrapper_subclass(Wrapper, (3,), dtype=torch.int64)


def functional() -> Tensor:
    return torch._to_functional_tensor(torch.zeros(3, dtype=torch.int64))


def freed() -> Tensor:
    x = torch.zeros(3, dtype=torch.int64)
    x.untyped_storage().resize_(0)
    return x


def quantized() -> Tensor:
    return torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("value", "name"),
    [(None, "NoneType"), (3, "int"), ([0, 3], "list"), (np.zeros(3, dtype=np.int64), "numpy.ndarray"), (Tensor, "")],
    ids=["none", "int", "list", "ndarray", "class"],
)
def test_not_a_tensor(value: object, name: str) -> None:
    with pytest.raises(TypeError, match=f"^first_bad_offset: offsets must be a torch.Tensor, found {name}"):
        first_bad(value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [
        fake,
        wrapper,
        functional,
        freed,
        quantized,
        lambda: torch.zeros(3, dtype=torch.int64, device="meta"),
        lambda: torch.zeros(3, dtype=torch.int64).to_sparse(),
        lambda: torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)]),
        lambda: torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)], layout=torch.jagged),
    ],
    ids=["fake", "wrapper", "functional", "freed", "quantized", "meta", "sparse", "nested-strided", "nested-jagged"],
)
def test_no_memory_to_view(make: Callable[[], Tensor]) -> None:
    with pytest.raises(TypeError) as caught:
        first_bad(make())
    message = str(caught.value)
    assert message.startswith(IN_MEMORY)
    assert "\n" not in message
    assert len(message) < 250


def test_inside_vmap() -> None:
    with pytest.raises(TypeError, match=re.escape(IN_MEMORY)):
        torch.func.vmap(lambda x: torch.tensor(first_bad(x)))(torch.zeros(2, 3, dtype=torch.int64))


def test_an_error_leaves_nothing_behind() -> None:
    for _ in range(3):
        with pytest.raises(TypeError):
            first_bad(torch.zeros(3, device="meta"))
        assert first_bad(torch.zeros(3, dtype=torch.int64)) == -1


# ---------------------------------------------------------------- tensors with a view


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_offsets_are_scanned(dtype: torch.dtype) -> None:
    sound = [[], [0], [0, 0], [0, 3, 3, 9]]
    unsound = [([1], 0), ([-1, 3], 0), ([0, 3, 2, 9], 2), ([0, 10], 1), ([0, 3, 10, 12], 2), ([0, -3, 2], 1)]
    for entries, bad in [*((entries, -1) for entries in sound), *unsound, ([0, torch.iinfo(dtype).max], 1)]:
        offsets = torch.tensor(entries, dtype=dtype)
        assert first_bad(offsets) == bad, entries
        assert first_bad(torch.stack((offsets, offsets.flip(0)), 1)[:, 0]) == bad, entries


def test_many_kinds_of_tensor_are_viewed() -> None:
    """More types than the table cache holds, over and over, and types that come and go."""
    offsets = torch.tensor([0, 3, 2])
    fleeting = [type(f"Fleeting{i}", (torch.Tensor,), {}) for i in range(20)]
    for _ in range(3):
        assert first_bad(offsets) == 2
        assert first_bad(torch.nn.Parameter(offsets, requires_grad=False)) == 2
        assert first_bad(offsets.as_subclass(Subclass)) == 2
        for kind in fleeting:
            assert first_bad(offsets.as_subclass(kind)) == 2
        with pytest.raises(TypeError, match="must be a torch.Tensor, found Other"):
            first_bad(type("Other", (), {})())
        fleeting = [type(f"Fleeting{i}", (torch.Tensor,), {}) for i in range(20)]
    with torch.inference_mode():
        assert first_bad(torch.tensor([0, 3, 2])) == 2


# ---------------------------------------------------------------- the module itself


def test_build_info() -> None:
    info = _C.build_info()
    assert re.match(r"\w+ \d+", info["compiler"])
    assert info["openmp"] >= 201107
    assert "generic" in info["cpu_levels"]
    assert info["cpu_level"] in info["cpu_levels"]
    assert info["cuda"]
    assert bool(info["cuda_architectures"]) == info["cuda_built"]
    assert _C.cuda_device_count() >= (1 if torch.cuda.is_available() and info["cuda_built"] else 0)
    with open("/proc/cpuinfo") as file:
        assert set(_C.cpu_features()) <= set(
            file.read().replace("sse4_2", "sse4.2").replace("avx512_", "avx512").split()
        )


def tool_output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_no_torch_or_cuda_library_is_needed() -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", tool_output("readelf", "-d", _C.__file__))
    assert "libgomp.so.1" in needed
    assert not [name for name in needed if re.search("torch|c10|cuda|python", name)]


def test_only_the_init_function_is_exported() -> None:
    symbols = tool_output("nm", "-D", "--defined-only", _C.__file__).split("\n")
    assert [line.split()[-1] for line in symbols if line] == ["PyInit__C"]


def test_one_openmp_runtime() -> None:
    """Torch's runtime serves both modules, also after each has run on several threads."""
    script = """
import torch, re
from interformer_kernels import _C
torch.set_num_threads(2)
a = torch.randn(300, 300); a @ a; (torch.randn(1 << 20) + 1).sum()
from interformer_kernels import pma_pooling
k = torch.randn(20000, 2, 16)
pma_pooling(k[:4], k, None, torch.arange(101) * 200, backend="cpu")
with open("/proc/self/maps") as maps:
    print(*sorted(set(re.findall(r"/\\S*(?:gomp|iomp|omp5)\\S*", maps.read()))), sep="\\n")
"""
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert len(completed.stdout.split()) == 1, completed.stdout
