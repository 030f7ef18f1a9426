"""The exported model: one program, loaded from a file, that scores any number of impressions like the model."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interformer import InterFormer, InterFormerConfig
from interformer.export import export
from interformer.testing import random_batch, small_schema

SCHEMA = small_schema()
CONFIG = InterFormerConfig(
    embed_dim=8, num_heads=2, num_layers=1, interaction_hidden=(12,), pffn_hidden=(6,), head_hidden=(8,), max_history=40
)
LENGTHS = ((), (5,), (0,), (1,), (0, 0, 0), (1, 0), (2, 9, 4), (7, 0, 3, 1, 12))
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "cpu": {"backend": "cpu"},
    "without CLS": {"cls": False},
    "gdpa": {"pffn": "gdpa"},
    "two layers": {"pffn": "two_layer", "num_layers": 2},
    "literal, learned tokens": {"literal": True, "num_layers": 2, "flow": "s2n"},
    "folded seeds": {"num_seeds": 1},
    "folded seeds, mab": {"num_seeds": 1, "pma": "mab"},
    "products of seeds": {"pool_seeds": 6},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_program_scores_as_its_model(form: str, tmp_path: Path) -> None:
    """One file serves all sizes, including single rows, empty histories and single events."""
    torch.manual_seed(0)
    model = InterFormer(replace(CONFIG, **FORMS[form]), SCHEMA).eval()
    torch.export.save(export(model, SCHEMA), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for lengths in LENGTHS:
        batch = random_batch(SCHEMA, lengths, seed=len(lengths))
        with torch.no_grad():
            expected = model(batch)
        actual = program(batch.dense, batch.categorical, batch.sequences, batch.offsets)
        # An eager model folds projections in one call of the native module, a program in several ops.
        exact = {} if "folded seeds" in form else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(actual, expected, **exact)


SERVER = """
import sys, torch, interformer_kernels
program = torch.export.load(sys.argv[1]).module()
torch.save(program(*torch.load(sys.argv[2])), sys.argv[3])
assert not any(name.split(".")[0] == "interformer" for name in sys.modules)
"""


def test_a_server_needs_the_operations_alone(tmp_path: Path) -> None:
    model, batch = InterFormer(CONFIG, SCHEMA).eval(), random_batch(SCHEMA, (4,))
    files = [str(tmp_path / name) for name in ("model.pt2", "inputs.pt", "logits.pt")]
    torch.export.save(export(model, SCHEMA), files[0])
    torch.save((batch.dense, batch.categorical, batch.sequences, batch.offsets), files[1])
    subprocess.run([sys.executable, "-c", SERVER, *files], check=True)
    torch.testing.assert_close(torch.load(files[2]), model(batch).detach())


def test_a_model_in_training_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model must be in eval\(\)"):
        export(InterFormer(CONFIG, SCHEMA), SCHEMA)
