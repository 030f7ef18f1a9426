"""`python -m interformer_bench.requests`: a model that reads a request once, against the ordinary form; and a server.

The first table has batches of requests of 100 candidates each: InterFormer with `shared="request"` beside the ordinary
form, which computes everything for every candidate. (They are two models, of the same sizes.) The second has a stream
of requests of returning users: states kept in a `UserCache`, against the same model that reads every request anew.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from interformer_bench import waiting

if TYPE_CHECKING:
    import torch
    from interformer import Batch, InterFormer

COLUMNS = (
    "histories", "requests x candidates", "pass", "shared", "ordinary", "impressions / s", "ratio", "spread",
    "memory, shared / ordinary",
)  # fmt: skip
STREAM_COLUMNS = ("threads", "states", "requests / s", "p50", "p99", "hits", "ratio")
CANDIDATES = 100
FORMS = "request", "none"  # of `InterFormerConfig.shared`
TRAINING, INFERENCE = "training step", "inference"
# Users of the stream, requests, and the chance that a user has new events since the last request.
_USERS, _REQUESTS, _NEWS = 200, 400, 0.3


class Case(NamedTuple):
    """A batch of requests and what is done with it."""

    law: str
    requests: int
    direction: str

    def __str__(self) -> str:
        return f"{self.law} x {self.requests}, {self.direction}"


def cases() -> list[Case]:
    """The cases of the first table."""
    laws = ("movielens", "completejourney")
    return [Case(law, n, what) for what, n in ((INFERENCE, 8), (TRAINING, 2)) for law in laws]


def make_batch(case: Case, data: Path | None) -> Batch:
    """Requests with histories of a distribution, each with its candidates."""
    import torch
    from interformer.testing import random_batch
    from interformer_bench.model.cases import SCHEMA
    from interformer_bench.shapes import length_distributions

    lengths = length_distributions(data)[case.law].lengths(case.requests)
    histories = random_batch(SCHEMA, lengths)
    rows = torch.arange(case.requests).repeat_interleave(CANDIDATES)
    candidates = random_batch(SCHEMA, (0,) * len(rows), seed=1)
    candidates.dense[:, 0], candidates.categorical[:, 0] = histories.dense[rows, 0], histories.categorical[rows, 0]
    return replace(candidates, sequences=histories.sequences, offsets=histories.offsets, rows=rows)


def make_model(shared: str) -> InterFormer:
    """A model of the size of the bench of models."""
    import torch
    from interformer import InterFormer
    from interformer_bench.model.cases import CONFIG, SCHEMA

    torch.manual_seed(0)
    return InterFormer(replace(CONFIG, shared=shared), SCHEMA)


def call(shared: str, batch: Batch, direction: str) -> Callable[[], object]:
    """A call of the pass; the ordinary form gets its histories repeated beforehand."""
    import torch
    import torch.nn.functional as F
    from interformer.train import TrainConfig, make_optimizer

    model = make_model(shared)
    batch = batch if shared == "request" else batch.unshared()
    if direction == INFERENCE:
        model.eval()
        return torch.no_grad()(lambda: model(batch))
    optimizer = make_optimizer(model, TrainConfig())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.binary_cross_entropy_with_logits(model(batch), batch.label).backward()
        optimizer.step()

    return step


def _measured(case: Case, chosen: argparse.Namespace) -> tuple[str, ...]:
    import torch
    from interformer_bench import memory, quiet, threads, timing

    batch = make_batch(case, chosen.data)
    calls = {form: call(form, batch, case.direction) for form in FORMS}
    found: dict[str, list[timing.Timing]] = {name: [] for name in calls}
    watch = quiet.Watch(chosen.threads)
    for count in threads.counts([1, chosen.threads]):
        torch.set_num_threads(count)
        run = functools.partial(timing.interleaved, calls, seconds=chosen.seconds, min_samples=1, patience=2.0)
        for name, x in watch.during(run).items():
            found[name].append(x)
    torch.set_num_threads(chosen.threads)
    ours, theirs = (min(found[name], key=lambda x: x.median) for name in calls)
    ratio = f"{theirs.median / ours.median:.1f}x" if watch.busy_since_last() is None else quiet.NO_RATIO
    data = ["--data", str(chosen.data)] if chosen.data else []
    peaks = [
        memory.of_child("requests", ["--peak", f"{case}: {name}", "--threads", str(chosen.threads), *data])
        for name in calls
    ]
    return (
        case.law, f"{case.requests} x {CANDIDATES}", case.direction, f"{ours.median * 1e3:.3g} ms",
        f"{theirs.median * 1e3:.3g} ms", f"{len(batch) / ours.median:.0f}", ratio,
        f"{100 * (ours.high - ours.low) / ours.median:.0f}%", " / ".join(peaks),
    )  # fmt: skip


def _print_peak(text: str, data: Path | None) -> None:
    from interformer_bench import memory

    name, form = text.split(": ")
    case = next(case for case in cases() if str(case) == name)
    run = call(form, make_batch(case, data), case.direction)
    call(form, make_batch(case._replace(requests=1), data), case.direction)()
    print(f"{memory.growth(run)[0] / 2**20:.0f} MiB")


# ---------------------------------------------------------------- a stream of requests


class Visit(NamedTuple):
    """A request: its user, the user's history, how many of its events are new since the last one, and candidates."""

    user: int
    sequences: torch.Tensor
    news: int
    candidates: tuple[torch.Tensor, torch.Tensor]


def visits(model: InterFormer, data: Path | None) -> list[Visit]:
    """Requests of users drawn by Zipf's law, whose histories are of The Complete Journey's lengths and grow."""
    import torch
    from interformer.testing import random_batch
    from interformer_bench.model.cases import SCHEMA
    from interformer_bench.shapes import length_distributions

    generator = torch.Generator().manual_seed(0)
    lengths = length_distributions(data)["completejourney"].lengths(_USERS)
    users = torch.multinomial(1 / torch.arange(1.0, _USERS + 1), _REQUESTS, replacement=True, generator=generator)
    new = torch.randint(1, 6, (_REQUESTS,), generator=generator) * (torch.rand(_REQUESTS, generator=generator) < _NEWS)
    pool = random_batch(SCHEMA, [length + int(new[users == user].sum()) for user, length in enumerate(lengths)])
    seen, made = list(lengths), []
    for i, (user, news) in enumerate(zip(users.tolist(), new.tolist(), strict=True)):
        news = min(news, int(pool.offsets[user + 1] - pool.offsets[user]) - seen[user])
        seen[user] += news
        first = int(pool.offsets[user])
        candidates = random_batch(SCHEMA, (0,) * CANDIDATES, seed=i)
        columns = model.embedding.candidate_inputs(candidates)  # type: ignore[operator, union-attr]
        made.append(Visit(user, pool.sequences[first : first + seen[user]], news, columns))
    return made


def serve(model: InterFormer, stream: Sequence[Visit], cached: bool) -> tuple[list[float], int]:
    """Seconds of each request, and how many were served from a state that was there."""
    import torch
    from interformer.serving import UserCache

    cache = UserCache(model.read_requests, max_bytes=1 << 40)
    seconds, hits = [], 0
    rows, dense, ids = torch.zeros(CANDIDATES, dtype=torch.int64), torch.zeros(1, 1), torch.zeros(1, 1).long()
    with torch.no_grad():
        for visit in stream:
            began = time.perf_counter()
            events, user = visit.sequences, [visit.user]
            if not cached:
                state = model.read_requests(dense, ids, events, torch.tensor([0, len(events)]))
            else:
                if visit.user not in cache:
                    cache.put(user, dense, ids, events, torch.tensor([0, len(events)]))
                elif visit.news:
                    cache.append(user, events[len(events) - visit.news :], torch.tensor([0, visit.news]))
                else:
                    hits += 1
                state = cache.get(user)
            model.score(state, *visit.candidates, rows)
            seconds.append(time.perf_counter() - began)
    return seconds, hits


def stream_table(chosen: argparse.Namespace) -> list[tuple[str, ...]]:
    """Requests per second, with and without kept states."""
    import torch
    from interformer_bench import quiet, threads

    model = make_model("request").eval()
    stream = visits(model, chosen.data)
    serve(model, stream[:20], cached=True)
    watch, table = quiet.Watch(chosen.threads), []
    for count in threads.counts([1, chosen.threads]):
        torch.set_num_threads(count)
        rates: list[float] = []
        for cached in (False, True):
            seconds, hits = watch.during(lambda cached=cached: serve(model, stream, cached))  # type: ignore[misc]
            rates.append(len(seconds) / sum(seconds))
            levels = statistics.quantiles(seconds, n=100)
            ratio = quiet.NO_RATIO if watch.busy_since_last() else f"{rates[-1] / rates[0]:.2f}x"
            table.append((
                str(count), "kept" if cached else "read anew", f"{rates[-1]:.1f}", f"{levels[49] * 1e3:.2f} ms",
                f"{levels[98] * 1e3:.2f} ms", f"{hits} of {len(seconds)}", ratio,
            ))  # fmt: skip
            print(" | ".join(table[-1]), flush=True)
    torch.set_num_threads(chosen.threads)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m interformer_bench.requests", description=__doc__)
    parser.add_argument("--case", action="append", metavar="TEXT", help="cases whose names contain TEXT")
    parser.add_argument("--no-stream", dest="stream", action="store_false", help="leave out the server")
    parser.add_argument("--data", type=Path, help="directory with the length files")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=3.0, help="about how long each call and pass is timed")
    parser.add_argument("--peak", metavar="CASE", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the tables there")
    chosen = parser.parse_args(arguments)
    if arguments is None and not chosen.peak:
        waiting.restart()
    import torch
    from interformer_bench import report

    from interformer_kernels._files import write_text

    torch.set_num_threads(chosen.threads)
    if chosen.peak:
        _print_peak(chosen.peak, chosen.data)
        return 0
    selected = [case for case in cases() if not chosen.case or any(text in str(case) for text in chosen.case)]
    table = []
    for case in selected:
        table.append(_measured(case, chosen))
        print(" | ".join(table[-1]), flush=True)
    head = f"{chosen.threads} threads, float32, kernels: {report.isa()}, torch {torch.__version__}. "
    text = f"{head}{waiting.described()}\n\n{report.rows(COLUMNS, table)}\n"
    if chosen.stream:
        text += f"\n{report.rows(STREAM_COLUMNS, stream_table(chosen))}\n"
    print(text)
    if chosen.out:
        write_text(chosen.out, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
