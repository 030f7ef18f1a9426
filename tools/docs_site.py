"""Hooks of the site: pages that lie outside `docs/`, and the links between them.

Pages are written for a reader of the repository, whose links lead to files. On the site, a link to a page leads to the
page, and a link to a source file becomes its name.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Pages outside `docs/`, and where they are on the site.
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "bench/NOTES.md": "bench/notes.md",
    "python/interformer/configs/NOTES.md": "experiments.md",
    "tests/emulated/README.md": "emulation.md",
    **{f"bench/results/{page.name}": f"bench/results/{page.name}" for page in ROOT.glob("bench/results/*.md")},
}
INSIDE = {site: repository for repository, site in OUTSIDE.items()}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s#]+)(#[^)]*)?\)")
# GitHub begins a list right behind a paragraph, Python-Markdown behind an empty line alone.
LIST = re.compile(r"^(?!\s*(?:[-*|>]|\d+\.) |#|\s)(.+\n)(?=(?:- |1\. ))", re.MULTILINE)
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside `docs/`."""
    for repository, site in OUTSIDE.items():
        files.append(File.generated(config, site, content=(ROOT / repository).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links at pages of the site; names of files that are no pages stay as text."""
    site_path = page.file.src_uri
    source = INSIDE.get(site_path, f"docs/{site_path}")

    def link(match: re.Match[str]) -> str:
        picture, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        site = OUTSIDE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if site is None:
            return text if "`" in text else f"`{text}`"
        return f"{picture}[{text}]({posixpath.relpath(site, posixpath.dirname(site_path) or '.')}{anchor})"

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LIST.sub(r"\1\n", LINK.sub(link, part)) for part in parts)
