"""Files that are written whole or not at all: `interformer_kernels`' own, by the names that this package uses."""

from interformer_kernels._files import (
    DamagedFileError,
    is_in_work,
    naming,
    read_sealed,
    replacing,
    to_json,
    want_writable,
    write_sealed,
    write_text,
)

__all__ = [
    "DamagedFileError",
    "is_in_work",
    "naming",
    "read_sealed",
    "replacing",
    "to_json",
    "want_writable",
    "write_sealed",
    "write_text",
]
