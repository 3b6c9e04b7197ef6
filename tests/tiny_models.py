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

_MOE = {
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}

# One layer of linear attention (Gated DeltaNet), one of softmax attention.
_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}

_QWEN4 = {
    **_COMMON,
    **_MOE,
    **_HYBRID,
    "shared_expert_intermediate_size": 16,
    "hc_count": 2,
    "hc_lowrank": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "ple_layer_ids": [1],
    "ngram_size": 2,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 16,
    "make_ngram_vocab_size_divisible_by": 4,
    "split_ngram_parts": 2,
    "eos_token_id": 1,
}

# Three sections of the rotary halves of a head of 8: time, height and width.
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}


def _with_vision(text: dict[str, object], **vision: object) -> dict[str, object]:
    """Return the settings of a model whose tower for images no text ever reaches."""
    return {
        "text_config": {**text, "head_dim": 8, "rope_parameters": _MROPE, "rope_scaling": _MROPE},
        "vision_config": {"depth": 1, "hidden_size": 16, "num_heads": 2, "patch_size": 4, **vision},
    }


_QWEN3_VISION = {
    "intermediate_size": 24,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
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
    "mistral": ("Mistral", {**_COMMON, "head_dim": 8}),
    "gemma": ("Gemma", {**_COMMON, "head_dim": 8}),
    "gemma2": ("Gemma2", {**_COMMON, "head_dim": 8}),
    "gemma3": ("Gemma3", {**_COMMON, "head_dim": 8}),
    "phi3": ("Phi3", {**_COMMON, "pad_token_id": 0}),
    "gpt-neox": ("GPTNeoX", {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}),
    "qwen2-moe": ("Qwen2Moe", {**_COMMON, **_MOE, "shared_expert_intermediate_size": 24}),
    "qwen3-next": (
        "Qwen3Next",
        {**_COMMON, **_MOE, **_HYBRID, "shared_expert_intermediate_size": 16},
    ),
    "qwen3-5": ("Qwen3_5", {**_COMMON, **_HYBRID}),
    "qwen3-5-moe": (
        "Qwen3_5Moe",
        {**_COMMON, **_MOE, **_HYBRID, "shared_expert_intermediate_size": 16},
    ),
    "qwen4-exp": ("Qwen4Exp", _QWEN4),
    "qwen2-vl-text": ("Qwen2VL", _with_vision(_COMMON, hidden_size=32, embed_dim=16, mlp_ratio=2)),
    "qwen2-5-vl-text": (
        "Qwen2_5_VL",
        _with_vision(_COMMON, intermediate_size=24, out_hidden_size=32),
    ),
    "qwen3-vl-text": (
        "Qwen3VL",
        _with_vision(_COMMON, **_QWEN3_VISION),
    ),
    "qwen3-vl-moe-text": (
        "Qwen3VLMoe",
        _with_vision({**_COMMON, **_MOE}, **_QWEN3_VISION),
    ),
}

# Where the classes are not called <stem>Config and <stem>ForCausalLM.
_CONFIGS = {
    "Gemma3": "Gemma3TextConfig",
    "Qwen3_5": "Qwen3_5TextConfig",
    "Qwen3_5Moe": "Qwen3_5MoeTextConfig",
    "Qwen4Exp": "Qwen4ExpTextConfig",
}
_MODELS = {
    "GPT2": "GPT2LMHeadModel",
    "Qwen2VL": "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VL": "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VL": "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoe": "Qwen3VLMoeForConditionalGeneration",
}


def class_names(family: str) -> tuple[str, str]:
    """Return what the config and the model of a family are called in transformers."""
    stem, _ = FAMILIES[family]
    return _CONFIGS.get(stem, f"{stem}Config"), _MODELS.get(stem, f"{stem}ForCausalLM")


def tiny_model(family: str = "qwen2", **overrides: object) -> PreTrainedModel:
    """Build a random model of a family, fp32, on the CPU; the same weights for the same seed."""
    names = class_names(family)
    missing = [name for name in names if not hasattr(transformers, name)]
    if missing:
        raise NotImplementedError(f"transformers {transformers.__version__} lacks {missing}")
    config_class, model_class = (getattr(transformers, name) for name in names)
    config = config_class(**{**FAMILIES[family][1], **overrides})
    torch.manual_seed(0)
    return model_class(config)


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
