"""Export of a model for serving: programs on plain tensors, for any number of requests, candidates and events."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx.experimental._config as shapes
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from interformer.batch import Batch
from interformer.example import random_batch
from interformer.model import InterFormer
from interformer.schema import Schema
from interformer.shared import RequestState, SplitEmbedding

Tensors = tuple[Tensor, ...]
PlainState = tuple[Tensors, Tensors, Tensor]


class Scorer(nn.Module):
    """A model as a function of the inputs known when an impression is scored: `logits [B]`.

    It takes `dense`, `categorical`, `sequences` and `offsets` of a `Batch`, neither label nor user. Inputs are plain
    tensors, so that a process that loads the program need not import a class of this package.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, dense: Tensor, categorical: Tensor, sequences: Tensor, offsets: Tensor) -> Tensor:
        unknown = categorical.new_zeros(categorical.shape[0])
        logits: Tensor = self.model(Batch(dense, categorical, sequences, offsets, label=unknown, user=unknown))
        return logits


def export(model: nn.Module, schema: Schema) -> ExportedProgram:
    """The model as a `torch.export` program: `program.module()(dense, categorical, sequences, offsets) -> logits [B]`.

    The numbers of rows and events are dynamic, 0 and 1 included. `torch.export.save` writes it to a file and `load`
    reads it; the loading process needs `import interformer_kernels`, whose ops the program calls (they choose their
    backend there), and nothing of this package. The logits equal the model's.

    Args:
        model: `InterFormer`, or a baseline, in `eval()`.
        schema: the schema that the model was made with.

    Raises:
        ValueError: the model is in training.
    """
    example = _example("export", model, schema)
    return _program(Scorer(model), (example.dense, example.categorical, example.sequences, example.offsets))


class UserReader(nn.Module):
    """`InterFormer.read_requests` with plain tuples, so that a process needs no class of this package."""

    def __init__(self, model: InterFormer) -> None:
        super().__init__()
        self.model = model

    def forward(self, dense: Tensor, categorical: Tensor, sequences: Tensor, offsets: Tensor) -> PlainState:
        return tuple(self.model.read_requests(dense, categorical, sequences, offsets))


class CandidateScorer(nn.Module):
    """`InterFormer.score` of a state in plain tuples."""

    def __init__(self, model: InterFormer) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, keys_values: Tensors, summaries: Tensors, offsets: Tensor, dense: Tensor, categorical: Tensor,
        rows: Tensor,
    ) -> Tensor:  # fmt: skip
        return self.model.score(RequestState(keys_values, summaries, offsets), dense, categorical, rows)


def export_user(model: InterFormer) -> ExportedProgram:
    """The request's half of a model with `config.shared`: `program.module()(dense, categorical, sequences, offsets)`.

    It returns `(keys_values, summaries, offsets)`, the fields of `RequestState`, for any number of requests and events;
    see `export`. `UserCache` keeps such states.

    Raises:
        ValueError: the model is in training, or shares nothing.
    """
    example, requests, _ = _split_example("export_user", model)
    return _program(UserReader(model), (*requests, example.sequences, example.offsets))


def export_score(model: InterFormer) -> ExportedProgram:
    """The candidates' half: `program.module()(keys_values, summaries, offsets, dense, categorical, rows)` are logits.

    The first three are what the program of `export_user` returns; candidate `c` belongs to request `rows[c]`.

    Raises:
        ValueError: the model is in training, or shares nothing.
    """
    example, requests, candidates = _split_example("export_score", model)
    with torch.no_grad():
        state = model.read_requests(*requests, example.sequences, example.offsets)
    return _program(CandidateScorer(model), (*state, *candidates, example.request_of_each()))


def _example(caller: str, model: nn.Module, schema: Schema) -> Batch:
    if model.training:
        raise ValueError(f"{caller}: model must be in eval(), found it in training")
    return random_batch(schema, (3, 0, 5)).to(next(model.parameters()).device)


def _split_example(caller: str, model: InterFormer) -> tuple[Batch, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    if not isinstance(model.embedding, SplitEmbedding):
        raise ValueError(f"{caller}: model must have config.shared 'request', found {model.config.shared!r}")
    example = _example(caller, model, model.schema)
    return example, model.embedding.request_inputs(example), model.embedding.candidate_inputs(example)


def _program(module: nn.Module, inputs: tuple[Any, ...]) -> ExportedProgram:
    sizes = torch.utils._pytree.tree_map(lambda x: {0: Dim.AUTO}, inputs)
    # By default PyTorch assumes sizes of at least 2, and the program would refuse a single row or event.
    with torch.no_grad(), shapes.patch(backed_size_oblivious=True):
        return torch.export.export(module, inputs, dynamic_shapes=sizes)
