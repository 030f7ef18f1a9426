"""Mask functions of transformers, recognised by the functions that made them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import masking_utils

OPEN = (-1, -1)
Pattern = tuple[bool, tuple[int, int], Tensor | None, str]


def pattern_of(function: Callable[..., Any], length: int) -> Pattern:
    """`(causal, window, rows [B, L] of packed tokens or None, reason why the ops cannot serve it or "")` of a mask
    function.

    Mask functions are closures that answer only for single pairs. Transformers' own closures are recognised by the
    function that made them; all others cannot be served.
    """
    if function is masking_utils.causal_mask_function:
        return True, OPEN, None, ""
    if function is masking_utils.bidirectional_mask_function:
        return False, OPEN, None, ""
    parts = _parts(function)
    if len(parts) == 2:
        for overlay in (masking_utils.sliding_window_overlay, masking_utils.sliding_window_bidirectional_overlay):
            variables = closure_of(parts[0], overlay)
            if variables:
                causal, inner, rows, reason = pattern_of(parts[1], length)
                reason = reason or ("a window within a window" if inner != OPEN else "")
                return causal, _window(overlay, variables["sliding_window"], length), rows, reason
        remapped = closure_of(parts[0], masking_utils.remap_positions_for_packed_sequence)
        packed = closure_of(parts[1], masking_utils.packed_sequence_mask_function)
        if remapped and packed:
            causal, window, inner_rows, reason = pattern_of(remapped["mask_function"], length)
            reason = reason or ("packed rows within packed rows" if inner_rows is not None else "")
            return causal, window, packed["packed_sequence_mask"], reason
    return False, OPEN, None, "a mask of another form than causal, a window, bidirectional, padded or packed"


def _window(overlay: Callable[..., Any], size: int, length: int) -> tuple[int, int]:
    """The window of an overlay: it counts the query itself, or, on both sides, the farthest key."""
    if size >= length:
        return OPEN
    return (size - 1, -1) if overlay is masking_utils.sliding_window_overlay else (size, size)


def is_shift_invariant(function: Callable[..., Any]) -> bool:
    """Whether a mask function depends on distances and block ids only, so that a packed row is masked as if alone."""
    if function in (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function):
        return True
    overlays = masking_utils.sliding_window_overlay, masking_utils.sliding_window_bidirectional_overlay
    if any(closure_of(function, maker) for maker in (*overlays, masking_utils.blockwise_overlay)):
        return True
    parts = _parts(function) or closure_of(function, masking_utils.or_masks).get("mask_functions", ())
    return bool(parts) and all(is_shift_invariant(part) for part in parts)


def _parts(function: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    return tuple(closure_of(function, masking_utils.and_masks).get("mask_functions", ()))


def last_part(function: Callable[..., Any]) -> Callable[..., Any]:
    return (_parts(function) or (function,))[-1]


def closure_of(function: Callable[..., Any], maker: Callable[..., Any]) -> dict[str, Any]:
    """The closure variables, by name, of a function made by `maker`; empty for any other function."""
    name = getattr(function, "__qualname__", "")
    closure = getattr(function, "__closure__", None)
    if not name.startswith(f"{maker.__qualname__}.<locals>.") or not closure:
        return {}
    if function.__module__ != maker.__module__:
        return {}
    return {n: cell.cell_contents for n, cell in zip(function.__code__.co_freevars, closure, strict=True)}
