"""The models and linears that are measured: eight Qwen models, any other one from its config.

The sizes are those of the published configurations. Qwen2.5 has a bias on q, k and v, Qwen3 has
none; Qwen3-32B has 64 heads of 128, so its attention is wider (8192) than its hidden size.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Linear:
    """One linear layer: ``[.., k] -> [.., n]``."""

    n: int
    k: int
    has_bias: bool = False


# Which linears of a decoder layer share their input.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
# The inputs of a decoder layer's linears: the one whose in features it has, in the order of GROUPS.
INPUTS = tuple(names[0] for names in GROUPS)
NAMES = tuple(name for names in GROUPS for name in names)


@dataclass(frozen=True)
class Model:
    """What is measured of a model.

    Attributes:
        name: as the model's authors write it.
        linears: the seven of one decoder layer, by the names that they have in Qwen2.
        layers: how many decoder layers there are.
        config: what transformers builds the whole of it from (for training steps).
    """

    name: str
    linears: Mapping[str, Linear]
    layers: int
    config: Mapping[str, Any]


def _qwen(
    name: str,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    key_value_heads: int,
    head_dim: int,
    vocabulary: int,
    tied: bool,
) -> Model:
    second = name.startswith("Qwen2")  # its q, k and v have a bias
    attention, key_value = heads * head_dim, key_value_heads * head_dim
    linears = {
        "q_proj": Linear(attention, hidden, second),
        "k_proj": Linear(key_value, hidden, second),
        "v_proj": Linear(key_value, hidden, second),
        "o_proj": Linear(hidden, attention),
        "gate_proj": Linear(intermediate, hidden),
        "up_proj": Linear(intermediate, hidden),
        "down_proj": Linear(hidden, intermediate),
    }
    config: dict[str, Any] = {
        "model_type": "qwen2" if second else "qwen3",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32768,
    }
    if not second:  # in Qwen2 it follows from the others
        config["head_dim"] = head_dim
    return Model(name, linears, layers, config)


# As published: name, hidden size, intermediate size, layers, heads, key-value heads, width of a
# head, vocabulary, whether the output layer is the embedding.
_PUBLISHED = (
    ("Qwen2.5-0.5B", 896, 4864, 24, 14, 2, 64, 151936, True),
    ("Qwen2.5-1.5B", 1536, 8960, 28, 12, 2, 128, 151936, True),
    ("Qwen2.5-7B", 3584, 18944, 28, 28, 4, 128, 152064, False),
    ("Qwen2.5-32B", 5120, 27648, 64, 40, 8, 128, 152064, False),
    ("Qwen2.5-72B", 8192, 29568, 80, 64, 8, 128, 152064, False),
    ("Qwen3-0.6B", 1024, 3072, 28, 16, 8, 128, 151936, True),
    ("Qwen3-8B", 4096, 12288, 36, 32, 8, 128, 151936, False),
    ("Qwen3-32B", 5120, 25600, 64, 64, 8, 128, 151936, False),
)
MODELS = {model.name: model for model in (_qwen(*row) for row in _PUBLISHED)}
# Those for which the project has promised figures, and which are tuned and counted by default.
MAIN_MODELS = ("Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen3-8B", "Qwen3-32B")

# Zhu et al., 2025, https://arxiv.org/abs/2510.00206: square, rank 16, dropout 0.1, 8192 rows.
LORAFUSION = {f"{size} x {size}": Linear(size, size) for size in (4096, 5120, 8192)}

TOKENS = (8192, 2048)
RANKS = (8, 16, 32, 64, 128, 256)
RANK = 16
DROPOUTS = (0.0, 0.05, 0.1)
DROPOUT = 0.1


def find(name: str) -> Model:
    """Return what is measured of a model; neither its weights nor, for a known one, a hub is asked.

    Args:
        name: one of ``MODELS`` (an organisation before it and ``-Instruct`` and the like behind it
            do not matter), else a hub id or folder whose ``config.json`` is read.

    Raises:
        ValueError: its decoder layers do not have the seven linears of Qwen and Llama.
        OSError: transformers finds no configuration of that name.
    """
    stem = name.rsplit("/", 1)[-1]
    for suffix in ("-Instruct", "-Base", "-Chat"):
        stem = stem.removesuffix(suffix)
    if stem in MODELS:
        return MODELS[stem]
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except OSError as error:  # offline it does not say of what
        raise OSError(f"{name}: {error}".partition("\n")[0]) from error
    return from_config(config, name)


def from_config(config: Any, name: str) -> Model:
    """Return what is measured of a model that has this configuration of transformers'.

    Raises:
        ValueError: its decoder layers do not have the seven linears of Qwen and Llama.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{name} has no list of decoder layers")
    layers = max(lists, key=len)
    kinds = collections.Counter(tuple(_linears(layer).items()) for layer in layers)
    linears = dict(kinds.most_common(1)[0][0])
    if missing := [part for part in NAMES if part not in linears]:
        raise ValueError(
            f"a decoder layer of {name} has no {', '.join(missing)}; it has "
            f"{', '.join(linears) or 'no linear layers'}. Measure its linears one by one with "
            "--shape N K"
        )
    return Model(name, {part: linears[part] for part in NAMES}, len(layers), config.to_dict())


def _linears(layer: nn.Module) -> dict[str, Linear]:
    return {
        path.rsplit(".", 1)[-1]: Linear(
            module.out_features, module.in_features, module.bias is not None
        )
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
