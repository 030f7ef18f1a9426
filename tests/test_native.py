"""The native module: how tensors reach it, what it refuses and in which words, and what its file needs and shows."""

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

FLOATS = "float32, float64, bfloat16 or float16"
IN_MEMORY = "first_bad_offset: offsets must be a dense tensor in memory, found "


def first_bad(offsets: Any, total: int = 9) -> int:
    return int(_C.first_bad_offset(offsets, total))


def pma(**changed: Any) -> None:
    """One right call of the forward kernel, with some of its arguments changed."""
    b, m, h, hk, d, dv, t = 2, 3, 4, 2, 5, 6, 7
    arguments = {
        "seeds": torch.zeros(m, h, d),
        "k": torch.zeros(t, hk, d),
        "v": torch.zeros(t, hk, dv),
        "offsets": torch.tensor([0, 3, 7]),
        "gate": torch.zeros(b, m, h, dv),
        "residual": torch.zeros(b, m, h, dv),
        "scale": 1.0,
        "skip_prefix": 0,
        "score": "softmax",
        "post_scale": 1.0,
        "gate_form": "multiply",
        "gate_activation": "sigmoid",
        "out": torch.zeros(b, m, h, dv),
        "lse": torch.zeros(b, m, h),
        "attended": torch.zeros(b, m, h, dv),
        "threads": 1,
    }
    _C.pma_pooling_forward(**{**arguments, **changed})


def pma_backward(**changed: Any) -> None:
    """One right call of the backward kernel, with some of its arguments changed."""
    b, m, h, hk, d, t = 2, 3, 4, 2, 5, 7
    row, seeds, k = torch.zeros(b, m, h, d), torch.zeros(m, h, d), torch.zeros(t, hk, d)
    arguments = {
        "grad_out": row,
        "attended": row,
        "seeds": seeds,
        "k": k,
        "v": k,
        "offsets": torch.tensor([0, 3, 7]),
        "gate": row,
        "scale": 1.0,
        "skip_prefix": 0,
        "score": "softmax",
        "post_scale": 1.0,
        "gate_form": "multiply",
        "gate_activation": "sigmoid",
        "grad_seeds": seeds.clone(),
        "grad_k": k.clone(),
        "grad_v": k.clone(),
        "grad_gate": torch.zeros(b, 1, h, d),
        "threads": 1,
    }
    _C.pma_pooling_backward(**{**arguments, **changed})


# ---------------------------------------------------------------- what a view cannot be made of


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.zeros(3, dtype=torch.int64)


def wrapper() -> Tensor:
    class Wrapper(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    return torch.Tensor._make_wrapper_subclass(Wrapper, (3,), dtype=torch.int64)


def freed() -> Tensor:
    x = torch.zeros(3, dtype=torch.int64)
    x.untyped_storage().resize_(0)
    return x


def quantized() -> Tensor:
    return torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("thing", "name"),
    [(None, "NoneType"), (3, "int"), ([0, 3], "list"), (np.zeros(3, dtype=np.int64), "numpy.ndarray"), (Tensor, "")],
    ids=["none", "int", "list", "ndarray", "class"],
)
def test_not_a_tensor(thing: object, name: str) -> None:
    with pytest.raises(TypeError, match=f"^first_bad_offset: offsets must be a torch.Tensor, found {name}"):
        first_bad(thing)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [
        fake,
        wrapper,
        freed,
        quantized,
        lambda: torch.zeros(3, dtype=torch.int64, device="meta"),
        lambda: torch.zeros(3, dtype=torch.int64).to_sparse(),
        lambda: torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)]),
        lambda: torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)], layout=torch.jagged),
    ],
    ids=["fake", "wrapper", "freed", "quantized", "meta", "sparse", "nested-strided", "nested-jagged"],
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


# ---------------------------------------------------------------- what a kernel does not take


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"k": torch.zeros(7, 2, 5, dtype=torch.int64)}, TypeError, f"k must be {FLOATS}, found int64 [7, 2, 5] on"),
        ({"k": torch.zeros(7, 2, 5, dtype=torch.bool)}, TypeError, f"k must be {FLOATS}, found bool [7, 2, 5]"),
        ({"k": torch.zeros(7, 2, 5, dtype=torch.complex64)}, TypeError, f"k must be {FLOATS}, found complex64"),
        ({"v": torch.zeros(7, 2, 6).half()}, TypeError, "v must be float32, found float16 [7, 2, 6]"),
        ({"lse": torch.zeros(2, 3, 4).half()}, TypeError, "lse must be float32, found float16"),
        ({"offsets": torch.zeros(3)}, TypeError, "offsets must be int32 or int64, found float32 [3] on the CPU"),
        ({"offsets": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, "offsets must be a vector, found int64 [3, 1]"),
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, ValueError, "offsets must be [B+1] with at least one entry"),
        ({"k": torch.zeros(7, 10)}, ValueError, "k must be float32 [T, Hk, D], found float32 [7, 10] on the CPU"),
        ({"k": torch.zeros((1,) * 9)}, ValueError, "k must be float32 [T, Hk, D], found float32 [9 axes]"),
        ({"k": torch.zeros(7, 2, 10)[..., ::2]}, ValueError, "k must be contiguous along its last axis"),
        ({"v": torch.zeros(6, 2, 6)}, ValueError, "v must be float32 [T = 7, Hk = 2, Dv], found float32 [6, 2, 6]"),
        ({"seeds": torch.zeros(3, 4, 6)}, ValueError, "seeds must be float32 [M, H, D = 5], found float32 [3, 4, 6]"),
        ({"seeds": torch.zeros(3, 3, 5)}, ValueError, "seeds must be of a number of heads that k's 2 divides"),
        ({"gate": torch.zeros(2, 3, 4, 1)}, ValueError, "gate must be float32 [B = 2, M = 3, H = 4, Dv = 6]"),
        ({"out": torch.zeros(2, 3, 4, 5)}, ValueError, "out must be float32 [B = 2, M = 3, H = 4, Dv = 6]"),
        ({"score": "relu"}, ValueError, "lse must be None without softmax"),
        ({"skip_prefix": -1}, ValueError, "skip_prefix must be at least 0, found -1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_wrong_dtype_rank_or_shape(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape("pma_pooling_forward: " + message)):
        pma(**changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"score": "max"}, "score must be softmax, identity, relu, silu or gelu, found max"),
        ({"gate_form": "add"}, "gate_form must be multiply or self, found add"),
        ({"gate_activation": "relu"}, "gate_activation must be sigmoid, tanh, silu or identity, found relu"),
    ],
    ids=["score", "gate_form", "gate_activation"],
)
def test_unknown_names(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        pma(**changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grad_v": None}, "grad_v must be given, found None"),
        ({"v": None}, "grad_v must be None, found float32 [7, 2, 5]"),
        ({"grad_gate": None}, "grad_gate must be given, found None"),
        ({"gate": None}, "attended must be None, found float32 [2, 3, 4, 5]"),
        ({"grad_gate": torch.zeros(2, 2, 4, 5)}, "grad_gate must be of size 1 or the output's on every axis"),
        ({"grad_k": torch.zeros(6, 2, 5)}, "grad_k must be of the shape of k, [7, 2, 5], found float32 [6, 2, 5]"),
        ({"grad_k": torch.zeros(7, 2, 10)[..., ::2]}, "grad_k must be contiguous along its last axis"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_gradients(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape("pma_pooling_backward: " + message)):
        pma_backward(**changed)


def test_the_right_calls_pass() -> None:
    """What the refusals above change is all that is wrong with them."""
    pma()
    pma(v=None, gate=None, residual=None, lse=None, attended=None, out=torch.zeros(2, 3, 4, 5))
    pma_backward()


# ---------------------------------------------------------------- what a view can be made of


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


def test_tensors_with_gradients_are_viewed() -> None:
    leaf = torch.zeros(7, 2, 5, requires_grad=True)
    pma(k=leaf)
    pma(k=leaf * 2)


# ---------------------------------------------------------------- the module itself


def test_what_it_says_of_itself() -> None:
    info = _C.build_info()
    assert re.match(r"\w+ \d+", info["compiler"])
    assert info["openmp"] >= 201107
    assert "generic" in info["cpu_levels"]
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
    """Torch's own serves both, also once each has run on several threads."""
    script = """
import torch, re
from interformer_kernels import _C
torch.set_num_threads(2)
a = torch.randn(300, 300); a @ a; (torch.randn(1 << 20) + 1).sum()
from interformer_kernels._native import pma_pooling
k = torch.randn(20000, 2, 16)
offsets = torch.arange(101) * 200
pma_pooling.forward(k[:4], k, None, offsets, None, None, 1.0, 0, "softmax", 1.0, "multiply", "tanh", False)
with open("/proc/self/maps") as maps:
    print(*sorted(set(re.findall(r"/\\S*(?:gomp|iomp|omp5)\\S*", maps.read()))), sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 1, done.stdout
