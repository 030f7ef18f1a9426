"""The exported model: one program that scores any number of impressions, from a file, as the model does."""

from __future__ import annotations

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
LENGTHS = ((5,), (0,), (1,), (0, 0, 0), (1, 0), (2, 9, 4), (7, 0, 3, 1, 12))
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "cpu": {"backend": "cpu"},
    "without CLS": {"cls": False},
    "gdpa": {"pffn": "gdpa"},
    "two layers": {"pffn": "two_layer", "num_layers": 2},
    "literal, learned tokens": {"literal": True, "num_layers": 2, "flow": "s2n"},
    "products of seeds": {"pool_seeds": 6},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_program_scores_as_its_model(form: str, tmp_path: Path) -> None:
    """Single rows, no histories and single events among them, all from one file."""
    torch.manual_seed(0)
    model = InterFormer(replace(CONFIG, **FORMS[form]), SCHEMA).eval()
    torch.export.save(export(model, SCHEMA), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for lengths in LENGTHS:
        batch = random_batch(SCHEMA, lengths, seed=len(lengths))
        with torch.no_grad():
            expected = model(batch)
        found = program(batch.dense, batch.categorical, batch.sequences, batch.offsets)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_model_in_training_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model must be in eval\(\)"):
        export(InterFormer(CONFIG, SCHEMA), SCHEMA)
