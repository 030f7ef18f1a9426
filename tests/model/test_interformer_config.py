"""Errors of the model's and the schema's settings."""

from __future__ import annotations

import json
from typing import Any

import pytest
from interformer import Field, InterFormerConfig, Schema
from interformer.testing import small_schema


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"embed_dim": 0}, ValueError, "embed_dim must be at least 1, found 0"),
        ({"num_layers": 2.0}, TypeError, "num_layers must be an int, found 2.0"),
        ({"num_cls": True}, TypeError, "num_cls must be an int, found True"),
        ({"num_seeds": -1}, ValueError, "num_seeds must be at least 0, found -1"),
        ({"backbone_layers": 4}, ValueError, "backbone_layers must be 1 to 3, found 4"),
        ({"backbone": "dot", "backbone_layers": 2}, ValueError, "must be 1 for the dot backbone, found 2"),
        ({"backbone": "din"}, ValueError, "backbone must be one of dot, dcnv2, dhen; found 'din'"),
        ({"pffn": "gdpb"}, ValueError, "pffn must be one of mlp, rank, two_layer, gdpa, none; found 'gdpb'"),
        ({"gate": "tanh"}, ValueError, "gate must be one of self_identity, .*; found 'tanh'"),
        ({"mask_output": "relu"}, ValueError, "mask_output must be one of identity, sigmoid, none; found 'relu'"),
        ({"backend": "numpy"}, ValueError, "backend must be one of reference, .*; found 'numpy'"),
        ({"embed_dim": 12, "num_heads": 4}, ValueError, r"multiple of 2 \* num_heads; found embed_dim=12, num_heads=4"),
        ({"head_hidden": [8]}, TypeError, r"head_hidden must be a tuple of ints, found \[8\]"),
        ({"pffn_hidden": (8, 0)}, ValueError, r"pffn_hidden\[1\] must be at least 1, found 0"),
        ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), found 1.0"),
        ({"embedding_dropout": "no"}, TypeError, "embedding_dropout must be a number, found 'no'"),
        ({"rope_base": 0.5}, ValueError, r"rope_base must lie in \[1, inf\), found 0.5"),
        ({"literal": 1}, TypeError, "literal must be a bool, found 1"),
        ({"cls": None}, TypeError, "cls must be a bool, found None"),
        ({"flow": "both"}, ValueError, "flow must be one of int, n2s, s2n, sep, sole; found 'both'"),
        ({"summary": "max"}, ValueError, "summary must be one of selective, mean, mlp, mha; found 'max'"),
        ({"pma": "isab"}, ValueError, "pma must be one of bare, mab; found 'isab'"),
        ({"pool_seeds": 4, "num_seeds": 0}, ValueError, r"pool_seeds must be 0 without PMA \(num_seeds=0\), found 4"),
        ({"window": (3,)}, ValueError, r"window must be empty or \(left, right\), found \(3,\)"),
        ({"window": (3, -1)}, ValueError, r"window\[1\] must be at least 0, found -1"),
        ({"event_fields": ["item"]}, TypeError, r"event_fields must be a tuple of names, found \['item'\]"),
        ({"pffn_tau": 0.0}, ValueError, "pffn_tau must lie in .*, found 0.0"),
        ({"cls": False, "num_seeds": 0, "num_recent": 0}, ValueError, "summary 'selective' must have cls, num_seeds"),
        ({"literal": True, "num_layers": 1, "flow": "sep"}, ValueError, "flow must not be 'sep' for literal"),
        ({"cls": False, "pffn": "none"}, ValueError, "flow 'int' must feed the sequence by cls or pffn"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        InterFormerConfig(**settings)


def test_settings_go_through_json() -> None:
    config = InterFormerConfig(embed_dim=24, num_heads=3, head_hidden=(7, 5), backend="reference", literal=True)
    assert InterFormerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_settings_left_out_keep_their_defaults_and_unknown_ones_are_refused() -> None:
    assert InterFormerConfig.from_dict({"num_layers": 5}) == InterFormerConfig(num_layers=5)
    with pytest.raises(ValueError, match="settings must be among .*; found layers"):
        InterFormerConfig.from_dict({"layers": 5})


def test_schema_goes_through_json() -> None:
    schema = small_schema()
    restored = Schema.from_dict(json.loads(json.dumps(schema.to_dict())))
    assert restored == schema
    assert restored.num_tokens == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tables": {"item": 0}}, r"tables\['item'\] must hold at least one id, found 0"),
        ({"categorical": ()}, "categorical must name at least one field, found none"),
        ({"sequences": ()}, "sequences must name at least one field, found none"),
        ({"sequences": (Field("shop", "shop"),)}, "field 'shop' must read one of item; found 'shop'"),
        ({"candidate": ("shop",)}, "candidate must name fields among item; found 'shop'"),
    ],
)
def test_bad_schemas_are_named(change: dict[str, Any], message: str) -> None:
    item = (Field("item", "item"),)
    good = {"tables": {"item": 3}, "dense": (), "categorical": item, "sequences": item}
    with pytest.raises(ValueError, match=message):
        Schema(**{**good, **change})
