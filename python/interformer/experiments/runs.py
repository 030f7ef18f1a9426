"""One run of a grid on disk: what it is, whether it is finished, and what it brought.

OUT/NAME/runs/<variant>-seed<k>.json         a finished run: its identity and its report
OUT/NAME/unfinished/<variant>-seed<k>.*      one that goes on or was killed: its job, its checkpoint, its log
OUT/NAME/tune/...                            the same of `--tune`
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from interformer.experiments.plan import Plan, Variant
from interformer.files import to_json, write_text
from interformer.train import differences

FORMAT = 1


@dataclass(frozen=True)
class Machine:
    """What a run's step time hangs on."""

    device: str = "cpu"
    threads: int = 1


@dataclass(frozen=True)
class Job:
    """A run: its name, the folder of the experiment, and its identity: all that its result follows from."""

    name: str
    folder: Path
    identity: Mapping[str, Any]

    @property
    def result(self) -> Path:
        return self.folder / "runs" / f"{self.name}.json"

    def unfinished(self, ending: str) -> Path:
        """A file that is there until the run is finished: `json` (the job), `pt` (the checkpoint), `log`."""
        return self.folder / "unfinished" / f"{self.name}.{ending}"

    def finished(self) -> bool:
        return self.result.exists()

    def conflict(self) -> str | None:
        """How a run of this name that is on disk, finished or not, differs from this one; None where it does not."""
        for path in (self.result, self.unfinished("json")):
            if path.exists():
                found = differences(read_json(path).get("identity"), self.identity)
                return f"{path}: {'; '.join(found)}" if found else None
        return None

    def write(self) -> None:
        """Leave the job where its process reads it."""
        content = {"name": self.name, "folder": str(self.folder), "identity": self.identity}
        write_text(self.unfinished("json"), to_json(content))

    @classmethod
    def load(cls, path: Path) -> Job:
        content = read_json(path)
        return cls(content["name"], Path(content["folder"]), content["identity"])

    def finish(self, report: Mapping[str, Any], facts: Mapping[str, float]) -> None:
        """Leave the report, and nothing else."""
        write_text(self.result, to_json({"identity": self.identity, "report": report, "facts": dict(facts)}))
        self.forget_unfinished()

    def forget(self) -> None:
        """Remove whatever there is of a run of this name."""
        self.result.unlink(missing_ok=True)
        self.forget_unfinished()

    def forget_unfinished(self) -> None:
        folder = self.unfinished("json").parent
        for path in folder.iterdir() if folder.exists() else ():
            if path.name.startswith(f"{self.name}."):  # also what a kill in the middle of a write left
                path.unlink()


def jobs_of(
    plan: Plan,
    variants: Iterable[Variant],
    folder: Path,
    machine: Machine,
    *,
    clicks: Mapping[str, int] | None,
    measure_test: bool = True,
) -> list[Job]:
    """A job for each variant under each of its seeds; `clicks` are the sizes of the data's parts."""
    found = []
    for variant in variants:
        for seed in variant.seeds:
            identity = {
                "format": FORMAT,
                "kind": variant.kind,
                "model": variant.model.to_dict(),
                "training": asdict(replace(variant.training, seed=seed)),
                "data": {**plan.data, "clicks": clicks},
                "measure_test": measure_test,
                "machine": asdict(machine),
                "versions": versions(),
            }
            # Through JSON, so that it compares equal to what is read back.
            found.append(Job(f"{variant.name}-seed{seed}", folder, json.loads(json.dumps(identity))))
    return found


def versions() -> dict[str, str]:
    """Of the packages that a result follows from."""
    found = {"torch": version("torch")}
    try:
        found["interformer-kernels"] = version("interformer-kernels")
    except PackageNotFoundError:
        found["interformer-kernels"] = "not installed"
    return found


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: wanted JSON, found {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: wanted what a run wrote, found {content!r}")
    return content
