"""The attention of transformers' continuous batching, without flash-attn and without a mask.

With ``sdpa`` continuous batching makes a mask of every token times every place of the cache, copies
the keys and values of all sequences out of the pages in each layer, and does without CUDA graphs
and asynchronous batches. What is installed here reads them where they lie, and needs none of it:

    with installed(model):
        manager = ContinuousBatchingManager(model, generation_config, config(...))

It is registered under a name of its own, so that nothing of transformers is replaced, and other
models in the process keep what they have. The name holds the word by which transformers knows that
an attention needs no mask; it is put past ``set_attn_implementation``, which takes any such name
that it does not know for a kernel to be downloaded.

On the CPU PyTorch's operations run (``plain_paged_attention``, which is the definition), on CUDA
the kernel of ``kernels/paged_attention.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

NAME = "fastlora_flash"

# Of a continuous batching manager before its first batch: without it transformers looks for
# flash-attn, by the name. See ``read_by_block_tables``.
SETTINGS = {"max_blocks_per_request": 0}

_FULL, _SLIDING = "full_attention", "sliding_attention"
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def register() -> None:
    """Make the attention known to transformers; doing it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)


@contextmanager
def installed(model: nn.Module) -> Iterator[None]:
    """Let a model attend by pages, for continuous batching alone, until the block is left.

    Meanwhile its forward refuses any call that is not continuous batching's.

    Args:
        model: of transformers, on any device.

    Raises:
        ValueError: the model has an attention of its own that cannot be exchanged.
        RuntimeError: it is installed on this model already.
    """
    if not getattr(model, "_supports_flash_attn", False):
        raise ValueError(
            f"{type(model).__name__} has no attention that can be exchanged for a paged one"
        )
    top: Any = model.config
    configs = {id(config): config for config in (top, top.get_text_config())}.values()
    before = [config._attn_implementation for config in configs]
    if NAME in before:
        raise RuntimeError("another engine serves this model: close it first")
    register()
    for config in configs:
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation


def read_by_block_tables(manager: Any, longest: int) -> bool:
    """Let a manager that has not been started describe batches that only generate by their pages.

    Otherwise it lists the place of every cached token of every sequence, in Python, in every step:
    131,072 numbers for 64 sequences of 2048 tokens. Batches that are longer or have prompts among
    them are described so all the same. transformers itself allows it with flash-attn only.

    Args:
        manager: a ``ContinuousBatchingManager`` of a model on which this attention is installed.
        longest: tokens of the longest sequence that is to be described by its pages.

    Returns:
        Whether it is done: not for sliding windows.
    """
    from transformers.generation.continuous_batching.cache import group_layers_by_attn_type

    if set(group_layers_by_attn_type(manager.model.config.get_text_config())) != {_FULL}:
        return False
    config = manager.continuous_batching_config
    config.max_blocks_per_request = -(-longest // config.page_size)
    return True


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    cache: Any = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: dict[str, Tensor] | None = None,
    max_length_k: dict[str, int] | None = None,
    read_index: list[Tensor] | None = None,
    write_index: list[Tensor] | None = None,
    block_table: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend in one layer, as ``AttentionInterface`` calls it, and write its keys and values.

    Args:
        module: the layer's attention, with a ``layer_idx``.
        query: ``[1, H, T, D]``.
        key: ``[1, G, T, D]``.
        value: likewise.
        attention_mask: ``None``.
        dropout: 0.
        scaling: of the scores; ``D ** -0.5`` by default.
        sliding_window: tokens that one sees, itself included.
        softcap: ``None``, as ``s_aux`` (sinks): neither is computed.
        s_aux: see ``softcap``.
        is_causal: not ``False``.
        cache: continuous batching's ``PagedAttentionCache``; what follows is from its batch, too.
        cu_seq_lens_q: ``[S + 1]`` int32.
        cu_seq_lens_k: the same for every type of layers.
        max_length_k: of every type, at least the longest sequence.
        read_index: of every allocator the places of all keys, or an empty one.
        write_index: of every allocator the places of the new tokens.
        block_table: instead of both ``[allocators, S, pages]``.

    Returns:
        ``[1, T, H, D]``, and ``None`` for the weights.

    Raises:
        RuntimeError: not called by continuous batching.
        ValueError: the model needs what is not computed here.
    """
    if cache is None or cu_seq_lens_q is None or cu_seq_lens_k is None or max_length_k is None:
        raise RuntimeError(
            "an engine serves this model, and it can only be called by it: send requests to the "
            "engine, or close it first"
        )
    _refuse(
        {
            "an attention mask": attention_mask is not None,
            "dropout": dropout != 0.0,
            "capped scores": softcap is not None,
            "attention sinks": s_aux is not None,
            "attention to later tokens": is_causal is False,
            "values of another width than the keys": value.shape[-1] != key.shape[-1],
        }
    )
    layer: Any = module.layer_idx
    allocator = cache.layer_to_allocator[layer]
    if allocator.layer_type not in (_FULL, _SLIDING):
        raise ValueError(f"the paged attention knows no layers of {allocator.layer_type!r}")
    is_ring = allocator.layer_type == _SLIDING
    k_pages, v_pages = allocator._kv_token_views[layer]
    _check_dtype(query, key, value, k_pages)
    table = None if block_table is None else block_table[allocator.index]
    window = allocator.sliding_window if is_ring and sliding_window is None else sliding_window
    attend = _kernel() if _takes_kernel(query) else plain_paged_attention
    out = attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        k_pages,
        v_pages,
        cu_seq_lens_q,
        cu_seq_lens_k[allocator.layer_type],
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        # Of a batch that is described by its pages transformers does not say it.
        longest=max_length_k[allocator.layer_type]
        if table is None
        else table.shape[1] * allocator.tokens_per_page,
        read_index=None if read_index is None else read_index[allocator.index],
        write_index=None if write_index is None else write_index[allocator.index],
        block_table=table,
        page_size=allocator.tokens_per_page,
        window=window,
        is_ring=is_ring,
    )
    return out[None], None


def _refuse(unsupported: dict[str, bool]) -> None:
    if found := [what for what, is_there in unsupported.items() if is_there]:
        raise ValueError(f"the paged attention does not compute {' or '.join(found)}")


def _check_dtype(query: Tensor, key: Tensor, value: Tensor, pages: Tensor) -> None:
    dtypes = {query.dtype, key.dtype, value.dtype, pages.dtype}
    if len(dtypes) > 1:
        raise ValueError(
            f"queries are {query.dtype}, keys {key.dtype}, values {value.dtype} and the cache "
            f"{pages.dtype}: the model's layers have to compute in one dtype"
        )


def _takes_kernel(query: Tensor) -> bool:
    """Return whether the kernel computes it: anything on CUDA that it can."""
    if not query.is_cuda:
        return False
    from fastlora.kernels.paged_attention import MAX_HEAD_DIM

    if query.dtype not in _KERNEL_DTYPES or query.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(
            f"the paged attention on CUDA takes heads of up to {MAX_HEAD_DIM} in fp32, fp16 or "
            f"bf16, not {query.shape[-1]} in {query.dtype}"
        )
    return True


@functools.cache
def _kernel() -> Callable[..., Tensor]:
    """Import the kernel, and triton with it, when it is first launched."""
    from fastlora.kernels.paged_attention import paged_attention

    return paged_attention


def plain_paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    *,
    scaling: float,
    longest: int = 0,
    read_index: Tensor | None = None,
    write_index: Tensor | None = None,
    block_table: Tensor | None = None,
    page_size: int = 0,
    window: int | None = None,
    is_ring: bool = False,
) -> Tensor:
    """Attend by PyTorch's operations: the definition of ``kernels.paged_attention``.

    Args and result as there, in any dtype and on any device; it reads the lengths back, so not for
    a CUDA graph. ``longest`` and ``is_ring`` change nothing: what is cached is read before anything
    is written.
    """
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    of_keys = starts_k.tolist()
    written: list[Tensor] = []
    for sequence, (first, last) in enumerate(pairwise(starts_q.tolist())):
        queries = last - first
        if queries == 0:
            continue
        first_key = of_keys[sequence]
        cached = of_keys[sequence + 1] - first_key - queries
        if block_table is not None:
            positions = torch.arange(cached + queries, device=q.device)
            pages = block_table[sequence, positions // page_size].long()
            places = pages * page_size + positions % page_size
            written.append(places[cached:])
        elif cached:
            assert read_index is not None, "cached tokens, and no list of their places"
            places = read_index[first_key : first_key + cached]
        own_k, own_v = k[first:last], v[first:last]
        if cached:
            own_k = torch.cat((k_pages[places[:cached]], own_k))
            own_v = torch.cat((v_pages[places[:cached]], own_v))
        position = torch.arange(cached, cached + queries, device=q.device)[:, None]
        key = torch.arange(cached + queries, device=q.device)[None]
        visible = key <= position
        if window is not None:
            visible &= key > position - window
        out[first:last] = scaled_dot_product_attention(
            q[first:last].transpose(0, 1)[None],
            own_k.transpose(0, 1)[None],
            own_v.transpose(0, 1)[None],
            attn_mask=None if queries == 1 and window is None else visible,
            scale=scaling,
            enable_gqa=True,
        )[0].transpose(0, 1)
    if block_table is not None:
        write_index = torch.cat(written) if written else starts_q[:0]
    assert write_index is not None, "neither write_index nor block_table"
    end = len(write_index) if block_table is not None else int(starts_q[-1])
    k_pages.index_copy_(0, write_index[:end], k[:end])
    v_pages.index_copy_(0, write_index[:end], v[:end])
    return out
