"""Directories of real data sets, for the tests that need one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def real_data(folder: str, file: str) -> Path:
    """The directory of the data set called `folder`; skips the test if no directory holds a file like `file`.

    `INTERFORMER_DATA` names that directory, or one with `folder` in it.
    """
    named = os.environ.get("INTERFORMER_DATA")
    directory = Path(named) if named else Path(__file__).resolve().parents[3] / "shared" / "data"
    for place in (directory / folder, directory):
        if list(place.glob(file)):
            return place
    pytest.skip(f"no {file} in {directory / folder}; set INTERFORMER_DATA to its directory")
