"""Plans of a batch's offsets: what they know, when they are refused, and that nothing stale is ever used."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch

import interformer_kernels as ik
from interformer_kernels._launch import plans
from interformer_kernels.testing import offsets_of


def test_a_plan_knows_its_rows_until_it_is_closed() -> None:
    offsets = offsets_of((3, 0, 40, 7))
    with ik.plan(offsets) as plan:
        assert (plan.rows, plan.tokens, plan.longest, plan.closed) == (4, 50, 40, False)
        facts = plans.facts_of(offsets)
        assert facts is plans.facts_of(offsets.view(-1)) is not None
        assert facts.lengths(45).tolist() == [3, 0, 40, 2]
        assert (facts.tail(45), facts.tail(61)) == (0, 11)
        # Another tensor, and a part of this one, are other offsets.
        assert plans.facts_of(torch.stack([offsets, offsets], 1)[:, 0]) is None
        assert plans.facts_of(offsets.clone()) is plans.facts_of(offsets[:3]) is plans.facts_of(offsets[::2]) is None
    assert plan.closed
    assert repr(plan) == "Plan(rows=4, tokens=50, longest=40, closed)"
    del facts
    assert plans.facts_of(offsets) is None
    assert ik.plan(offsets_of(())).longest == 0


def test_plans_of_the_same_offsets_share_what_they_know() -> None:
    offsets = offsets_of((3, 4))
    outer = ik.plan(offsets)
    facts = plans.facts_of(offsets)
    with ik.plan(offsets):
        assert plans.facts_of(offsets) is facts
    assert plans.facts_of(offsets) is facts
    del outer, facts
    gc.collect()
    assert plans.facts_of(offsets) is None


def test_the_offsets_live_as_long_as_the_plan() -> None:
    """So no other offsets can come to lie in their memory."""
    plan = ik.plan(offsets_of((3, 4)))
    assert plan._facts is not None
    assert not any(plans.facts_of(offsets_of((1, 6))) for _ in range(100))
    assert plans.facts_of(plan._facts.offsets) is plan._facts


def test_offsets_that_were_written_to_are_refused() -> None:
    offsets = offsets_of((3, 4))
    plan = ik.plan(offsets)
    offsets.view(-1)[1] = 2
    with pytest.raises(RuntimeError, match="were written to after"):
        plans.facts_of(offsets)
    # A new plan knows them as they are, whether or not the old one lives.
    new = ik.plan(offsets)
    facts = plans.facts_of(offsets)
    assert facts is not None
    assert facts.lengths(7).tolist() == [2, 5]
    assert (plan.longest, new.longest) == (4, 5)
    del facts
    new.close()
    assert plans.facts_of(offsets) is None
    plan.close()


@pytest.mark.parametrize(
    ("offsets", "error", "message"),
    [([0, 3], TypeError, "tensor"), (torch.tensor([0.0, 3.0]), TypeError, "int"),
     (torch.tensor([[0, 3]]), ValueError, "offsets"), (torch.tensor([], dtype=torch.int64), ValueError, "at least one"),
     (torch.tensor([0, 1, 2, 3])[::2], ValueError, "contiguous"),
     (torch.tensor([1, 3]), ValueError, "begin with 0"), (torch.tensor([0, 3, 2]), ValueError, "non-decreasing"),
     (torch.empty(3, dtype=torch.int64, device="meta"), TypeError, "contents"),
     (torch.nn.Parameter(torch.tensor([0, 3]), False), TypeError, "Parameter")],
    ids=str,
)  # fmt: skip
def test_what_is_no_batch_is_refused(offsets: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"plan: .*{message}"):
        ik.plan(offsets)
    assert not len(plans._facts)


def test_no_plan_of_inference_tensors() -> None:
    with torch.inference_mode():
        offsets = offsets_of((3, 4))
        with pytest.raises(ValueError, match="inference_mode"):
            ik.plan(offsets)
    offsets = offsets_of((3, 4))
    with torch.inference_mode():
        plan = ik.plan(offsets)
        assert plans.facts_of(offsets) is plan._facts


def test_no_plan_in_compiled_programs() -> None:
    def longest(offsets: torch.Tensor) -> int:
        return ik.plan(offsets).longest

    torch._dynamo.reset()
    with pytest.raises(Exception, match="make the plan outside"):
        torch.compile(longest, fullgraph=True, backend="eager")(offsets_of((3, 4)))
    torch._dynamo.reset()


def test_captured_graphs_use_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    offsets = offsets_of((3, 4))
    plan = ik.plan(offsets)
    monkeypatch.setattr(plans, "capturing", lambda x: True)
    assert plans.facts_of(offsets) is None
    with pytest.raises(RuntimeError, match="CUDA graph"):
        ik.plan(offsets)
    plan.close()


def test_plans_are_made_and_closed_by_many_threads() -> None:
    shared = offsets_of((3, 4))
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for length in range(1, 100):
                own = offsets_of((length, 1))
                with ik.plan(own) as plan, ik.plan(shared) as of_shared:
                    for offsets, made in ((own, plan), (shared, of_shared)):
                        facts = plans.facts_of(offsets)
                        assert facts is made._facts is not None
                        assert facts.kept("length", lambda: made.longest) == made.longest  # noqa: B023
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    gc.collect()
    assert plans.facts_of(shared) is None


def test_other_backends_serve_as_without_a_plan() -> None:
    x, offsets = torch.randn(7, 2, 8), offsets_of((3, 4))
    alone = ik.jagged_attention(x, x, x, offsets)
    with ik.plan(offsets):
        assert torch.equal(ik.jagged_attention(x, x, x, offsets), alone)
