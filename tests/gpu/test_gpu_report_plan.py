"""The steps that the report plans for a machine, and their order."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_tools import ROOT, command, inside, plan, profiles, results, run

from interformer_kernels import _backend, testing

TOOLS = {name: f"/bin/{name}" for name in plan._TOOLS}
JOBS = {
    "interformer_bench.gpu": [
        {"name": "ceilings", "part": 1, "seconds": 10.0, "compiled": False},
        {"name": "jagged-104-bf16", "part": 1, "seconds": 15.0, "compiled": False},
        {"name": "jagged-54-bf16", "part": 2, "seconds": 15.0, "compiled": False},
        {"name": "jagged-104-bf16-compiled", "part": 2, "seconds": 60.0, "compiled": True},
    ],
    "interformer_bench.gpu_checks": [
        {"name": "large-batch.pma_pooling", "part": 1, "seconds": 12.0},
        {"name": "large-batch.apply_rotary", "part": 1, "seconds": 12.0},
        {"name": "graph-replay.pma_pooling", "part": 1, "seconds": 4.0},
        {"name": "compile.pma_pooling", "part": 2, "seconds": 25.0},
        {"name": "beyond-int32.pma_pooling", "part": 2, "seconds": 10.0},
        {"name": "beyond-int32.apply_rotary", "part": 2, "seconds": 10.0},
    ],
}


def first_results(reasons: dict[str, str] | None = None, native: Any = "no module") -> dict[str, Any]:
    """The results of the first steps; backends of `reasons` serve nothing."""
    reasons = reasons or {}
    machine = {"kind": "machine", "gpu": "NVIDIA H200", "capability": [9, 0]}
    backends = [
        {"kind": "backend", "backend": name, "native": native, "why_not": dict.fromkeys(testing.OPS, reasons.get(name))}
        for name in plan.BACKENDS
    ]
    jobs = [{"kind": "job", "program": program, "job": job} for program, listed in JOBS.items() for job in listed]
    records = {"machine": [machine], "backends": backends, "jobs": jobs}
    return {step: results.Try(step, "ok", records=records[step]) for step in records}


def planned(tools: dict[str, Any] | None = None, **options: Any) -> Any:
    return plan.Plan(Path("/out/results.jsonl"), tools=tools or TOOLS, tries=first_results(**options))


def names(stages: Iterable[Any]) -> list[str]:
    return [step.name for stage in stages for step in stage.steps]


def kinds(stages: Iterable[Any]) -> list[str]:
    """The kinds of the steps in order, each once."""
    return list(dict.fromkeys(name.partition("-")[0].partition(".")[0] for name in names(stages)))


def test_the_order_is_that_of_value() -> None:
    assert kinds(planned().stages(1)) == ["ceilings", "smoke", "checks1", "parity", "first", "jagged"]
    assert kinds(planned().stages(2)) == [
        *("parity", "checks1", "checks2", "determinism", "ncu", "memcheck", "racecheck", "beyond"),
        *("ceilings", "jagged", "tune"),
    ]  # fmt: skip
    second = names(planned().stages(2))
    assert second[-1] == "jagged-104-bf16-compiled"
    assert second.index("jagged-104-bf16") < second.index("jagged-54-bf16") < second.index("tune-forward")
    whole = names(planned().stages(None))
    assert sorted(whole) == sorted({*names(planned().stages(1)), *second})
    assert names(planned().stages(1)).count("ceilings") == 1


def test_a_part_fits_its_time() -> None:
    """Whatever is slow before the bench, a third of part 1 is the bench's; and the tables are written."""
    for part, seconds in plan.SECONDS.items():
        stages = planned().stages(part)
        assert all(stage.leave * seconds >= 9 for stage in stages)
    assert sum(plan.SECONDS[part] for part in (1, 2)) <= 900 - 2 * 120  # of 15 minutes, with two starts and transfers
    *before, bench = planned().stages(1)
    assert names([bench]) == ["jagged-104-bf16"]
    assert all(stage.leave * plan.SECONDS[1] > 110 for stage in before)


def test_checks_of_an_op_share_a_process_and_huge_ones_are_alone() -> None:
    steps = {step.name: step for stage in planned().stages(None) for step in stage.steps}
    step = steps["checks1.pma_pooling-cuda"]
    assert step.records == ("large-batch.pma_pooling", "graph-replay.pma_pooling")
    assert step.command.count("--only") == 2
    assert step.command[step.command.index("--backend") + 1] == step.backend == "cuda"
    assert step.command.count("--backend") == 1
    assert "checks1.apply_rotary-triton" in steps
    (stage,) = [stage for stage in planned().stages(2) if any(step.name.startswith("beyond") for step in stage.steps)]
    assert stage.workers == 1
    assert [step.name for step in stage.steps] == ["beyond-int32-triton", "beyond-int32-cuda"]
    assert stage.steps[0].records == ("beyond-int32.pma_pooling", "beyond-int32.apply_rotary")
    bench = steps["jagged-104-bf16"].command
    assert [bench[i + 1] for i, word in enumerate(bench) if word == "--backend"] == ["triton", "cuda"]


def test_what_is_missing_is_said() -> None:
    stages = planned(tools={**TOOLS, "ncu": None, "compute-sanitizer": None}, reasons={"cuda": "no module"}).stages(
        None
    )
    missing = {step.name: step.missing for stage in stages for step in stage.steps if step.missing}
    assert missing["ncu-triton"] == "ncu is not installed"
    assert missing["memcheck-triton"] == "compute-sanitizer is not installed"
    for step in ("smoke-cuda", "checks1.pma_pooling-cuda", "determinism-cuda", "racecheck-cuda", "ncu-cuda"):
        assert missing[step] == "no module"
    assert not [name for name in names(stages) if name.startswith("parity-cuda")]
    bench = next(step for stage in stages for step in stage.steps if step.name == "jagged-104-bf16").command
    assert [bench[i + 1] for i, word in enumerate(bench) if word == "--backend"] == ["triton"]


def test_the_native_module_is_built_where_it_is_missing_and_can_be() -> None:
    (step,) = planned().build().steps
    assert step.environment == {"TORCH_CUDA_ARCH_LIST": "9.0a"}
    assert step.missing is None
    (step,) = planned(tools={**TOOLS, "ninja": None}).build().steps
    assert step.missing == "ninja (to build the native module: no module)"
    assert not planned(native={"cuda_built": True}).build().steps


def test_memcheck_sees_every_allocation() -> None:
    steps = {step.name: step for stage in planned().stages(2) for step in stage.steps}
    for backend in plan.BACKENDS:
        assert steps[f"memcheck-{backend}"].environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert steps["racecheck-cuda"].command[:5] == (
        "/bin/compute-sanitizer",
        "--tool",
        "racecheck",
        "--error-exitcode",
        "1",
    )


def test_parity_leaves_no_case_out() -> None:
    commands = [step.command for stage in planned().stages(1) for step in stage.steps if step.name.startswith("parity")]
    parts_of: dict[tuple[str, str, str], set[str]] = {}
    for words in commands:
        options = dict(zip(words[4::2], words[5::2], strict=True))
        parts_of.setdefault((options["--backend"], options["--op"], options["--dtype"]), set()).add(options["--part"])
    assert set(parts_of) == {(b, op, d) for b in plan.BACKENDS for op in testing.OPS for d in plan.DTYPES}
    for parts in parts_of.values():
        assert parts == {f"{k}/{len(parts)}" for k in range(1, len(parts) + 1)}


def test_parity_is_planned_where_no_backend_was_asked() -> None:
    steps = names(plan.Plan(Path("/out/results.jsonl"), tools=TOOLS).stages(1))
    assert "parity-triton-jagged_attention-bfloat16-1of12" in steps
    assert "parity-cuda-pma_pooling-float32-1of1" in steps


@pytest.mark.parametrize("op", ["jagged_attention", "pma_pooling"])
def test_no_process_of_parity_compiles_more_than_60_kernels(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from resources import triton_kernels

    from interformer_kernels._cli.arguments import Part
    from interformer_kernels._triton import _run
    from interformer_kernels._triton._tiles import Target

    monkeypatch.setitem(_backend._DEVICES, "triton", "cpu")
    compiled = []
    for case in testing.cases(op):
        inputs = testing.make_inputs(case, torch.bfloat16)
        with _run.recording(Target("cuda", 90)) as launches:
            testing.evaluate(lambda: testing.call(op, inputs, "triton"), op, inputs)  # noqa: B023
        sources = [(launch, triton_kernels.source_of(launch)) for launch in launches if launch.grid]
        kernels = {
            (launch.kernel, repr(source.signature), repr(source.constants), repr(source.attrs), launch.tiles[2:])
            for launch, source in sources
        }
        compiled.append(kernels)
    parts = plan.PARITY_PARTS["triton"][op]
    counts = [len(set().union(*Part(k, parts).select(compiled))) for k in range(1, parts + 1)]
    assert 20 < max(counts) <= 60, counts
    assert len(set().union(*compiled)) > 60  # in one process they would be


def test_only_some_steps() -> None:
    chosen = command._chosen(planned().stages(2), ["memcheck-*", "tune-short"])
    assert names(chosen) == ["memcheck-triton", "memcheck-cuda", "tune-short"]


def test_steps_import_the_checkout_and_the_bench() -> None:
    environment = plan.environment({"PYTHONPATH": "/mine", "HOME": "/h"})
    paths = environment["PYTHONPATH"].split(":")
    assert paths[0] == str(ROOT)
    assert paths[-1] == "/mine"
    assert [path for path in paths if (Path(path) / "interformer_bench" / "gpu.py").exists()]
    assert environment["HOME"] == "/h"


def test_a_profile_is_read() -> None:
    table = """==PROF== Connected
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name"
"0","7","attend","GPU Speed Of Light Throughput","Duration","us","12.5",""
"0","7","attend","Occupancy","Registers","","136",""
"0","7","attend","Occupancy","","","","AchievedOccupancy"
"1","7","grad_keys","Occupancy","Registers","","250",""
"""
    assert profiles.metrics(table) == {
        "attend": {"GPU Speed Of Light Throughput: Duration [us]": "12.5", "Occupancy: Registers": "136"},
        "grad_keys": {"Occupancy: Registers": "250"},
    }
    assert profiles.metrics("no table") == {}
    command_line = profiles.profiling("ncu", "triton", Path("/out/x.ncu-rep"), ["python"])
    assert "regex:^(attention_forward|attention_grad_keys)$" in command_line
    assert command_line[-1] == "python"


def test_the_profiled_kernels_are_ours() -> None:
    source = ROOT / "interformer_kernels" / "_triton"
    triton = "".join(file.read_text() for file in source.glob("_attention*.py"))
    cuda = "".join(file.read_text() for file in (ROOT / "csrc" / "cuda").glob("*.cu"))
    for name in profiles.KERNELS["triton"]:
        assert f"def {name}(" in triton
    for name in profiles.KERNELS["cuda"]:
        assert f" {name}(const __grid_constant__" in cuda


def test_tuned_entries_are_in_the_table_of_tiles() -> None:
    pytest.importorskip("triton")
    from interformer_kernels._triton import _tiles

    assert set(plan._TUNED) <= set(_tiles.TABLE)


def test_what_needs_torch_leaves_a_line_for_each_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing, "OPS", ("apply_rotary",))
    file = tmp_path / results.FILE
    for program in ("machine", "backends", "smoke", "first", "small", "determinism"):
        arguments = [program, "--device", "cpu", "--results", str(file), "--step", f"{program}-1", "--backend", "cuda"]
        assert inside.main(arguments) == 0
    records, damaged = results.read(file)
    assert damaged == 0
    counts = {
        step: sum(record["step"] == step for record in records) for step in (record["step"] for record in records)
    }
    assert counts == {
        "machine-1": 1, "backends-1": 2, "smoke-1": 2, "first-1": 1, "small-1": 1, "determinism-1": 3
    }  # fmt: skip
    assert all(record["ok"] for record in records if record["kind"] in ("smoke", "determinism"))
    monkeypatch.setattr(testing, "compare", lambda *call, **options: [testing.Row("out", 2.0, 1.0)])
    assert inside.main(["smoke", "--device", "cpu", "--results", str(file), "--step", "smoke-2"]) == 1
    last = results.read(file)[0][-1]
    assert (last["ok"], last["share"], last["problem"]) == (False, 2.0, "beyond the error budget")


def test_a_step_that_only_ends_well_has_not_found_anything() -> None:
    assert all(step.finds for stage in planned().stages(None) for step in stage.steps)
    assert isinstance(planned().look().steps[0], run.Step)
