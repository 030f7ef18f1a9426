"""A model served in two halves: programs of both, and users kept between requests."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from interformer import Batch, InterFormer
from interformer.export import export_score, export_user
from interformer.serving import UserCache
from interformer.shared import RequestState
from test_interformer_shared import SCHEMA, SHARED, made, requests
from torch import Tensor

USERS = ("ann", "bo", "cy", "di")


def inputs_of(model: InterFormer, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (*model.embedding.request_inputs(batch), batch.sequences, batch.offsets)


def tensors(state: RequestState) -> list[Tensor]:
    return [*state.keys_values, *state.summaries, state.offsets]


def scored(model: InterFormer, state: RequestState, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model.score(state, *model.embedding.candidate_inputs(batch), batch.request_of_each())


@pytest.fixture
def model() -> InterFormer:
    return made().float().eval()


@pytest.fixture
def cache(model: InterFormer) -> UserCache:
    cache = UserCache(model.read_requests, max_bytes=1 << 20)
    cache.put(USERS, *inputs_of(model, requests()))
    return cache


SERVER = """
import sys, torch, interformer_kernels
user, score = (torch.export.load(path).module() for path in sys.argv[1:3])
requests, candidates = torch.load(sys.argv[3])
torch.save(score(*user(*requests), *candidates), sys.argv[4])
assert not any(name.split(".")[0] == "interformer" for name in sys.modules)
"""


def test_two_programs_score_as_the_model(model: InterFormer, tmp_path: Path) -> None:
    """For any number of requests, candidates and events, and in a process that does not know this package."""
    paths = [str(tmp_path / name) for name in ("user.pt2", "score.pt2", "inputs.pt", "logits.pt")]
    torch.export.save(export_user(model), paths[0])
    torch.export.save(export_score(model), paths[1])
    user, score = (torch.export.load(path).module() for path in paths[:2])
    for rows in ((2, 0, 2, 1, 3, 2, 0, 2), (0, 1, 2, 3), (3, 2, 1, 0), (1,)):
        batch = requests(rows) if len(rows) > 1 else requests((0, 1, 2, 3))
        state = user(*inputs_of(model, batch))
        candidates = (*model.embedding.candidate_inputs(batch), batch.request_of_each())
        if len(rows) == 1:
            candidates = tuple(x[:1] for x in candidates)
        with torch.no_grad():
            wanted = model(batch)[: len(rows)]
        torch.testing.assert_close(score(*state, *candidates), wanted, rtol=1e-6, atol=1e-6)
    batch = requests()
    candidates = (*model.embedding.candidate_inputs(batch), batch.request_of_each())
    torch.save((inputs_of(model, batch), candidates), paths[2])
    subprocess.run([sys.executable, "-c", SERVER, *paths], check=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(paths[3]), model(batch), rtol=1e-6, atol=1e-6)


def test_halves_of_other_models_are_refused(model: InterFormer) -> None:
    with pytest.raises(ValueError, match=r"export_user: model must be in eval\(\)"):
        export_user(model.train())
    ordinary = InterFormer(replace(SHARED, shared="none"), SCHEMA).eval()
    with pytest.raises(ValueError, match="export_score: model must have config.shared 'request'"):
        export_score(ordinary)


def test_what_is_read_is_what_was_computed(model: InterFormer, cache: UserCache) -> None:
    """Bit for bit, in any order and number; one user is read without a copy."""
    batch = requests()
    with torch.no_grad():
        state = model.read_requests(*inputs_of(model, batch))
        wanted = model(batch)
    for found, expected in zip(tensors(cache.get(USERS)), tensors(state), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(scored(model, cache.get(USERS), batch), wanted)
    one, again = cache.get(["cy"]), cache.get(["cy"])
    assert one.keys_values[0].data_ptr() == again.keys_values[0].data_ptr()
    start, end = state.offsets[2:4].tolist()
    assert torch.equal(one.keys_values[1], state.keys_values[1][start:end])
    swapped = cache.get(["di", "ann"])
    assert torch.equal(swapped.summaries[-1], state.summaries[-1][[3, 0]])
    assert swapped.offsets.tolist() == [0, 5, 12]


def test_appended_events_are_computed_anew(model: InterFormer, cache: UserCache) -> None:
    longer = requests(seed=2)
    dense, categorical, sequences, offsets = inputs_of(model, longer)
    fresh = UserCache(model.read_requests, max_bytes=1 << 20)
    short = torch.cat(
        [sequences[: offsets[1] - 1], sequences[offsets[1] : offsets[2]], sequences[offsets[2] : offsets[3] - 2]]
    )
    fresh.put(USERS[:3], dense[:3], categorical[:3], short, torch.tensor([0, 2, 2, 17]))
    events = torch.cat((sequences[offsets[1] - 1 : offsets[1]], sequences[offsets[3] - 2 : offsets[3]]))
    fresh.append(["ann", "cy"], events, torch.tensor([0, 1, 3]))
    recomputed = UserCache(model.read_requests, max_bytes=1 << 20)
    recomputed.put(["ann", "cy"], dense[[0, 2]], categorical[[0, 2]], sequences, torch.tensor([0, 3, 20]))
    for found, expected in zip(tensors(fresh.get(["ann", "cy"])), tensors(recomputed.get(["ann", "cy"])), strict=True):
        assert torch.equal(found, expected)
    with pytest.raises(KeyError, match="user 'eve' is not held"):
        fresh.append(["eve"], events, torch.tensor([0, 3]))


def test_the_budget_holds_the_users_used_last(model: InterFormer, cache: UserCache) -> None:
    inputs = inputs_of(model, requests())
    sizes = {}
    for i, user in enumerate(USERS):
        alone = UserCache(model.read_requests, max_bytes=1 << 20)
        dense, categorical, sequences, offsets = inputs
        start, end = offsets[i : i + 2].tolist()
        alone.put(
            [user], dense[i : i + 1], categorical[i : i + 1], sequences[start:end], torch.tensor([0, end - start])
        )
        sizes[user] = alone.bytes
    assert cache.bytes == sum(sizes.values())
    tight = UserCache(model.read_requests, max_bytes=sum(sizes.values()) - 1)
    tight.put(USERS, *inputs)
    assert "ann" not in tight
    assert len(tight) == 3
    tight.get(["bo"])
    dense, categorical, sequences, _ = inputs
    tight.put(["ann"], dense[:1], categorical[:1], sequences[:3], torch.tensor([0, 3]))
    assert "cy" not in tight
    assert tight.bytes == sizes["ann"] + sizes["bo"] + sizes["di"]
    tight.evict("di")
    assert tight.bytes == sizes["ann"] + sizes["bo"]
    with pytest.raises(KeyError, match="user 'cy' is not held: it was never put, or evicted"):
        tight.get(["ann", "cy"])
    with pytest.raises(ValueError, match="max_bytes must hold a user, user 'ann' of"):
        UserCache(model.read_requests, max_bytes=10).put(
            ["ann"], dense[:1], categorical[:1], sequences[:3], torch.tensor([0, 3])
        )


def test_a_refused_call_changes_nothing(model: InterFormer, cache: UserCache) -> None:
    """Not even the users that would have fitted."""
    dense, categorical, sequences, offsets = inputs_of(model, requests())
    alone = UserCache(model.read_requests, max_bytes=1 << 20)
    alone.put(["bo"], dense[1:2], categorical[1:2], sequences[3:3], torch.tensor([0, 0]))
    tight = UserCache(model.read_requests, max_bytes=alone.bytes + 10)
    with pytest.raises(ValueError, match="max_bytes must hold a user, user 'cy' of"):
        tight.put(["bo", "cy"], dense[1:3], categorical[1:3], sequences[3:20], torch.tensor([0, 0, 17]))
    assert (len(tight), tight.bytes) == (0, 0)
    before = cache.bytes
    cache.append([], sequences[:0], torch.tensor([0]))
    with pytest.raises(TypeError, match="users must be keys, such as users.tolist"):
        cache.put(torch.arange(4), dense, categorical, sequences, offsets)  # type: ignore[arg-type]
    assert cache.bytes == before


def test_half_the_bytes(model: InterFormer, cache: UserCache) -> None:
    narrow = UserCache(model.read_requests, max_bytes=1 << 20, dtype=torch.bfloat16)
    narrow.put(USERS, *inputs_of(model, requests()))
    ids = sum(x.nbytes for user in narrow._users.values() for x in user[:3])
    assert 2 * (narrow.bytes - ids) == cache.bytes - ids
    state, batch = narrow.get(USERS), requests()
    assert {x.dtype for x in tensors(state)[:-1]} == {torch.float32}
    torch.testing.assert_close(scored(model, state, batch), scored(model, cache.get(USERS), batch), rtol=0, atol=0.05)


def test_the_latest_events_are_kept(model: InterFormer) -> None:
    dense, categorical, sequences, offsets = inputs_of(model, requests())
    kept, wanted = (UserCache(model.read_requests, max_bytes=1 << 20, max_history=n) for n in (5, None))
    kept.put(USERS, dense, categorical, sequences, offsets)
    parts = [sequences[max(start, end - 5) : end] for start, end in pairwise(offsets.tolist())]
    wanted.put(USERS, dense, categorical, torch.cat(parts), torch.tensor([0, 3, 3, 8, 9]))
    for found, expected in zip(tensors(kept.get(USERS)), tensors(wanted.get(USERS)), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("users", [("ann", "ann", "cy", "di"), ("ann", "bo")])
def test_users_and_rows_must_agree(model: InterFormer, users: tuple[str, ...]) -> None:
    cache = UserCache(model.read_requests, max_bytes=1 << 20)
    with pytest.raises(ValueError, match=r"users must be 4 different keys \(from offsets\)"):
        cache.put(users, *inputs_of(model, requests()))


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"max_bytes": -1}, "max_bytes"), ({"max_bytes": 1, "dtype": torch.int8}, "dtype must be a floating one"),
     ({"max_bytes": 1, "max_history": -1}, "max_history")],
)  # fmt: skip
def test_settings_out_of_range(model: InterFormer, settings: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        UserCache(model.read_requests, **settings)
