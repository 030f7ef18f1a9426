"""Exit of all commands: an error that a user can cause is one line on standard error, with exit status 2.

These are the errors raised explicitly by these packages, errors of the system (files, disks, permissions), and lack of
memory. Everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import dis
import os
import sys
from collections.abc import Callable
from types import TracebackType

import torch

_PACKAGES = ("interformer", "interformer_kernels", "interformer_bench")
_USER_ERRORS = (ValueError, TypeError, RuntimeError, LookupError)
_MAX_LINE = 1000
_RAISE = dis.opmap["RAISE_VARARGS"]
# PyTorch's messages for a failed allocation on the CPU.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")


def guarded(command: Callable[[], int]) -> int:
    """The exit status of `command`; 2, with one line on standard error, for errors that a user can cause."""
    try:
        status = command()
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # The reader (`| head`) has closed the pipe; the flush at exit must not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        line = one_line_error(error)
        if line is None:
            raise
        print(line, file=sys.stderr)
        return 2


def one_line_error(error: Exception) -> str | None:
    """The error as one line for the user; None if it is a bug."""
    message = " ".join(str(error).split())
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in message for text in _NO_MEMORY):
        message = f"not enough memory for these sizes: {message}"
    elif not isinstance(error, OSError) and not (
        isinstance(error, _USER_ERRORS) and _raised_by_us(error.__traceback__)
    ):
        return None
    line = f"{type(error).__name__}: {message}"
    return line if len(line) <= _MAX_LINE else f"{line[: _MAX_LINE - 4]} ..."


def _raised_by_us(trace: TracebackType | None) -> bool:
    """Whether the error comes from a `raise` statement in these packages, not from a call or operation that failed."""
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    name = trace.tb_frame.f_globals.get("__name__", "")
    in_our_package = name.partition(".")[0] in _PACKAGES
    return in_our_package and trace.tb_frame.f_code.co_code[trace.tb_lasti] == _RAISE
