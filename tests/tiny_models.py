"""Tiny random models of the families that fastlora is tested with."""

from __future__ import annotations

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

VOCABULARY = 64

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

# Family: (class stem, settings). Qwen2 and Qwen2.5 share a class; small ones tie their embeddings.
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "qwen2": ("Qwen2", {**_COMMON, "tie_word_embeddings": False}),
    "qwen2-tied": ("Qwen2", {**_COMMON, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**_COMMON, "head_dim": 8}),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            **_COMMON,
            "head_dim": 8,
            "moe_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "llama": ("Llama", _COMMON),
    "opt": (
        "OPT",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
            "dropout": 0.0,
        },
    ),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
}


def tiny_model(family: str = "qwen2", **overrides: object) -> PreTrainedModel:
    """Build a random model of a family, fp32, on the CPU; the same weights for the same seed."""
    stem, settings = FAMILIES[family]
    config = getattr(transformers, f"{stem}Config")(**{**settings, **overrides})
    cls = "GPT2LMHeadModel" if stem == "GPT2" else f"{stem}ForCausalLM"
    torch.manual_seed(0)
    return getattr(transformers, cls)(config)


def tiny_peft(family: str = "qwen2", model: nn.Module | None = None, **lora: object) -> PeftModel:
    """Build a tiny peft model whose adapter is not a no-op: r = 4, alpha = 8, ``all-linear``."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **lora}
    settings.setdefault("init_lora_weights", False)
    base = tiny_model(family) if model is None else model
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(**settings))


def token_ids(rows: int = 2, columns: int = 9) -> Tensor:
    """Return a fixed batch of token ids ``[rows, columns]``."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, VOCABULARY, (rows, columns), generator=generator)
