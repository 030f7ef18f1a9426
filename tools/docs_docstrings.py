"""Docstrings as Markdown for the site: they are written with Sphinx's directives, which `help()` shows as they are."""

from __future__ import annotations

import re
from typing import Any

import griffe
from latex2mathml.converter import convert

# A formula goes on to the next empty line.
MATH = re.compile(r"^\.\. math:: *(.*?)(?=\n[ ]*\n|\Z)", re.MULTILINE | re.DOTALL)
ROLE = re.compile(r":(?:func|class|meth|mod):`~?([^`]+)`")
LITERAL = re.compile(r"::$", re.MULTILINE)


def to_markdown(text: str) -> str:
    """Formulas become MathML, which browsers draw without a script; roles become code."""
    text = MATH.sub(lambda match: _formula(" ".join(match[1].split())), text)
    return LITERAL.sub(":", ROLE.sub(r"`\1`", text))


def _formula(latex: str) -> str:
    return f'<div class="formula">{convert(latex, display="block")}</div>'


class Markdown(griffe.Extension):
    """Rewrites the docstring of every object that is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once for each object."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
