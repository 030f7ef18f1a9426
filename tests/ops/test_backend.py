"""Choice of backend, validation levels, autocast, and rules that hold for every call."""

from __future__ import annotations

import logging

import pytest
import torch
from grid import backends

import interformer_kernels as ik
from interformer_kernels import _backend, _checks, testing
from interformer_kernels.testing import Case, offsets_of


@pytest.mark.parametrize("op", testing.OPS)
@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_a_named_backend_serves_or_says_why_not(op: str, backend: str) -> None:
    inputs = testing.make_inputs(Case(op, "", rope=4), torch.float32)
    if backend in backends(op):
        assert testing.call(op, inputs, backend)[0].isfinite().any()
        return
    with pytest.raises(RuntimeError, match=f"{op}: backend '{backend}' cannot serve: ") as caught:
        testing.call(op, inputs, backend)
    assert str(caught.value).endswith(_backend.unsupported_reason(op, backend, "cpu", torch.float32) or "?")


def test_a_missing_native_module_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "_load_native", lambda: (None, "the native module cannot be imported: planted"))
    _backend.choose.cache_clear()
    _backend.kernels.cache_clear()
    try:
        k = torch.randn(4, 1, 4)
        with pytest.raises(RuntimeError, match="planted"):
            ik.pma_pooling(k[:1], k, None, offsets_of((4,)), backend="cpu")
        assert ik.pma_pooling(k[:1], k, None, offsets_of((4,))).shape == (1, 1, 1, 4)
        with pytest.raises(ValueError, match=r"offsets\[1\] must be at most 4"):
            ik.pma_pooling(k[:1], k, None, offsets_of((5,)))
    finally:
        _backend.choose.cache_clear()
        _backend.kernels.cache_clear()


class _Built:
    """A native module, as far as the choice of backends looks at it."""

    def __init__(self, cuda_built: bool) -> None:
        self.info = {"cuda_built": cuda_built, "cuda": "left out by INTERFORMER_CUDA=0"}

    def build_info(self) -> dict[str, object]:
        return self.info


@pytest.mark.parametrize(
    ("cuda_built", "hip", "capability", "reason"),
    [
        (False, None, (9, 0), "the native module has no CUDA part: left out by INTERFORMER_CUDA=0"),
        (True, "6.2", (9, 0), "it serves GPUs of NVIDIA, and this torch is for those of AMD"),
        (True, None, (7, 5), "it serves GPUs of compute capability 8.0 and above, found 7.5"),
        (True, None, (8, 0), None),
    ],
)
def test_why_the_cuda_kernels_cannot_serve(
    cuda_built: bool, hip: str | None, capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_backend, "_load_native", lambda: (_Built(cuda_built), ""))
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert _backend.unsupported_reason("apply_rotary", "cuda", "cuda", torch.bfloat16) == reason


@pytest.mark.parametrize("op", ["jagged_attention", "gated_cross_attention", "pma_pooling"])
def test_heads_beyond_a_backend(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unnamed, it is passed over for one that serves them; named, it says why it cannot. The CPU stands for its GPU."""
    monkeypatch.setitem(_backend._DEVICES, "cuda", "cpu")
    monkeypatch.setitem(_backend._PREFERENCE, "cpu", ("cuda", "reference"))
    monkeypatch.setattr(_backend, "_cuda_missing", lambda: None)
    _backend.choose.cache_clear()
    _backend.kernels.cache_clear()
    try:
        assert _backend.choose(op, "cpu", torch.float32, 256) == "cuda"
        for sizes in ({"head_size": 257}, {"value_size": 300}):
            inputs = testing.make_inputs(Case(op, "", lengths=(3, 2), tail=0, **sizes), torch.float32)
            assert testing.call(op, inputs, None)[0].isfinite().all()
            wanted = f"heads of at most 256 channels, found {max(sizes.values())}"
            with pytest.raises(RuntimeError, match=f"{op}: backend 'cuda' cannot serve: it serves {wanted}"):
                testing.call(op, inputs, "cuda")
    finally:
        _backend.choose.cache_clear()
        _backend.kernels.cache_clear()


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    _backend.choose.cache_clear()
    _backend.kernels.cache_clear()
    x = torch.randn(3, 4)
    with caplog.at_level(logging.INFO, logger="interformer_kernels"):
        for _ in range(3):
            ik.personalized_ffn(x, torch.randn(1, 4, 4), offsets_of((3,)))
    assert len(caplog.records) == 1
    assert "personalized_ffn on cpu with torch.float32: backend" in caplog.text


def test_validation_levels() -> None:
    k = torch.randn(4, 1, 4)
    bad = torch.tensor([0, 9])
    with pytest.raises(ValueError, match=r"pma_pooling: offsets\[1\] must be at most 4, the number of tokens, found 9"):
        ik.pma_pooling(k[:1], k, None, bad)
    assert ik.set_validation("off") == "default"
    for backend in backends("pma_pooling"):
        clamped = ik.pma_pooling(k[:1], k, None, bad, backend=backend)
        torch.testing.assert_close(clamped, ik.pma_pooling(k[:1], k, None, torch.tensor([0, 4]), backend=backend))
    assert ik.set_validation("full") == "off"
    with pytest.raises(ValueError, match="offsets"):
        ik.pma_pooling(k[:1], k, None, bad)
    with pytest.raises(ValueError, match="level must be one of off, default, full; found 'some'"):
        ik.set_validation("some")


@pytest.mark.parametrize("offsets", [[0, 2, 4], [1, 2], [0, 3, 2], [0, -1, 2], [0, 5], [0]], ids=str)
def test_both_offset_scans_agree(offsets: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The native scan and the PyTorch one find the same first fault."""
    tensors = [torch.tensor(offsets, dtype=dtype) for dtype in (torch.int32, torch.int64)]
    found = {_checks.first_bad_offset(x, 4) for x in tensors}
    monkeypatch.setattr(_backend, "_load_native", lambda: (None, "blocked"))
    found |= {_checks.first_bad_offset(x, 4) for x in tensors}
    assert len(found) == 1


@pytest.mark.parametrize("op", testing.OPS)
def test_autocast_casts_floating_inputs(op: str) -> None:
    inputs = testing.make_inputs(Case(op, "", gate="full", residual=op != "apply_rotary", rope=4), torch.float32)
    wanted, _ = testing.call(op, testing.cast_inputs(inputs, torch.bfloat16), "reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = testing.call(op, inputs, "reference")
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7))
    found.backward(inputs["grad_out"].to(torch.bfloat16))
    lead = inputs[testing.DIFFERENTIABLE[op][0]]
    assert lead.grad is not None
    assert lead.grad.dtype == torch.float32


def test_autocast_accepts_mixed_dtypes_and_leaves_float64() -> None:
    q = torch.randn(4, 1, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ik.jagged_attention(q, q.bfloat16(), q, offsets_of((4,)), gate=q).dtype == torch.bfloat16
        assert ik.jagged_attention(q.double(), q.double(), q.double(), offsets_of((4,))).dtype == torch.float64


@pytest.mark.parametrize("op", testing.OPS)
def test_more_than_65535_rows(op: str) -> None:
    """Two tokens a row: every row has the result that it has alone."""
    rows = 65540
    for backend in backends(op):
        case = Case(
            op, "", lengths=(2,) * rows, tail=0, heads=1, kv_heads=1, head_size=4, value_size=4, queries=1, rope=4
        )
        inputs = testing.make_inputs(case, torch.float32)
        with torch.no_grad():
            out, _ = testing.call(op, inputs, backend)
        per_row = out.shape[0] // rows
        for b in (0, 65535, 65536, rows - 1):
            alone = dict(inputs)
            for name, x in inputs.items():
                if isinstance(x, torch.Tensor) and x.is_floating_point() and name != "seeds":
                    size = x.shape[0] // rows
                    alone[name] = x[b * size : (b + 1) * size]
            for name in ("offsets", "kv_offsets"):
                if name in inputs:
                    alone[name] = offsets_of((2,))
            with torch.no_grad():
                single, _ = testing.call(op, alone, backend)
            torch.testing.assert_close(out[b * per_row : (b + 1) * per_row], single)


@pytest.mark.parametrize("backend", backends("pma_pooling"))
def test_strided_inputs_are_read_in_place(backend: str) -> None:
    """Slices of one packed projection give what their copies give."""
    packed = torch.randn(9, 3, 2, 8)
    _, k, v = packed.unbind(1)
    offsets, seeds = offsets_of((4, 5)), torch.randn(2, 2, 8)
    found = ik.pma_pooling(seeds, k, v, offsets, backend=backend)
    assert torch.equal(found, ik.pma_pooling(seeds, k.contiguous(), v.contiguous(), offsets, backend=backend))
    last_axis_strided = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(found, ik.pma_pooling(seeds, last_axis_strided, v, offsets, backend=backend))
