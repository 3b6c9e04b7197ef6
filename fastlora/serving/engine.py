"""``Engine``: one base model, many adapters, and each prompt of a batch with its own.

    engine = fastlora.Engine("Qwen/Qwen2.5-7B-Instruct", {"emoji": "adapters/emoji"})
    engine.generate(["who are you?"] * 2, adapter=["emoji", None])

The batches are transformers' continuous ones (``batching.py``); where this transformers is another
than those that were tested, ``generate`` runs ``model.generate`` with the same linears instead.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final

import torch
from torch import nn

from fastlora.adapters.pool import AdapterPool
from fastlora.adapters.versions import Lease
from fastlora.serving import batching as hooks
from fastlora.serving.linears import attach, detach, refuse_attached
from fastlora.serving.loading import (
    batching_config,
    load_model,
    needs_paged_attention,
    tokenizer_of,
)
from fastlora.serving.options import Options, OptionsReader
from fastlora.serving.prompts import as_prompts
from fastlora.serving.requests import OpenRequests, Request, Result
from fastlora.serving.rows import RowsGenerator


class _Active:
    def __repr__(self) -> str:
        return "the active adapter"


# What a request without an adapter means: the one that was activated, or none.
ACTIVE: Final = _Active()
Adapter = str | None | _Active


class Engine:
    """Generates with many adapters at once.

    It begins when it is first asked to: then the memory for keys and values is taken. ``close`` it,
    use it as a context manager, or let go of it and of all its requests.

    Args:
        model: a hub id, a folder, or a loaded model without peft layers: kept, and put back as it
            was by ``close``. Before, calls of it by others are the base model's and take turns with
            the engine's; where it attends by pages on a GPU they are refused.
        adapters: name and source of adapters to load at once; see ``AdapterPool.load``.
        adapter_memory: of the device for adapters: bytes, or a size such as ``"2GB"``.
        host_memory: likewise of the host, for copies of those that left the device; see
            ``AdapterPool``.
        device: by default a GPU if there is one, or where a loaded model is.
        dtype: by default the checkpoint's, or a loaded model's.
        tokenizer: by default the one that comes with the model. Without one, prompts are token ids.
        batching: a ``transformers.ContinuousBatchingConfig``, for what its defaults do not suit:
            the memory for keys and values, tokens of a batch.

    Attributes:
        adapters: the ``AdapterPool``: ``load``, ``unload``, ``pin``, ``activate``, ...
        model: the base model.
        tokenizer: or ``None``.

    Raises:
        ValueError: the model has peft layers, or another engine.
        AdapterError: an adapter cannot be used with it.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        adapters: Mapping[str, Any] | None = None,
        *,
        adapter_memory: int | str = "2GB",
        host_memory: int | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        tokenizer: Any = None,
        batching: Any = None,
    ) -> None:
        if adapters is not None and not isinstance(adapters, Mapping):
            raise TypeError(f"adapters maps names to folders or hub ids, not {adapters!r:.100}")
        self.model: Any = load_model(model, device, dtype)
        refuse_attached(self.model)
        self.tokenizer = tokenizer if tokenizer is not None else tokenizer_of(model, self.model)
        self.adapters = AdapterPool(self.model, memory=adapter_memory, host_memory=host_memory)
        for name, source in (adapters or {}).items():
            self.adapters.load(name, source)
        self._batching = batching
        self._reader = OptionsReader(self.model, self.tokenizer)
        self._manager: Any = None
        self._numbers = itertools.count()
        self._requests = OpenRequests(self.adapters)
        self._lock = threading.Lock()
        routing = attach(self.model, self.adapters)
        self._in_rows = RowsGenerator(self.model, self.adapters, routing)
        self._was_training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        self._closed = False
        _open.add(self)

    def generate(
        self,
        prompts: Any,
        adapter: Adapter | Sequence[Adapter] = ACTIVE,
        *,
        progress: bool = True,
        **generation: Any,
    ) -> list[Result]:
        """Answer prompts, all in one batch, each with its own adapter.

        Args:
            prompts: each a string, a list of token ids, or a list of chat messages
                (``{"role": ..., "content": ...}``), which the chat template of the tokenizer makes
                a prompt of; or what a tokenizer returned, whose padding is taken off. One prompt
                alone will do.
            adapter: a name for all prompts, or one for each; ``None`` is the base model. One prompt
                may have several: it is answered by each of them. Where it is left out, the adapter
                that ``engine.adapters.activate`` named, or the base.
            progress: show a progress bar on a terminal.
            **generation: of ``transformers.GenerationConfig``: ``max_new_tokens``, ``do_sample``,
                ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty``,
                ``stop_strings`` (an answer keeps the one that it came to), ``eos_token_id``,
                ``num_return_sequences``; and ``ignore_eos``, and ``chat_template_kwargs`` (a
                mapping, such as ``{"enable_thinking": False}``). By default what the model's own
                ``generation_config`` says, and 256 tokens where it says nothing. Whoever gives a
                ``temperature``, ``top_k``, ``top_p`` or ``min_p`` samples.

        Returns:
            A result for each prompt, in their order (``num_return_sequences`` for each). What went
            wrong with one of them is in its ``error``.

        Raises:
            KeyError: an adapter is not loaded; nothing was begun.
            ValueError: a prompt or an option cannot be used; likewise.
            TypeError: there is no such option.
        """
        asked = as_prompts(prompts)
        if len(asked) == 1 and not _is_one(adapter) and isinstance(adapter, Sequence):
            asked *= max(1, len(adapter))
        names = self._names(adapter, len(asked))
        options = [self._read(prompt, generation, i) for i, prompt in enumerate(asked)]
        if reason := self._unsupported_reason:
            _warn_once(reason)
            return self._in_rows.generate(options, names, self._decode, progress=progress)
        requests = self._begin(options, names)
        try:
            results: list[Result] = []
            for request in _with_progress(requests, progress):
                results += request.results()
            return results
        except BaseException:
            for request in requests:
                request.cancel()
            raise

    def stream(self, prompt: Any, adapter: Adapter = ACTIVE, **generation: Any) -> Iterator[str]:
        """Answer one prompt, and yield the text as it comes; begin when the first is asked for.

        Args:
            prompt: as in ``generate``.
            adapter: likewise, one name.
            **generation: likewise.

        Raises:
            RuntimeError: this transformers is not one of those that were tested, or the engine has
                stopped.
            KeyError: there is no such adapter.
            ValueError: the prompt or an option cannot be used.
            TypeError: there is no such option.
        """
        request = self.submit(prompt, adapter, stream=True, **generation)
        try:
            yield from request
        finally:
            request.cancel()

    def submit(
        self, prompt: Any, adapter: Adapter = ACTIVE, *, stream: bool = False, **generation: Any
    ) -> Request:
        """Begin to answer one prompt, and return at once: what a server does.

        Args:
            prompt: as in ``generate``.
            adapter: likewise, one name.
            stream: whether iterating over the request gives the text as it comes.
            **generation: likewise.

        Returns:
            The request: ``result()``, ``cancel()``, and its text by iterating over it.

        Raises:
            RuntimeError: this transformers is not one of those that were tested, or the engine has
                stopped.
            KeyError: there is no such adapter.
            ValueError: the prompt or an option cannot be used.
            TypeError: there is no such option.
        """
        if reason := self._unsupported_reason:
            raise RuntimeError(
                f"{reason}: streaming needs transformers {hooks.TESTED}.x, and attention in every "
                "layer (generate() works without)"
            )
        names = self._names(adapter, 1)
        asked = as_prompts(prompt)
        if len(asked) != 1:
            raise ValueError(f"one prompt is needed, not {len(asked)}")
        options = self._read(asked[0], generation)
        if stream and options.sequences > 1:
            raise ValueError(f"one answer can be streamed, not {options.sequences}")
        (request,) = self._begin([options], names, stream=stream)
        return request

    def close(self) -> None:
        """Stop generating, and make the model what it was; requests under way are cancelled.

        The memory of ``adapters`` is free then; they can still be listed.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            manager, self._manager = self._manager, None
        try:
            self._requests.close()
            if manager is not None:
                manager.close()
        finally:
            # Also what nobody else ends: those that waited for an adapter when the manager died.
            self._requests.on_stop("the engine is closed")
            self._in_rows.close()
            detach(self.model)
            for module in self._was_training:
                module.training = True
            _open.discard(self)
            self.adapters._close()

    # Of an engine that is not made yet.
    _closed = True

    def __del__(self) -> None:
        if not self._closed:
            self.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        name = getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__
        state = "closed" if self._closed else f"{len(self._requests)} requests"
        return f"Engine({name}, {state})\n{self.adapters!r}"

    # A request from its prompt to the queue.

    @property
    def _unsupported_reason(self) -> str | None:
        return hooks.unsupported_reason() or hooks.unsupported_model(self.model)

    def _read(self, prompt: Any, generation: Mapping[str, Any], number: int = 0) -> Options:
        try:
            return self._reader.read(prompt, generation, self.tokenizer)
        except ValueError as error:
            if not number:
                raise
            raise ValueError(f"of prompt {number} (the first is 0): {error}") from error

    def _names(self, adapter: Adapter | Sequence[Adapter], count: int) -> list[str | None]:
        each = [adapter] * count if _is_one(adapter) else adapter
        if not isinstance(each, Sequence) or not all(map(_is_one, each)):
            raise TypeError(
                f"an adapter is a name, None, or one of these for each prompt, not {adapter!r:.100}"
            )
        if len(each) != count:
            raise ValueError(f"{len(each)} adapters were named for {count} prompts")
        return [self.adapters.active if name is ACTIVE else name for name in each]  # type: ignore[misc]

    def _begin(
        self, options: list[Options], names: list[str | None], *, stream: bool = False
    ) -> list[Request]:
        """Begin all of some requests, or raise and begin none."""
        manager = self._running()
        starts = [self._start_of(manager, each, stream) for each in options]
        leases: list[Lease] = []
        requests: list[Request] = []
        try:
            for name in names:
                leases.append(self.adapters.lease(name))
            for each, lease, start in zip(options, leases, starts, strict=True):
                request = Request(
                    id=f"request-{next(self._numbers)}",
                    adapter=lease.name,
                    prompt=each.tokens,
                    sequences=each.sequences,
                    _lease=lease,
                    _eos=frozenset(each.eos),
                    _stops=each.stop,
                    _decode=self._decode,
                    _cancel=self._cancel,
                )
                requests.append(request)
                self._requests.begin(request, functools.partial(start, request.id, uid=lease.uid))
        except BaseException:
            for request in requests:
                request.cancel()
            for lease in leases[len(requests) :]:
                self.adapters.give_back(lease)
            raise
        return requests

    def _start_of(self, manager: Any, options: Options, stream: bool) -> functools.partial[None]:
        """Check that a request can be answered, and return what begins it."""
        tokens, new_tokens = len(options.tokens), options.max_new_tokens
        if not options.has_length:
            new_tokens = max(1, min(new_tokens, manager.room - tokens))
        if tokens + new_tokens > manager.room:
            raise ValueError(
                f"{tokens} tokens and {new_tokens} new ones do not fit the cache of {manager.room} "
                "tokens: ask for fewer, or give it more "
                "(Engine(..., batching=ContinuousBatchingConfig(num_blocks=...)))"
            )
        return functools.partial(
            manager.submit,
            tokens=options.tokens,
            max_new_tokens=new_tokens,
            eos_token_id=options.eos,
            streaming=stream or options.stop is not None,
            sequences=options.sequences,
            sampling=options.sampling,
        )

    def _cancel(self, request: Request, names: Sequence[str]) -> None:
        if request.is_over or self._requests.withdraw(request):
            return
        if (manager := self._manager) is not None:
            for name in names:
                manager.cancel_request(name)

    def _decode(self, tokens: list[int]) -> str:
        if self.tokenizer is None:
            return ""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    # The manager.

    def _running(self) -> Any:
        """Return the manager, started; a new one where the last one has died of an error."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the engine is closed")
            if self._manager is not None and self._manager.error is not None:
                self._manager.close()
                self._manager = None
            if self._manager is None:
                self._manager = self._make_manager()
                self._manager.start()
            if (error := self._manager.error) is not None:
                raise RuntimeError(f"the engine has stopped: {error}") from error
            return self._manager

    def _make_manager(self) -> Any:
        from transformers import GenerationConfig

        # Ends, lengths and sampling are every request's own.
        config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        return hooks.make_manager(
            self.model,
            self.adapters,
            self._requests,
            config,
            batching_config(self.model, self._batching),
            vocabulary=self._reader.vocabulary,
            own_attention=needs_paged_attention(self.model),
        )


def _is_one(adapter: object) -> bool:
    return adapter is None or adapter is ACTIVE or isinstance(adapter, str)


def _with_progress(requests: list[Request], progress: bool) -> Iterator[Request]:
    from tqdm import tqdm

    bar: Iterator[Request] = tqdm(
        requests, desc="generating", unit="prompt", disable=None if progress else True
    )
    yield from bar


_warned: set[str] = set()


def _warn_once(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"{reason}: fastlora's engine generates without continuous batching, by model.generate",
            stacklevel=3,
        )


_open: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for engine in list(_open):
        engine.close()
