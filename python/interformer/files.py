"""Atomic writes of files and sealed JSON, from `interformer_kernels._files`."""

from interformer_kernels._files import (
    DamagedFileError,
    check_writable,
    is_being_written,
    naming,
    read_sealed,
    replacing,
    to_json,
    write_sealed,
    write_text,
)

__all__ = [
    "DamagedFileError",
    "check_writable",
    "is_being_written",
    "naming",
    "read_sealed",
    "replacing",
    "to_json",
    "write_sealed",
    "write_text",
]
