"""Every setting of the model, validated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

BACKBONES = ("dot", "dcnv2", "dhen")
PFFN_MODES = ("mlp", "rank")
GATE_MODES = ("self_identity", "self_tanh", "self_sigmoid", "multiply_sigmoid")
MASK_OUTPUTS = ("identity", "sigmoid")
BACKENDS = ("reference", "cpu", "triton", "cuda")


@dataclass(frozen=True)
class InterFormerConfig:
    """Settings of `InterFormer`; the defaults are INTERFORMER.md's default form at the paper's sizes.

    Args:
        embed_dim: `E`, width of every token.
        num_heads: `H`; `E / H` must be a whole even number (rotary turns pairs of channels).
        num_layers: layers of the loop (section 6).
        num_cls: `S`, summary tokens of the non-sequence side, which are also the CLS tokens.
        num_seeds: `M`, learned queries of PMA; 0 leaves PMA out.
        num_recent: `K`, recent behaviours in the sequence summary; 0 leaves them out.
        backbone: interaction of the Interaction Arch: `dot`, `dcnv2` or `dhen` (section 4).
        backbone_layers: 1 to 3: stacked DHEN layers, or cross layers of DCNv2; `dot` has one.
        cross_rank: low rank of DCNv2's matrices.
        interaction_hidden: hidden widths of the MLP behind an interaction.
        pffn: how the personalised feed-forward is generated: `mlp` or `rank` (section 5).
        pffn_hidden: hidden widths of the MLP that generates the matrix of `mlp`.
        gate: mode of both gates (section 2).
        mask_output: activation on MaskNet's mask: `identity` or `sigmoid` (section 1).
        head_hidden: hidden widths of the head.
        rope_base: base of the rotary embedding.
        max_history: longest history the rotary tables serve, CLS tokens not counted.
        literal: the printed form: no residual and norm in the Sequence Arch, and no Cross Arch after the loop.
        dropout: on the hidden activations of the head and of the interaction MLPs.
        embedding_dropout: on the embedded tokens of both sides, whole channels independently.
        embedding_std: standard deviation of the embedding tables at the start.
        backend: backend of the ops; None takes the fastest that can serve.

    Raises:
        ValueError: naming the setting, what it must be and what was found.
        TypeError: a setting of a wrong kind.
    """

    embed_dim: int = 64
    num_heads: int = 4
    num_layers: int = 3
    num_cls: int = 4
    num_seeds: int = 2
    num_recent: int = 2
    backbone: str = "dhen"
    backbone_layers: int = 1
    cross_rank: int = 32
    interaction_hidden: tuple[int, ...] = (256,)
    pffn: str = "mlp"
    pffn_hidden: tuple[int, ...] = (64,)
    gate: str = "self_tanh"
    mask_output: str = "identity"
    head_hidden: tuple[int, ...] = (1024, 512, 256, 128)
    rope_base: float = 10000.0
    max_history: int = 1024
    literal: bool = False
    dropout: float = 0.0
    embedding_dropout: float = 0.0
    embedding_std: float = 0.1
    backend: str | None = None

    def __post_init__(self) -> None:
        for name in ("embed_dim", "num_heads", "num_layers", "num_cls", "cross_rank", "max_history"):
            self._whole(name, getattr(self, name), 1)
        for name in ("num_seeds", "num_recent"):
            self._whole(name, getattr(self, name), 0)
        for name in ("interaction_hidden", "pffn_hidden", "head_hidden"):
            self._widths(name)
        self._whole("backbone_layers", self.backbone_layers, 1, 3)
        if self.backbone == "dot" and self.backbone_layers != 1:
            raise ValueError(f"backbone_layers must be 1 for the dot backbone, found {self.backbone_layers}")
        self._choice("backbone", BACKBONES)
        self._choice("pffn", PFFN_MODES)
        self._choice("gate", GATE_MODES)
        self._choice("mask_output", MASK_OUTPUTS)
        if self.backend is not None:
            self._choice("backend", BACKENDS)
        if self.embed_dim % (2 * self.num_heads):
            found = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"
            raise ValueError(f"embed_dim must be a multiple of 2 * num_heads; found {found}")
        self._number("dropout", 0, 1)
        self._number("embedding_dropout", 0, 1)
        self._number("embedding_std", 0, float("inf"))
        self._number("rope_base", 1, float("inf"))
        if not isinstance(self.literal, bool):
            raise TypeError(f"literal must be a bool, found {self.literal!r}")

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings and lists, for JSON and checkpoints."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> InterFormerConfig:
        """The inverse of `to_dict`; settings left out keep their defaults, unknown ones are an error."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(plain) - known)
        if unknown:
            raise ValueError(f"settings must be among {', '.join(sorted(known))}; found {', '.join(unknown)}")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()})

    @staticmethod
    def _whole(name: str, value: object, low: int, high: int | None = None) -> None:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, found {value!r}")
        if value < low or (high is not None and value > high):
            wanted = f"at least {low}" if high is None else f"{low} to {high}"
            raise ValueError(f"{name} must be {wanted}, found {value}")

    def _widths(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, tuple):
            raise TypeError(f"{name} must be a tuple of ints, found {value!r}")
        for i, width in enumerate(value):
            self._whole(f"{name}[{i}]", width, 1)

    def _choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}; found {value!r}")

    def _number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number, found {value!r}")
        if not low <= value < high:
            raise ValueError(f"{name} must lie in [{low}, {high}), found {value}")
