"""Sizes as `torch.compile` and `torch.export` see them."""

from __future__ import annotations

from typing import Any

import torch


def any_number(size: int) -> int:
    """`size`, of which the compiler shall not ask whether it is 1.

    A size that is an argument's own is taken for 2 at least, and a graph for such sizes serves 0 and 1 as well. One
    that is computed from it, as a number of rows `offsets.shape[0] - 1`, may be 1 as far as the compiler sees, and its
    questions about strides become guards: a graph that refuses a single row. Here those of its questions that have an
    answer which is right for any size (`guard_or_false`) get that one. PyTorch has a switch for it, but for all sizes
    of the process (`backed_size_oblivious`).
    """
    if isinstance(size, torch.SymInt) and (env := size.node.shape_env) is not None:
        if not hasattr(env, "_interformer_any_number"):
            env._interformer_any_number = set()
            ask = env.evaluate_sym_node

            def evaluate(node: Any, size_oblivious: bool = False, fallback_value: bool | None = None) -> Any:
                if fallback_value is not None and node.expr.free_symbols & env._interformer_any_number:
                    known = env._maybe_evaluate_static(node.expr)
                    return fallback_value if known is None else bool(known)
                return ask(node, size_oblivious, fallback_value)

            env.evaluate_sym_node = evaluate
        env._interformer_any_number |= size.node.expr.free_symbols
    return size


def is_one(size: int) -> bool:
    """Whether an axis has one place; one of any size, in an exported program, has not, even where it will be 1."""
    if not isinstance(size, torch.SymInt):
        return size == 1
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # takes long to import, and is there by now

    return guard_or_false(size == 1)
