"""Every setting of the model, validated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from interformer import checks
from interformer.checks import short_repr
from interformer_kernels._backend import BACKENDS

BACKBONES = ("dot", "dcnv2", "dhen")
PFFN_MODES = ("mlp", "rank", "two_layer", "gdpa", "none")
GATE_MODES = ("self_identity", "self_tanh", "self_sigmoid", "multiply_sigmoid", "none")
MASK_OUTPUTS = ("identity", "sigmoid", "none")
FLOWS = ("int", "n2s", "s2n", "sep", "sole")
SUMMARIES = ("selective", "mean", "mlp", "mha")
PMA_FORMS = ("bare", "mab")
SHARED = ("none", "request")


@dataclass(frozen=True)
class InterFormerConfig:
    """Settings of `InterFormer`; the defaults are the default form of docs/interformer.md at the paper's sizes.

    Args:
        embed_dim: `E`, width of every token.
        num_heads: `H`; `E / H` must be an even whole number (rotary embedding rotates pairs of channels).
        num_layers: layers of the loop (section 6).
        num_cls: `S`, summary tokens of the non-sequence side, which are also the CLS tokens.
        num_seeds: `M`, learned queries of PMA; 0 leaves PMA out.
        num_recent: `K`, recent behaviours in the sequence summary; 0 leaves them out.
        cls: whether the summary tokens are prepended to every row, and are part of the sequence summary, as CLS tokens.
        flow: exchange between the two sides: `int` both ways; `n2s` only the static side feeds the sequence (CLS,
            PFFN); `s2n` only the sequence feeds the static side (its summary in the interaction); `sep` none, only the
            head consumes both. `sole` has no sequence side. If the static side does not feed the sequence, learned
            tokens, the same for all rows, replace its summary.
        summary: summary of a row: `selective` (equation 11: CLS, PMA, recent), or the mean of its tokens: as they are
            (`mean`), after an MLP of each (`mlp`), or after self-attention (`mha`).
        pma: `bare`, or `mab`, Set Transformer's form with residual, norms and feed-forward (section 3).
        pool_seeds: Kunlun's hierarchical seed pooling: PMA pools by this many seeds, and a sum of small matrix products
            reduces them to `num_seeds` tokens; 0 turns it off.
        pool_products: number of products in that sum.
        backbone: interaction of the Interaction Arch: `dot`, `dcnv2` or `dhen` (section 4).
        backbone_layers: 1 to 3: stacked DHEN layers, or cross layers of DCNv2; `dot` has one.
        cross_rank: low rank of DCNv2's matrices.
        interaction_hidden: hidden widths of the MLP behind an interaction.
        pffn: mode of the personalised feed-forward: `mlp`, `rank`, `two_layer` or `gdpa` (section 5), or `none`.
        pffn_hidden: hidden widths of the MLP that generates the weights of `mlp`, `two_layer` and `gdpa`.
        pffn_inner: `F`, inner width of `two_layer`, number of keys of `gdpa`.
        pffn_tau: temperature of `gdpa`'s scores.
        attention: whether the Sequence Arch has its attention.
        window: `(left, right)` neighbours that a token sees, besides the CLS tokens; empty: the whole row.
        gate: mode of all gates (section 2), or `none`.
        mask_output: activation on MaskNet's mask: `identity` or `sigmoid` (section 1); `none` has no mask.
        event_fields: names of the fields of an event that the model reads; empty: all fields of the schema.
        head_hidden: hidden widths of the head.
        rope_base: base of the rotary embedding.
        max_history: longest history that the rotary tables cover, CLS tokens not counted.
        literal: the form printed in the paper: no residual and norm in the Sequence Arch, and no Cross Arch after the
            loop.
        dropout: on the hidden activations of the head and of the interaction MLPs.
        embedding_dropout: on the embedded tokens of both sides, whole channels independently.
        embedding_std: standard deviation of the embedding tables at initialisation.
        shared: `request`: what a request's candidates have in common is computed once for all of them (section 8);
            `none`: everything is computed for every impression, as printed.
        num_queries: queries of a candidate into the sequence, where the request is shared.
        backend: backend of the ops; None chooses the fastest that can serve.

    Raises:
        ValueError: a setting has a wrong value; the message names it, the allowed values and the value found.
        TypeError: a setting is of the wrong type.
    """

    embed_dim: int = 64
    num_heads: int = 4
    num_layers: int = 3
    num_cls: int = 4
    num_seeds: int = 2
    num_recent: int = 2
    cls: bool = True
    flow: str = "int"
    summary: str = "selective"
    pma: str = "bare"
    pool_seeds: int = 0
    pool_products: int = 2
    backbone: str = "dhen"
    backbone_layers: int = 1
    cross_rank: int = 32
    interaction_hidden: tuple[int, ...] = (256,)
    pffn: str = "mlp"
    pffn_hidden: tuple[int, ...] = (64,)
    pffn_inner: int = 64
    pffn_tau: float = 1.0
    attention: bool = True
    window: tuple[int, ...] = ()
    gate: str = "self_tanh"
    mask_output: str = "identity"
    event_fields: tuple[str, ...] = ()
    head_hidden: tuple[int, ...] = (1024, 512, 256, 128)
    rope_base: float = 10000.0
    max_history: int = 1024
    literal: bool = False
    dropout: float = 0.0
    embedding_dropout: float = 0.0
    embedding_std: float = 0.1
    shared: str = "none"
    num_queries: int = 1
    backend: str | None = None

    def __post_init__(self) -> None:
        for name in ("embed_dim", "num_heads", "num_layers", "num_cls", "cross_rank", "max_history", "pffn_inner"):
            checks.whole(name, getattr(self, name), 1)
        for name in ("pool_products", "num_queries"):
            checks.whole(name, getattr(self, name), 1)
        for name in ("num_seeds", "num_recent", "pool_seeds"):
            checks.whole(name, getattr(self, name), 0)
        for name, low in (("interaction_hidden", 1), ("pffn_hidden", 1), ("head_hidden", 1), ("window", 0)):
            self._wholes(name, low)
        checks.whole("backbone_layers", self.backbone_layers, 1, 3)
        self._choice("backbone", BACKBONES)
        self._choice("pffn", PFFN_MODES)
        self._choice("gate", GATE_MODES)
        self._choice("mask_output", MASK_OUTPUTS)
        self._choice("flow", FLOWS)
        self._choice("summary", SUMMARIES)
        self._choice("shared", SHARED)
        self._choice("pma", PMA_FORMS)
        if self.backend is not None:
            self._choice("backend", BACKENDS)
        self._number("dropout", 0, 1)
        self._number("embedding_dropout", 0, 1)
        self._number("embedding_std", 0, float("inf"))
        self._number("rope_base", 1, float("inf"))
        self._number("pffn_tau", 1e-6, float("inf"))
        for name in ("literal", "cls", "attention"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, found {short_repr(getattr(self, name))}")
        if not isinstance(self.event_fields, tuple) or not all(isinstance(name, str) for name in self.event_fields):
            raise TypeError(f"event_fields must be a tuple of names, found {short_repr(self.event_fields)}")
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Check combinations of settings."""
        if self.embed_dim % (2 * self.num_heads):
            found = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"
            raise ValueError(f"embed_dim must be a multiple of 2 * num_heads; found {found}")
        if self.backbone == "dot" and self.backbone_layers != 1:
            raise ValueError(f"backbone_layers must be 1 for the dot backbone, found {self.backbone_layers}")
        if len(self.window) not in (0, 2):
            raise ValueError(f"window must be empty or (left, right), found {self.window}")
        if self.once_per_request and self.flow != "int":
            raise ValueError(f"flow must be 'int' where the request is shared, found {self.flow!r}")
        if self.pool_seeds and not self.num_seeds:
            raise ValueError(f"pool_seeds must be 0 without PMA (num_seeds=0), found {self.pool_seeds}")
        if self.summary == "selective" and not (self.cls or self.num_seeds or self.num_recent):
            raise ValueError("summary 'selective' must have cls, num_seeds or num_recent; found none of them")
        if self.literal and self.num_layers == 1 and self.flow in ("s2n", "sep") and self.cls:
            raise ValueError(
                f"flow must not be {self.flow!r} for literal with num_layers=1, whose one X_sum feeds head and CLS"
            )
        if self.to_sequence and not self.cls and self.pffn == "none":
            raise ValueError(f"flow {self.flow!r} must feed the sequence by cls or pffn; found neither of them")

    @property
    def has_sequence(self) -> bool:
        """Whether the model reads histories."""
        return self.flow != "sole"

    @property
    def once_per_request(self) -> bool:
        """Whether candidates share what is computed of their request."""
        return self.shared == "request"

    @property
    def to_sequence(self) -> bool:
        """Whether the static side feeds the sequence."""
        return self.flow in ("int", "n2s")

    @property
    def to_static(self) -> bool:
        """Whether the sequence feeds the static side."""
        return self.flow in ("int", "s2n")

    @property
    def cls_tokens(self) -> int:
        """Number of CLS tokens prepended to every row: `S`, or 0."""
        return self.num_cls if self.cls else 0

    @property
    def num_summary(self) -> int:
        """Number of tokens of the sequence summary: CLS, PMA and recent, or one mean; 0 without a sequence side."""
        if not self.has_sequence:
            return 0
        return self.cls_tokens + self.num_seeds + self.num_recent if self.summary == "selective" else 1

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings and lists, for JSON and checkpoints."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> InterFormerConfig:
        """The inverse of `to_dict`; missing settings keep their defaults, unknown ones are an error."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(plain) - known)
        if unknown:
            raise ValueError(f"settings must be among {', '.join(sorted(known))}; found {', '.join(unknown)}")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()})

    def _wholes(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, tuple):
            raise TypeError(f"{name} must be a tuple of ints, found {short_repr(value)}")
        for i, entry in enumerate(value):
            checks.whole(f"{name}[{i}]", entry, low)

    def _choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}; found {short_repr(value)}")

    def _number(self, name: str, low: float, high: float) -> None:
        checks.number(name, getattr(self, name), low, high)
