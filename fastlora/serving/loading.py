"""The model of an engine: where it comes from, its tokenizer, and how it is batched."""

from __future__ import annotations

import copy
import importlib.util
import os
from typing import Any

import torch
from torch import nn

from fastlora import plans

# Of the keys and values on a CPU, where transformers would take 60 % of what is free.
_CPU_CACHE_BYTES = 1 << 30
_CPU_CACHE_TOKENS = 32768
_CPU_BATCH_TOKENS = 512
_CPU_PAGE = 16


def load_model(model: Any, device: Any, dtype: Any) -> Any:
    """Return a model, loaded from a hub id or a folder if it is none yet.

    Args:
        model: one, a hub id or a folder.
        device: by default a GPU if there is one, or where a loaded model is.
        dtype: by default the checkpoint's, or a loaded model's.

    Raises:
        ValueError: there is no such dtype, or the model does not generate.
    """
    if isinstance(dtype, str) and dtype != "auto":
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f'dtype is one of torch\'s, such as "bfloat16", not {dtype!r}')
        dtype = found
    if not isinstance(model, nn.Module):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            os.fspath(model), dtype="auto" if dtype is None else dtype
        )
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
    if not callable(getattr(model, "generate", None)) or not hasattr(model, "generation_config"):
        raise ValueError(
            f"{type(model).__name__} does not generate: a language model of transformers is needed"
        )
    if device is not None:
        model = model.to(device)
    if isinstance(dtype, torch.dtype):
        model = model.to(dtype)
    return model


def tokenizer_of(source: Any, model: Any) -> Any:
    """Return the tokenizer that came with a model, or ``None``.

    Args:
        source: what the model was loaded from, or a model.
        model: that was loaded.
    """
    from transformers import AutoTokenizer

    name = model.config._name_or_path if isinstance(source, nn.Module) else os.fspath(source)
    if not name:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError):
        return None
    # Of a folder without one, transformers 5.23 makes one that knows a single token.
    return tokenizer if len(tokenizer) > 1 else None


def batching_config(model: Any, asked: Any) -> Any:
    """Return a ``ContinuousBatchingConfig`` for a model.

    Args:
        model: of the engine.
        asked: what its user gave, or ``None``.
    """
    from transformers import ContinuousBatchingConfig

    asked = copy.copy(asked)
    if asked is not None and (model.device.type != "cpu" or asked.num_blocks is not None):
        return asked
    if model.device.type != "cpu":
        # Without the kernels every layer asks the device which adapters there are.
        has_kernels = not plans.segmented_reason(model.device)
        return ContinuousBatchingConfig(use_cuda_graph=None if has_kernels else False)
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None)
    width = width or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    tokens = min(_CPU_CACHE_TOKENS, _CPU_CACHE_BYTES // token_bytes)
    if asked is None:
        asked = ContinuousBatchingConfig(
            page_size=_CPU_PAGE, max_batch_tokens=_CPU_BATCH_TOKENS, auto_switch_to_flash=False
        )
    asked.num_blocks = max(1, tokens // asked.page_size)
    return asked


def needs_paged_attention(model: Any) -> bool:
    """Return whether the engine attends by pages with a kernel of its own.

    On CUDA where flash-attn is not installed, and nobody has chosen another attention than sdpa,
    with which there are neither CUDA graphs nor asynchronous batches.
    """
    return (
        model.device.type == "cuda"
        and model.config._attn_implementation == "sdpa"
        and bool(getattr(model, "_supports_flash_attn", False))
        and not any(map(importlib.util.find_spec, ("flash_attn", "flash_attn_interface")))
    )
