"""`interformer-kernels demo`: what is here, is it right, how fast is it, and InterFormer trained on clicks with it.

Writes one picture of speed and parity, and the numbers behind it as JSON. Needs the extras `bench` and `train`:
`pip install 'interformer-kernels[bench,train]'`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from interformer_kernels._cli import info, parity
from interformer_kernels._cli.arguments import count
from interformer_kernels._cli.tables import heading, print_table, status_line
from interformer_kernels._files import check_writable

_NEEDED = ("interformer_bench", "interformer", "filelock", "matplotlib", "numpy", "rich", "sklearn")
# Real histories, long and short; a demo is not a bench.
_LAWS = ("movielens", "beauty")
_SECONDS_PER_SHAPE = 0.8
# Two draws of a case are enough for a demo: `interformer-kernels parity` takes as many as judging each quantity needs.
_MOST_DRAWS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    parser.add_argument(
        "--data", type=Path, help="directory of MovieLens-100k to train on (synthetic clicks where left out)"
    )
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where the picture and the JSON files go")
    parser.add_argument("--epochs", type=count, default=None, help="of the training; its own default where left out")


def run(arguments: argparse.Namespace) -> int:
    """Run the four parts in order; returns 1 where parity is broken or the training fails."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"demo needs {', '.join(missing)}: pip install 'interformer-kernels[bench,train]'", file=sys.stderr)
        return 1
    if arguments.own_process:
        from interformer_bench import waiting

        waiting.restart()
    start = time.perf_counter()
    check_writable(arguments.out / "parity.json")
    heading("What is here")
    info.show(info.collect())
    heading("Is it right")
    kernels = parity.Selection(backends=parity.serving()[1:] or None)
    results = list(parity.compare(kernels, _MOST_DRAWS, log=status_line))
    status = parity.show(results)
    parity.write_json(arguments.out / "parity.json", results)
    heading("How fast is it")
    status |= _speed(arguments, results)
    heading("InterFormer on clicks")
    status |= _train(arguments)
    heading(f"Done in {time.perf_counter() - start:.0f} s: see {arguments.out}/demo.png")
    return status


def _speed(arguments: argparse.Namespace, results: list[parity.Result]) -> int:
    # The bench is a package of its own, above this one: only the demo reaches up to it, and only when run.
    from interformer_bench import grid, peers, plots, progress, quiet, report, shapes, timing
    from interformer_bench import run as bench

    cases = grid.shapes(shapes.length_distributions(arguments.data), names=_LAWS)
    threads = torch.get_num_threads()
    machine, watch = timing.Machine(), quiet.Watch(threads)
    with progress.shown() as shown:
        settings = bench.Settings(("float32",), "cpu", (threads,), _SECONDS_PER_SHAPE, compiled=False, progress=shown)
        measured = list(bench.measure(cases, settings, machine, watch))
    bench_report = report.Report(measured, machine.rates(), checks=watch.checks)
    print(report.head(bench_report))
    for op, lines in report.by_op(bench_report).items():
        print_table(f"{op}; ratio above 1: faster than the best peer", report.COLUMNS, lines)
    print("\n".join([report.rates(bench_report.machine), *report.problems(bench_report.measurements)]))
    report.write_json(arguments.out / "speed.json", bench_report)
    drawn = plots.results_of(bench_report.measurements, bench_report.machine)
    kernels = [result for result in parity.worst(results) if result.backend != "reference"]
    machine_and_version = f"this machine, float32, {threads} threads, torch {torch.__version__}"
    title = ", ".join([machine_and_version, *plots.busy_note(measured)])
    plots.speed(arguments.out / "demo.png", drawn, kernels, title=title)
    wrong = any(m.problem and m.runner == peers.OURS for m in bench_report.measurements)
    return 1 if wrong else 0


def _train(arguments: argparse.Namespace) -> int:
    """`python -m interformer train` in a process of its own, as a user runs it; prints the AUC that it reports."""
    target = arguments.out / "training.json"
    command = [sys.executable, "-m", "interformer", "train", "--json", str(target)]
    if arguments.data:
        command += ["--data", str(arguments.data)]
    if arguments.epochs is not None:
        command += ["--epochs", str(arguments.epochs)]
    print("$", " ".join(["python", *command[1:]]), flush=True)
    target.unlink(missing_ok=True)
    from interformer_bench import waiting

    # Threads sleep for the sake of comparisons alone: a user's training is left as it is.
    environment = {name: value for name, value in os.environ.items() if name not in waiting.ENVIRONMENT}
    status = subprocess.run(command, env=environment).returncode
    if status:
        print(f"the training ended with status {status}", file=sys.stderr)
        return 1
    report = json.loads(target.read_text())
    columns = ("part", *report["test"])
    parts = [(part, *(f"{value:.4f}" for value in report[part].values())) for part in ("valid", "test")]
    print_table(f"Held-out clicks of {report['data']['name']}, best of {len(report['history'])} epochs", columns, parts)
    return 0
