"""Tiny models of transformers' classes, from their own configs with small sizes."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

# Sizes under all names that configs use; a config gets those that it has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "emb_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers", "num_encoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "vocab_size", "vocab_size_per_layer_input"), 64
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "num_key_value_heads", "type_vocab_size"), 2),
    **dict.fromkeys(
        ("head_dim", "d_kv", "kv_lora_rank", "q_lora_rank", "v_head_dim", "hidden_size_per_layer_input"), 8
    ),
    **dict.fromkeys(("rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim", "sliding_window", "attention_window"), 4),
    **dict.fromkeys(("n_group", "topk_group", "bos_token_id", "decoder_start_token_id"), 1),
    **{"ffn_hidden_size": 48, "pad_token_id": 0, "eos_token_id": 2},
}


def config(kind: str) -> Any:
    """A tiny config of a model type."""
    config_class = CONFIG_MAPPING[kind]
    parameters: set[str] = set()
    for parent in config_class.__mro__:
        parameters |= set(getattr(parent, "__annotations__", {})) | set(inspect.signature(parent.__init__).parameters)
        parameters |= set(getattr(parent, "attribute_map", {}))
    sizes = {name: size for name, size in SIZES.items() if name in parameters}
    for name, alias in config_class.attribute_map.items():
        if name in sizes and alias in sizes:
            del sizes[name]
    result = config_class(**sizes)
    result._experts_implementation = "eager"  # The other implementations' grouped product has no float64.
    return result


def model_class(kind: str) -> Any:
    """The class of a model type without head."""
    name = MODEL_MAPPING_NAMES[kind]
    return getattr(transformers, name if isinstance(name, str) else name[0])


def eager(kind: str, head_class: Any = None) -> Any:
    """A model with transformers' eager attention, its weights large enough to matter, in eval mode.

    The class is `made`, by default the one without head.
    """
    torch.manual_seed(0)
    model = (head_class or model_class(kind))._from_config(config(kind), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def parameters(kind: str) -> int:
    """Number of parameters of a tiny model; some configs have sizes under other names."""
    with torch.device("meta"):
        return sum(p.numel() for p in model_class(kind)._from_config(config(kind)).parameters())


def truth(model: Any) -> Any:
    """The model in float64, with `sdpa` if the class has it: eager attention computes its softmax in float32."""
    return served(model.double(), "sdpa" if model._supports_sdpa else "eager")


@contextlib.contextmanager
def exact_softmax() -> Iterator[None]:
    """Softmax in the dtype of its input: eager attention's float32 has no number for float64's least, the mask's."""
    softmax = F.softmax

    def without_dtype(x: torch.Tensor, dim: int | None = None, **options: Any) -> torch.Tensor:
        return softmax(x, dim, **({} if x.dtype == torch.float64 else options))

    F.softmax = without_dtype  # type: ignore[assignment]
    try:
        yield
    finally:
        F.softmax = softmax


def served(model: Any, implementation: str = "interformer") -> Any:
    """A model of the same class and weights with another attention implementation."""
    settings = model.config.to_dict()
    settings.pop("_attn_implementation", None)
    settings = type(model.config).from_dict(settings)
    settings._experts_implementation = "eager"
    copy = type(model)._from_config(settings, attn_implementation=implementation)
    copy.to(next(model.parameters()).dtype).load_state_dict(model.state_dict())
    return copy.train(model.training)
