"""A model small enough for whole sessions of the bench, and options for it."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from fastlora.bench.planning import Options
from fastlora.bench.shapes import Linear, Model

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}
TINY = Model(
    "tiny",
    {
        "q_proj": Linear(32, 32, True),
        "k_proj": Linear(16, 32, True),
        "v_proj": Linear(16, 32, True),
        "o_proj": Linear(32, 32),
        "gate_proj": Linear(48, 32),
        "up_proj": Linear(48, 32),
        "down_proj": Linear(32, 48),
    },
    2,
    {"model_type": "qwen2", **SIZES},
)


def options_for(**changes: object) -> Options:
    settings = {
        "models": [TINY], "levels": ["layer"], "tokens": [16], "ranks": [4], "dropouts": [0.1],
        "rounds": 5,
    }  # fmt: skip
    return Options(**settings | changes)


def save_config(folder: Path, kind: str = "qwen2", **changes: object) -> str:
    """Write a model's config.json; returns the folder's name."""
    config = transformers.AutoConfig.for_model(kind, **SIZES | changes)
    config.save_pretrained(folder)
    return str(folder)


def names(options: Options, level: str, p: float) -> list[str]:
    """Return the providers of a level."""
    return [provider.name for provider in options.providers_for(level, p)]
