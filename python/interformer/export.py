"""Export of a model for serving: one program on plain tensors, for any number of impressions and events."""

from __future__ import annotations

import torch
import torch.fx.experimental._config as shapes
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from interformer.batch import Batch
from interformer.example import random_batch
from interformer.schema import Schema


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
    if model.training:
        raise ValueError("export: model must be in eval(), found it in training")
    device = next(model.parameters()).device
    example = random_batch(schema, (3, 0, 5)).to(device)
    inputs = example.dense, example.categorical, example.sequences, example.offsets
    # By default PyTorch assumes sizes of at least 2, and the program would refuse a single row or event.
    with torch.no_grad(), shapes.patch(backed_size_oblivious=True):
        return torch.export.export(Scorer(model), inputs, dynamic_shapes=[{0: Dim.AUTO}] * len(inputs))
