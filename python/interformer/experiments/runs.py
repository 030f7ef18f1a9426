"""One run of a grid on disk: its identity, its state and its report.

OUT/NAME/runs/<variant>-seed<k>.json         a finished run: its identity and its report
OUT/NAME/unfinished/<variant>-seed<k>.*      a running or killed run: its job, its checkpoint, its log
OUT/NAME/tune/...                            the same for `--tune`
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
from interformer.files import DamagedFileError, is_being_written, read_sealed, write_sealed

FORMAT = 1


@dataclass(frozen=True)
class Machine:
    """The device and the number of threads, on which a run's step time depends."""

    device: str = "cpu"
    threads: int = 1


@dataclass(frozen=True)
class Job:
    """A run: its name, the folder of the experiment, and its identity, which holds all that determines its result."""

    name: str
    folder: Path
    identity: Mapping[str, Any]

    @property
    def result(self) -> Path:
        return self.folder / "runs" / f"{self.name}.json"

    def unfinished(self, ending: str) -> Path:
        """A file that exists until the run is finished: `json` (the job), `pt` (the checkpoint), `log` or `lock`."""
        return self.folder / "unfinished" / f"{self.name}.{ending}"

    def finished(self) -> bool:
        return self.result.exists()

    def conflict(self) -> str | None:
        """The differences of a run on disk with this name, finished or not, from this run; None if there are none."""
        for path in (self.result, self.unfinished("json")):
            try:
                different = differences(read_sealed(path).get("identity"), self.identity)
            except FileNotFoundError:
                continue
            except DamagedFileError as error:
                return str(error)
            return f"{path}: {'; '.join(different)}" if different else None
        return None

    def lock(self) -> FileLock:
        """The lock held by the process that runs this job; the next holder finds it finished, or resumes it."""
        path = self.unfinished("lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path)

    def write(self) -> None:
        """Write its identity beside its checkpoint, so that `conflict` detects another job of this name."""
        content = {"name": self.name, "folder": str(self.folder), "identity": self.identity}
        write_sealed(self.unfinished("json"), content)

    def finish(self, report: Mapping[str, Any], facts: Mapping[str, float]) -> None:
        """Write the report, and remove all other files."""
        write_sealed(self.result, {"identity": self.identity, "report": dict(report), "facts": dict(facts)})
        self.forget_unfinished()

    def forget(self) -> None:
        """Remove all files of a run of this name.

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
        """Remove the files of an unfinished run, also the lock: a process that waits for it then finds the result."""
        self._remove()

    def _remove(self, keep: str | None = None) -> None:
        folder = self.unfinished("json").parent
        for path in list(folder.iterdir()) if folder.exists() else ():
            if (
                path.name.startswith(f"{self.name}.")
                and path != self.unfinished(keep or "")
                and not is_being_written(path)
            ):
                path.unlink(missing_ok=True)  # This includes temporary files of killed writers.


def jobs_of(
    plan: Plan,
    variants: Iterable[Variant],
    folder: Path,
    machine: Machine,
    *,
    clicks: Mapping[str, int] | None,
    measure_test: bool = True,
) -> list[Job]:
    """A job for each variant and each of its seeds; `clicks` are the sizes of the data's parts."""
    jobs = []
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
            # The round trip through JSON makes it comparable with an identity read from a file.
            jobs.append(Job(f"{variant.name}-seed{seed}", folder, json.loads(json.dumps(identity))))
    return jobs


def versions() -> dict[str, str]:
    """Versions of the packages that influence a result."""
    torch_version = version("torch")
    try:
        kernels_version = version("interformer-kernels")
    except PackageNotFoundError:
        kernels_version = "not installed"
    return {"torch": torch_version, "interformer-kernels": kernels_version}
