"""`python -m interformer_bench.requests`: a model that reads a request once, against the ordinary form; and a server.

The first table has batches of requests of 100 candidates each: InterFormer with `shared="request"` beside the ordinary
form, which computes everything for every candidate. (They are two models, of the same sizes.) The second has a stream
of requests of returning users: states kept in a `UserCache`, against the same model that reads every request anew.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from interformer_bench import single, waiting

if TYPE_CHECKING:
    import torch
    from interformer import Batch, InterFormer
    from interformer_bench import quiet

COLUMNS = (
    "histories", "requests x candidates", "pass", "shared", "ordinary", "impressions / s", "ratio", "spread",
    "memory, shared / ordinary",
)  # fmt: skip
STREAM_COLUMNS = ("threads", "states", "requests / s", "p50", "p99", "hits", "ratio")
CANDIDATES = 100
FORMS = "request", "none"  # of `InterFormerConfig.shared`
TRAINING, INFERENCE = "training step", "inference"  # as the bench of models calls them
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
    from interformer_bench.model.contenders import Contender, runner

    model = make_model(shared)
    return runner(Contender(model, model, batch if shared == "request" else batch.unshared()), direction)


def measure(chosen: argparse.Namespace, selected: Sequence[Case], watch: quiet.Watch) -> list[tuple[str, ...]]:
    """The rows of the first table."""
    from interformer_bench import contest, memory, quiet

    table: list[tuple[str, ...]] = []
    for case in selected:
        batch = make_batch(case, chosen.data)
        calls = {form: call(form, batch, case.direction) for form in FORMS}
        times = watch.during(
            lambda calls=calls: contest.best_times(  # type: ignore[misc]
                calls, chosen.threads, chosen.seconds, min_samples=1, patience=2.0
            )
        )
        ours, theirs = (times[form] for form in FORMS)
        ratio = f"{theirs.median / ours.median:.1f}x" if watch.busy_since_last() is None else quiet.NO_RATIO
        peaks = [memory.of_child("requests", single.child_options(chosen, f"{case}: {form}")) for form in FORMS]
        table.append((
            case.law, f"{case.requests} x {CANDIDATES}", case.direction, f"{ours.median * 1e3:.3g} ms",
            f"{theirs.median * 1e3:.3g} ms", f"{len(batch) / ours.median:.0f}", ratio, contest.spread(ours),
            " / ".join(peaks),
        ))  # fmt: skip
        single.show(table[-1])
    return table


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


def stream_table(chosen: argparse.Namespace, watch: quiet.Watch) -> list[tuple[str, ...]]:
    """Requests per second, with and without kept states."""
    import torch
    from interformer_bench import quiet, threads

    model = make_model("request").eval()
    stream = visits(model, chosen.data)
    serve(model, stream[:20], cached=True)
    table = []
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
            single.show(table[-1])
    torch.set_num_threads(chosen.threads)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = single.parser("requests", __doc__, seconds=3.0)
    parser.add_argument("--no-stream", dest="stream", action="store_false", help="leave out the server")
    parser.add_argument("--peak", metavar="LINE", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if arguments is None and not chosen.peak:
        waiting.restart()
    import torch
    from interformer_bench import quiet, report

    torch.set_num_threads(chosen.threads)
    if chosen.peak:
        _print_peak(chosen.peak, chosen.data)
        return 0
    watch = quiet.Watch(chosen.threads)
    tables = [report.rows(COLUMNS, measure(chosen, single.named(cases(), chosen.line), watch))]
    if chosen.stream:
        tables.append(report.rows(STREAM_COLUMNS, stream_table(chosen, watch)))
    return single.finish(chosen, "\n\n".join((single.head(chosen.threads, watch, "float32, "), *tables)) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
