"""The CUDA kernels as built for every device: no arrays in local memory, tensor cores exactly where they are claimed.

Registers that spill and all warnings are errors of the build itself. Skipped where the CUDA part is not built.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from interformer_kernels import _backend

sys.path.append(str(Path(__file__).parents[2] / "tools"))

from resources import cuda_kernels
from resources.cuda_kernels import Usage

module = _backend.native()
built = pytest.mark.skipif(
    module is None or not module.build_info()["cuda_built"], reason="the native module has no CUDA part"
)


@built
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kernels_fit_every_device() -> None:
    assert module is not None
    try:
        cuda_kernels.tool("cuobjdump")
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    usages = cuda_kernels.usages(str(module.__file__))
    targets = {
        name.removesuffix("-real") for name in module.build_info()["cuda_architectures"] if "virtual" not in name
    }
    assert {usage.target.removeprefix("sm_") for usage in usages} == targets
    assert {usage.kernel.split("<")[0] for usage in usages} >= {"rotate_rows", "row_products", "row_weight_gradients"}
    assert not [usage for usage in usages if not usage.fits]


def test_what_does_not_fit_is_seen() -> None:
    """A stack, products without tensor cores, and tensor cores where float32 shall be exact."""
    assert Usage("row_products<BFloat16, true>", "sm_80", 255, 0, 8).fits
    assert Usage("row_products<float, true>", "sm_80", 64, 0, 0).fits
    assert Usage("rotate_rows<Float16, 8, true>", "sm_80", 64, 0, 0).fits
    assert not Usage("row_products<BFloat16, true>", "sm_80", 64, 8, 8).fits
    assert not Usage("row_products<Float16, true>", "sm_80", 64, 0, 0).fits
    assert not Usage("row_products<float, true>", "sm_80", 64, 0, 8).fits


def test_names_are_readable() -> None:
    mangled = "_ZN11interformer4cuda12row_productsINS_7Float16ELb1EEEvNS0_7ProductIT_EENS0_7OffsetsE"
    assert cuda_kernels.readable([mangled]) == {mangled: "row_products<Float16, true>"}


def test_without_a_cuda_part_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "native", lambda: None)
    assert cuda_kernels.main([]) == 0
    assert capsys.readouterr().err.startswith("no CUDA part to look at: ")
