"""The two trees: this one as it lies, and another git ref built in a place of its own under `build/compare`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import interformer_kernels

# What stays of an installed tree: the bench of the other one would hide ours.
_KEPT = "interformer_kernels"


class RefusedError(Exception):
    """Why there is nothing to compare, in words for whoever asked."""


@dataclass(frozen=True)
class Tree:
    """A place that `interformer_kernels` is imported from, and what it holds, in words."""

    path: Path
    name: str


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RefusedError(f"git {' '.join(arguments)}: {done.stderr.strip() or f'status {done.returncode}'}")
    return done.stdout.strip()


def this() -> Tree:
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


def other(root: Path, ref: str, say: Callable[[str], None]) -> Tree:
    """The tree of another ref, built where it was not before."""
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
    """Check the commit out, install it to `place/site`, leave nothing else; `site` is there only when it is whole."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    checkout, partial = place / "tree", place / "partial"
    _git(root, "worktree", "add", "--force", "--detach", str(checkout), commit)  # also where one was cut off before
    try:
        _pip(checkout, partial, place.with_suffix(".log"))
    finally:
        _git(root, "worktree", "remove", "--force", str(checkout))
    for entry in partial.iterdir():
        if not entry.name.startswith(_KEPT):
            shutil.rmtree(entry)
    partial.rename(place / "site")


def _pip(source: Path, target: Path, log: Path) -> None:
    """Install a tree by pip, with its own native module for the CPU; what it says is kept in a log."""
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps"]
    environment = {"INTERFORMER_CUDA": "0", **os.environ}
    with log.open("w") as file:
        done = subprocess.run(
            [*command, "--target", str(target), str(source)], stdout=file, stderr=subprocess.STDOUT, env=environment
        )
    if done.returncode:
        last = "\n".join(log.read_text(errors="replace").strip().splitlines()[-5:])
        raise RefusedError(f"it does not build (all that was said: {log}):\n{last}")
