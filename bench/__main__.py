"""`python -m interformer_bench`: the speed table on named shapes; `--markdown FILE` writes it as in the README."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from interformer_bench import peers, report, run, shapes, timing

from interformer_kernels._cli.tables import print_table, status_line


def main(arguments: list[str] | None = None) -> int:
    laws = shapes.laws()
    parser = argparse.ArgumentParser(prog="python -m interformer_bench", description=__doc__)
    parser.add_argument("--op", action="append", choices=peers.OPS, help="may be repeated; all where left out")
    parser.add_argument("--law", action="append", choices=list(laws), help="may be repeated; all where left out")
    parser.add_argument("--data", type=Path, help="directory with the length files")
    parser.add_argument("--rows", type=int, help="rows of a batch; with 2, the cost of a call shows")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=3.0, help="about how long each (shape, pass) is timed")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help='"-" prints it')
    parser.add_argument("--plot", type=Path, metavar="FILE")
    chosen = parser.parse_args(arguments)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    dtype = getattr(torch, chosen.dtype)
    names, ops = chosen.law or list(laws), chosen.op or peers.OPS
    cases = run.default_shapes(shapes.laws(chosen.data), names, ops, chosen.rows)
    measured = list(run.measure(cases, dtype, chosen.device, chosen.seconds, status_line))
    machine = timing.machine(dtype, chosen.device)
    if chosen.markdown == Path("-"):
        print(report.markdown(measured, machine))
    else:
        print_table(f"{chosen.dtype} on {chosen.device}", report.COLUMNS, report.table(measured))
        print("\n".join([report.rates(machine), *report.problems(measured)]))
    if chosen.markdown not in (None, Path("-")):
        chosen.markdown.parent.mkdir(parents=True, exist_ok=True)
        chosen.markdown.write_text(report.markdown(measured, machine))
    if chosen.json:
        report.write_json(chosen.json, measured, machine)
    if chosen.plot:
        report.plot(chosen.plot, measured)
    return 1 if any(one.problem and one.runner == peers.OURS for one in measured) else 0


if __name__ == "__main__":
    raise SystemExit(main())
