"""The two trees: this one with its uncommitted changes, and another git ref in its own folder under `build/compare`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import interformer_kernels

# The part of an installed tree that is kept: the other tree's bench would hide ours.
_KEPT_PACKAGE = "interformer_kernels"


class RefusedError(Exception):
    """The reason why nothing can be compared, for the user."""


@dataclass(frozen=True)
class Tree:
    """The folder that `interformer_kernels` is imported from, and its name in the report."""

    path: Path
    name: str


def _git(root: Path, *arguments: str) -> str:
    completed = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    if completed.returncode:
        raise RefusedError(f"git {' '.join(arguments)}: {completed.stderr.strip() or f'status {completed.returncode}'}")
    return completed.stdout.strip()


def current() -> Tree:
    """The checkout that this package is imported from."""
    root = Path(interformer_kernels.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        raise RefusedError(f"interformer_kernels comes from {root}, which is no git checkout: pip install -e one")
    dirty = " with uncommitted changes, as it lies" if _git(root, "status", "--porcelain") else ""
    return Tree(root, f"this tree ({_git(root, 'rev-parse', '--short', 'HEAD')}{dirty})")


def commit_of(root: Path, ref: str) -> str:
    """The commit that a ref names."""
    try:
        return _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    except RefusedError as error:
        raise RefusedError(f"git knows no commit named {ref!r} in {root}") from error


def at_ref(root: Path, ref: str, say: Callable[[str], None]) -> Tree:
    """The tree of another ref; it is built if it was not built before."""
    commit = commit_of(root, ref)
    place = root / "build" / "compare" / f"{commit[:12]}-{sys.implementation.cache_tag}"
    name = f"{ref} ({commit[:7]})"
    site = place / "site"
    if not site.exists():
        say(f"building {name} in {place}")
        try:
            _install(root, commit, place)
        except RefusedError as error:
            raise RefusedError(f"{name}: {error}") from error
    return Tree(site, name)


def _install(root: Path, commit: str, place: Path) -> None:
    """Check out the commit and install it to `place/site`, which exists only when it is complete."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    checkout, partial = place / "tree", place / "partial"
    _git(
        root, "worktree", "add", "--force", "--detach", str(checkout), commit
    )  # forced: an interrupted run may be there
    try:
        _pip(checkout, partial, place.with_suffix(".log"))
    finally:
        _git(root, "worktree", "remove", "--force", str(checkout))
    for entry in partial.iterdir():
        if not entry.name.startswith(_KEPT_PACKAGE):
            shutil.rmtree(entry)
    partial.rename(place / "site")


def _pip(source: Path, target: Path, log: Path) -> None:
    """Install a tree by pip with its native module for the CPU; pip's output goes to a log."""
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps"]
    environment = {"INTERFORMER_CUDA": "0", **os.environ}
    with log.open("w") as file:
        completed = subprocess.run(
            [*command, "--target", str(target), str(source)], stdout=file, stderr=subprocess.STDOUT, env=environment
        )
    if completed.returncode:
        last = "\n".join(log.read_text(errors="replace").strip().splitlines()[-5:])
        raise RefusedError(f"it does not build (all of its output: {log}):\n{last}")
