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

from filelock import FileLock, Timeout

from interformer.checkpoint import differences
from interformer.experiments.plan import Plan, Variant
from interformer.files import DamagedFileError, is_in_work, read_sealed, write_sealed

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
            try:
                found = differences(read_sealed(path).get("identity"), self.identity)
            except FileNotFoundError:
                continue
            except DamagedFileError as error:
                return str(error)
            return f"{path}: {'; '.join(found)}" if found else None
        return None

    def lock(self) -> FileLock:
        """Held by the process that runs this job: another one waits, and then finds it finished or goes on with it."""
        path = self.unfinished("lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path)

    def write(self) -> None:
        """Leave its identity beside its checkpoint, for whoever comes with another one of this name."""
        content = {"name": self.name, "folder": str(self.folder), "identity": self.identity}
        write_sealed(self.unfinished("json"), content)

    def finish(self, report: Mapping[str, Any], facts: Mapping[str, float]) -> None:
        """Leave the report, and nothing else."""
        write_sealed(self.result, {"identity": self.identity, "report": dict(report), "facts": dict(facts)})
        self.forget_unfinished()

    def forget(self) -> None:
        """Remove whatever there is of a run of this name.

        Raises:
            ValueError: another process is running it.
        """
        try:
            with self.lock().acquire(timeout=0):
                self.result.unlink(missing_ok=True)
                self._remove(keep="lock")
        except Timeout as error:
            raise ValueError(f"{self.unfinished('json')}: another process is running it: wait, or stop it") from error

    def forget_unfinished(self) -> None:
        """Remove what goes on with a run that is finished, its lock too: whoever waits for that finds the result."""
        self._remove()

    def _remove(self, keep: str | None = None) -> None:
        folder = self.unfinished("json").parent
        for path in list(folder.iterdir()) if folder.exists() else ():
            if path.name.startswith(f"{self.name}.") and path != self.unfinished(keep or "") and not is_in_work(path):
                path.unlink(missing_ok=True)  # also what a kill in the middle of a write left


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
