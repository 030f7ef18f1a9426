"""Print the requirements of the site, the extra `docs` of pyproject.toml, one a line.

Installing the extra itself would install torch, and build this package.
"""

from __future__ import annotations

import re
from pathlib import Path

# Python 3.10 has no tomllib.
TEXT = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
EXTRA = re.search(r"^docs = \[(.*?)\]$", TEXT, re.MULTILINE | re.DOTALL)

if EXTRA is None:
    raise SystemExit("pyproject.toml: wanted an extra `docs`, found none")
print("\n".join(re.findall(r'"([^"]+)"', EXTRA[1])))
