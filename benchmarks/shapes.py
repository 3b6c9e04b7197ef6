"""The linears that are measured: those of four Qwen models, and the cases of LoRAFusion's paper.

The sizes are those of the models' published configurations. Qwen2.5 has a bias on q, k and v, Qwen3
has none; Qwen3-32B has 64 heads of 128, so its attention is wider (8192) than its hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """One linear layer: ``[.., k] -> [.., n]``."""

    n: int
    k: int
    has_bias: bool = False


def _decoder_layer(
    hidden: int, attention: int, key_value: int, intermediate: int, *, qkv_bias: bool
) -> dict[str, Linear]:
    return {
        "q_proj": Linear(attention, hidden, qkv_bias),
        "k_proj": Linear(key_value, hidden, qkv_bias),
        "v_proj": Linear(key_value, hidden, qkv_bias),
        "o_proj": Linear(hidden, attention),
        "gate_proj": Linear(intermediate, hidden),
        "up_proj": Linear(intermediate, hidden),
        "down_proj": Linear(hidden, intermediate),
    }


# Which linears of a decoder layer share their input.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
# The inputs of a decoder layer's linears: the one whose in features it has, in the order of GROUPS.
INPUTS = tuple(names[0] for names in GROUPS)

# The seven linears of one decoder layer.
MODELS = {
    "Qwen2.5-0.5B": _decoder_layer(896, 896, 128, 4864, qkv_bias=True),
    "Qwen2.5-7B": _decoder_layer(3584, 3584, 512, 18944, qkv_bias=True),
    "Qwen3-8B": _decoder_layer(4096, 4096, 1024, 12288, qkv_bias=False),
    "Qwen3-32B": _decoder_layer(5120, 8192, 1024, 25600, qkv_bias=False),
}

# Zhu et al., 2025, https://arxiv.org/abs/2510.00206: square, rank 16, dropout 0.1, 8192 rows.
LORAFUSION = {f"{size} x {size}": Linear(size, size) for size in (4096, 5120, 8192)}

TOKENS = (8192, 2048)
RANK = 16
DROPOUT = 0.1
