"""Whether this transformers' continuous batching is one that is known, and a manager of it.

What is added to it is in ``manager.py``.
"""

from __future__ import annotations

import copy
import functools
import inspect
from contextlib import ExitStack
from typing import Any

import transformers
from packaging.version import Version
from torch import nn

from fastlora.adapters.pool import AdapterPool
from fastlora.serving import attention
from fastlora.serving.requests import OpenRequests

_LAYERS = {"full_attention", "sliding_attention"}
TESTED = "5.23"  # of transformers: any 5.23.x


@functools.cache
def unsupported_reason() -> str | None:
    """Return why this transformers' continuous batching is not known, or ``None`` if it is."""
    version = Version(transformers.__version__)
    if f"{version.major}.{version.minor}" != TESTED:
        return f"transformers {transformers.__version__} is installed, and {TESTED}.x was tested"
    try:
        changed = _changed_signatures()
    except (ImportError, AttributeError) as error:
        changed = [str(error)]
    if changed:
        return f"transformers {transformers.__version__} is not as it was: {'; '.join(changed)}"
    return None


def unsupported_model(model: Any) -> str | None:
    """Return why continuous batching cannot run a model, or ``None`` if it can."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - _LAYERS
    name = type(model).__name__
    if kinds:
        return f"{name} has layers ({', '.join(sorted(kinds))}) that cannot be batched continuously"
    if not getattr(config, "num_attention_heads", None):
        return f"{name} has no attention, and cannot be batched continuously"
    return None


def _changed_signatures() -> list[str]:
    """Return what takes other arguments than those that are passed here."""
    from transformers.generation.continuous_batching import continuous_api, input_outputs
    from transformers.generation.continuous_batching.model_runner import ModelRunner
    from transformers.generation.continuous_batching.requests import RequestState
    from transformers.generation.continuous_batching.scheduler import Scheduler

    inputs, manager = (
        input_outputs.ContinuousBatchingIOs,
        continuous_api.ContinuousBatchingManager,
    )
    cache, router = continuous_api.PagedAttentionCache, continuous_api.OutputRouter
    processors = continuous_api.ContinuousBatchingLogitsProcessorList
    expected = {
        inputs.prepare_batch_tensors: "requests_in_batch logits_processors use_decode_fast_path "
        "num_q_tokens max_kv_read use_padding",
        inputs.get_model_kwargs: "use_padding",
        inputs._transfer_inputs: "other stream non_blocking",
        inputs._get_graph_key: "",
        inputs._get_num_sequences: "use_padding",
        processors.prepare_tensor_args: "requests_in_batch arg_storage",
        processors.__call__: "input_ids scores logits_processor_args",
        cache.search_prefix_match: "request_id prompt_ids",
        cache.mark_complete_blocks: "state complete_blocks",
        manager._create_batch_processor: "",
        manager._generation_loop_body: "batch_processor bootstrapping",
        manager._run_generation_loop: "",
        manager.stop: "block timeout keep_for_next_session hard_stop",
        router.deliver: "output",
        router.deliver_batch: "outputs",
        Scheduler.clear_cancelled_requests: "",
        ModelRunner.compute_batch: "model batch_data",
    }
    changed = []
    for function, names in expected.items():
        found = [name for name in inspect.signature(function).parameters if name != "self"]
        if found != names.split():
            changed.append(f"{function.__qualname__} takes {', '.join(found) or 'nothing'}")
    fields = {"num_children", "logit_processor_kwargs", "initial_tokens", "generated_tokens"}
    if missing := sorted(fields - set(RequestState.__dataclass_fields__)):
        changed.append(f"requests have no {', '.join(missing)}")
    return changed


def make_manager(
    model: nn.Module,
    pool: AdapterPool,
    requests: OpenRequests,
    generation_config: Any,
    batching: Any,
    *,
    vocabulary: int,
    own_attention: bool = False,
) -> Any:
    """Return a manager of continuous batches, not started.

    Args:
        model: whose linears were attached to the pool.
        pool: of its adapters.
        requests: hears of every output, of what was cancelled, and of the end.
        generation_config: for all requests.
        batching: a ``ContinuousBatchingConfig``.
        vocabulary: of the model's logits.
        own_attention: let the model attend by pages with ``attention.py`` until it is closed.
    """
    from fastlora.serving.manager import Manager

    with ExitStack() as stack:
        if own_attention:
            stack.enter_context(attention.installed(model))
            batching = copy.copy(batching)
            batching.max_blocks_per_request = attention.SETTINGS["max_blocks_per_request"]
        manager: Any = Manager(
            model, pool, requests, generation_config, batching, vocabulary=vocabulary
        )
        if own_attention:
            attention.read_by_block_tables(manager, _LONGEST_BY_PAGES)
        manager.attention = stack.pop_all()
    return manager


# Tokens of the longest sequence of a batch that is described by its pages: as many as by default
# with flash-attn, 32 pages of 256 tokens.
_LONGEST_BY_PAGES = 8192
