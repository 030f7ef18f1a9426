"""The model for serving: one program of plain tensors, for any number of impressions and events."""

from __future__ import annotations

import torch
import torch.fx.experimental._config as shapes
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from interformer.batch import Batch
from interformer.schema import Schema
from interformer.testing import random_batch


class Scorer(nn.Module):
    """A model as a function of what is known when an impression is to be scored: `logits [B]`.

    It takes `dense`, `categorical`, `sequences` and `offsets` of a `Batch`: neither label nor user, nor a class of ours
    that every process which loads the program would have to import and to trust.
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

    Rows and events are free: one impression, no history, many. `torch.export.save` and `load` keep it in a file; the
    process that loads it needs `import interformer_kernels`, whose operations the program calls (they choose their
    backend there), and nothing of this package. The logits are the model's.

    Args:
        model: `InterFormer`, or a baseline, in `eval()`.
        schema: the one it was made with.

    Raises:
        ValueError: the model is in training.
    """
    if model.training:
        raise ValueError("export: model must be in eval(), found it in training")
    device = next(model.parameters()).device
    example = random_batch(schema, (3, 0, 5)).to(device)
    inputs = example.dense, example.categorical, example.sequences, example.offsets
    # By default PyTorch takes a size for two at least, and refuses a single row or event later.
    with torch.no_grad(), shapes.patch(backed_size_oblivious=True):
        return torch.export.export(Scorer(model), inputs, dynamic_shapes=[{0: Dim.AUTO}] * len(inputs))
