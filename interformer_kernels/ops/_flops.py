"""FLOP formulas for `torch.utils.flop_counter`, there before its first counter is made.

Importing that module imports Triton, so this one does not: it waits for whoever does. A counter copies the table of
formulas when it is made, so what the first call of an op would register came too late for that call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar

COUNTER = "torch.utils.flop_counter"


def register(packet: Any, formula: Callable[..., int]) -> None:
    """Register `formula(*args, out_val=None, **kwargs)` of a registered op, now or once the counter is imported."""
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
    _AfterImport.formulas.append((packet, formula))
    if COUNTER in sys.modules:
        _register_in(sys.modules[COUNTER], packet, formula)


def _register_in(module: ModuleType, packet: Any, formula: Callable[..., int]) -> None:
    if packet not in module.flop_registry:
        module.register_flop_formula(packet, get_raw=True)(formula)


class _AfterImport(MetaPathFinder):
    """Finds the counter's module where the other finders do, and registers the formulas when it has been run.

    It stays in `sys.meta_path`: another thread may be going through that list.
    """

    formulas: ClassVar[list[tuple[Any, Callable[..., int]]]] = []

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                self._register_after(spec.loader)
                return spec
        return None

    def _register_after(self, loader: Any) -> None:
        run = loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            for packet, formula in self.formulas:
                _register_in(module, packet, formula)

        loader.exec_module = run_and_register
