"""Fixtures of all tests: uninitialised memory is NaN, algorithms are deterministic, contents are validated."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch

import interformer_kernels
from interformer_kernels.nn import _notices

_LENIENT = {
    "deadline": None,
    "suppress_health_check": [hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
}
hypothesis.settings.register_profile("short", max_examples=60, derandomize=True, **_LENIENT)
hypothesis.settings.register_profile("fuzz", max_examples=int(os.environ.get("EXAMPLES", "10000")), **_LENIENT)
hypothesis.settings.load_profile("short")


@pytest.fixture(autouse=True)
def _strict_torch() -> Iterator[None]:
    """`torch.empty` yields NaN (so an output that a kernel forgets to write shows) and seeds are fixed.

    One thread is used, because the calls are tiny, and the idle threads of parallel test runs would spin on each
    other's cores. Tests of threading set their own number.
    """
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _default_validation() -> Iterator[None]:
    """Every test starts and ends with the default validation."""
    previous = interformer_kernels.set_validation("default")
    yield
    interformer_kernels.set_validation(previous)


@pytest.fixture
def notices(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings logged during the test, including those that earlier tests have already triggered."""
    _notices._warn.cache_clear()
    caplog.set_level(logging.WARNING, logger="interformer_kernels")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "interformer_kernels"]
