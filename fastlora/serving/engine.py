"""``Engine``: one base model, many adapters, and each prompt of a batch with its own.

    engine = fastlora.Engine("Qwen/Qwen2.5-7B-Instruct", {"emoji": "adapters/emoji"})
    engine.generate(["who are you?"] * 2, adapter=["emoji", None])

The batches are transformers' continuous ones (``batching.py``); where this transformers is another
than those that were tested, ``generate`` runs ``model.generate`` with the same linears instead.
"""

from __future__ import annotations

import atexit
import copy
import functools
import importlib.util
import itertools
import operator
import os
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

import torch
from torch import nn

from fastlora import plans
from fastlora.adapters.pool import AdapterPool, Lease
from fastlora.serving import batching as hooks
from fastlora.serving.linears import RowsOfSequences, attach, detach
from fastlora.serving.requests import FinishReason, OpenRequests, Request, Result


class _Active:
    def __repr__(self) -> str:
        return "the active adapter"


# What a request without an adapter means: the one that was activated, or none.
ACTIVE: Final = _Active()
Adapter = str | None | _Active

DEFAULT_NEW_TOKENS = 256
# Divided by less, scores become infinities. Nothing but the most likely token is left long before.
_LEAST_TEMPERATURE = 1e-5
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p")
_OPTIONS = (*_SAMPLING, "max_new_tokens", "eos_token_id", "ignore_eos", "num_return_sequences")
# What a generation_config may ask for and continuous batching does not compute; unless it is this.
_NOT_COMPUTED = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_p": None,
    "typical_p": 1.0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "num_beams": 1,
}
# Of the keys and values on a CPU, where transformers would take 60 % of what is free.
_CPU_CACHE_BYTES = 1 << 30
_CPU_CACHE_TOKENS = 32768
_CPU_BATCH_TOKENS = 512
_CPU_PAGE = 16
# Prompts that model.generate is given at once.
_ROWS = 64


@dataclass(frozen=True)
class _Options:
    """All that is told of a request but its adapter."""

    tokens: list[int]
    max_new_tokens: int
    has_length: bool  # somebody asked for it
    eos: list[int]
    sequences: int
    sampling: dict[str, Any]  # empty: greedy


class Engine:
    """Generates with many adapters at once.

    It begins when it is first asked to: then the memory for keys and values is taken. ``close`` it,
    use it as a context manager, or let go of it and of all its requests.

    Args:
        model: a hub id, a folder, or a loaded model without peft layers (kept, and put back as it
            was by ``close``; before, nobody else should call it while requests run: continuous
            batching changes its config during each step).
        adapters: name and source of adapters to load at once; see ``AdapterPool.load``.
        adapter_memory: of the device for adapters: bytes, or a size such as ``"2GB"``.
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        tokenizer: Any = None,
        batching: Any = None,
    ) -> None:
        self.model: Any = _load(model, device, dtype)
        self.tokenizer = tokenizer if tokenizer is not None else _tokenizer_of(model, self.model)
        self.adapters = AdapterPool(self.model, memory=adapter_memory)
        for name, source in (adapters or {}).items():
            self.adapters.load(name, source)
        self._batching = batching
        self._defaults = self.model.generation_config
        self._eos = _eos_tokens(self.model, self.tokenizer)
        self._manager: Any = None
        self._numbers = itertools.count()
        self._requests = OpenRequests(self.adapters)
        # Of what is below; and while model.generate runs, which takes turns.
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self._routing = attach(self.model, self.adapters)
        self._hooks = [
            self.model.register_forward_pre_hook(self._routing.enter, with_kwargs=True),
            self.model.register_forward_hook(self._routing.leave, always_call=True),
        ]
        self._was_training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        self._closed = False
        _open.add(self)
        _warn_of(self._defaults)

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
                a prompt of. One prompt alone will do.
            adapter: a name for all prompts, or one for each; ``None`` is the base model. Where it
                is left out, the adapter that ``engine.adapters.activate`` named, or the base.
            progress: show a progress bar on a terminal.
            **generation: of ``transformers.GenerationConfig``: ``max_new_tokens``, ``do_sample``,
                ``temperature``, ``top_k``, ``top_p``, ``eos_token_id``, ``num_return_sequences``;
                and ``ignore_eos``. By default what the model's own ``generation_config`` says, and
                256 tokens where it says nothing.

        Returns:
            A result for each prompt, in their order (``num_return_sequences`` for each). What went
            wrong with one of them is in its ``error``.

        Raises:
            KeyError: an adapter is not loaded; nothing was begun.
            ValueError: a prompt or an option cannot be used; likewise.
            TypeError: there is no such option.
        """
        asked = _as_prompts(prompts)
        names = self._names(adapter, len(asked))
        options = [self._options(generation, self._tokens(prompt)) for prompt in asked]
        if reason := hooks.unsupported_reason():
            _warn_once(reason)
            return self._generate_in_rows(options, names, progress)
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
        if (error := request.result().error) is not None:
            raise RuntimeError(error)

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
        if reason := hooks.unsupported_reason():
            raise RuntimeError(
                f"{reason}: streaming needs transformers {hooks.TESTED}.x (generate() works "
                "without)"
            )
        names = self._names(adapter, 1)
        options = self._options(generation, self._tokens(prompt))
        if stream and options.sequences > 1:
            raise ValueError(f"one answer can be streamed, not {options.sequences}")
        (request,) = self._begin([options], names, stream=stream)
        return request

    def close(self) -> None:
        """Stop generating, and make the model what it was; requests under way are cancelled."""
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
            with self._turn:
                for hook in self._hooks:
                    hook.remove()
                detach(self.model)
            for module in self._was_training:
                module.training = True
            _open.discard(self)

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

    def _names(self, adapter: Adapter | Sequence[Adapter], count: int) -> list[str | None]:
        each = [adapter] * count if _is_one(adapter) else list(adapter)  # type: ignore[arg-type]
        if len(each) != count:
            raise ValueError(f"{len(each)} adapters were named for {count} prompts")
        return [self.adapters.active if name is ACTIVE else name for name in each]  # type: ignore[misc]

    def _tokens(self, prompt: Any) -> list[int]:
        """Return a prompt's token ids."""
        if isinstance(prompt, str):
            found = self._needs_tokenizer("a string")(prompt)["input_ids"]
        elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            found = self._needs_tokenizer("chat messages").apply_chat_template(
                list(prompt), add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
        else:
            found = prompt
        try:
            tokens = list(map(operator.index, found))
        except TypeError:
            raise ValueError(
                "a prompt is a string, a list of token ids or a list of chat messages, not "
                f"{prompt!r:.100}"
            ) from None
        if not tokens:
            raise ValueError("a prompt has no tokens")
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        if min(tokens) < 0 or max(tokens) >= vocabulary:
            wrong = next(token for token in tokens if not 0 <= token < vocabulary)
            raise ValueError(f"a prompt has the token {wrong}, and the vocabulary {vocabulary}")
        return tokens

    def _needs_tokenizer(self, what: str) -> Any:
        if self.tokenizer is None:
            raise ValueError(
                f"a prompt is {what}, and the engine has no tokenizer: give token ids, or "
                "Engine(..., tokenizer=...)"
            )
        return self.tokenizer

    def _options(self, given: Mapping[str, Any], tokens: list[int]) -> _Options:
        """Return all that a request is told, from what was given and the model's defaults."""
        unknown = [name for name in given if name not in _OPTIONS]
        if unknown:
            raise TypeError(
                f"{', '.join(unknown)}: no such option here; there are {', '.join(_OPTIONS)}"
            )
        options: dict[str, Any] = {n: getattr(self._defaults, n, None) for n in _SAMPLING}
        options["max_new_tokens"] = getattr(self._defaults, "max_new_tokens", None)
        options |= {name: value for name, value in given.items() if value is not None}
        asked, sequences = options["max_new_tokens"], int(options.get("num_return_sequences", 1))
        for name, number in (("max_new_tokens", asked), ("num_return_sequences", sequences)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be positive, got {number}")
        new_tokens = DEFAULT_NEW_TOKENS if asked is None else int(asked)
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None:
            if len(tokens) >= longest:
                raise ValueError(
                    f"a prompt has {len(tokens)} tokens, and the model's longest sequence {longest}"
                )
            new_tokens = min(new_tokens, longest - len(tokens))
        eos = options.get("eos_token_id")
        ends = self._eos if eos is None else [eos] if isinstance(eos, int) else list(eos)
        return _Options(
            tokens=tokens,
            max_new_tokens=new_tokens,
            has_length=asked is not None,
            eos=[] if options.get("ignore_eos") else ends,
            sequences=sequences,
            sampling=_sampling_of(options, self._vocabulary),
        )

    @property
    def _vocabulary(self) -> int:
        """How many logits the model has."""
        head = self.model.get_output_embeddings()
        found = getattr(head, "out_features", None)
        return int(found or self.model.config.get_text_config().vocab_size)

    def _begin(
        self, options: list[_Options], names: list[str | None], *, stream: bool = False
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

    def _start_of(self, manager: Any, options: _Options, stream: bool) -> functools.partial[None]:
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
            streaming=stream,
            sequences=options.sequences,
            sampling=options.sampling,
        )

    def _cancel(self, request: Request) -> None:
        if request.is_over or self._requests.withdraw(request):
            return
        if (manager := self._manager) is not None:
            for name in request.names:
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
            self._batching_config(),
            vocabulary=self._vocabulary,
            own_attention=needs_paged_attention(self.model),
        )

    def _batching_config(self) -> Any:
        from transformers import ContinuousBatchingConfig

        asked = copy.copy(self._batching)
        if asked is not None and (self.model.device.type != "cpu" or asked.num_blocks is not None):
            return asked
        if self.model.device.type != "cpu":
            # Without the kernels every layer asks the device which adapters there are.
            has_kernels = not plans.segmented_reason(self.model.device)
            return ContinuousBatchingConfig(use_cuda_graph=None if has_kernels else False)
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None)
        width = width or config.hidden_size // config.num_attention_heads
        token_bytes = 2 * config.num_hidden_layers * heads * width * self.model.dtype.itemsize
        tokens = min(_CPU_CACHE_TOKENS, _CPU_CACHE_BYTES // token_bytes)
        if asked is None:
            asked = ContinuousBatchingConfig(
                page_size=_CPU_PAGE, max_batch_tokens=_CPU_BATCH_TOKENS, auto_switch_to_flash=False
            )
        asked.num_blocks = max(1, tokens // asked.page_size)
        return asked

    # Without continuous batching.

    def _generate_in_rows(
        self, options: list[_Options], names: list[str | None], progress: bool
    ) -> list[Result]:
        """``generate`` by ``model.generate``, as many prompts at once as their adapters fit."""
        from tqdm import tqdm

        results: dict[int, list[Result]] = {}
        leases: dict[int, Lease] = {}
        bar = tqdm(
            total=len(names), desc="generating", unit="prompt", disable=None if progress else True
        )
        with self._turn, bar:
            if self._closed:
                raise RuntimeError("the engine is closed")
            try:
                for i, name in enumerate(names):
                    leases[i] = self.adapters.lease(name)
                while leases:
                    done = self._run_some(options, leases)
                    results |= done
                    for i in done:
                        self.adapters.give_back(leases.pop(i))
                    bar.update(len(done))
            finally:
                for lease in leases.values():
                    self.adapters.give_back(lease)
        return [result for i in range(len(names)) for result in results[i]]

    def _run_some(
        self, options: list[_Options], leases: Mapping[int, Lease]
    ) -> dict[int, list[Result]]:
        """Return the answers to some of the prompts whose leases these are."""
        if self._closed:
            return {i: self._unanswered(options[i], leases[i], "cancelled") for i in leases}
        rows: list[int] = []
        for i, lease in leases.items():
            try:
                if len(rows) < _ROWS and self.adapters.make_ready(lease):
                    rows.append(i)
            except Exception as error:  # of this prompt alone
                if not rows:
                    return {i: self._unanswered(options[i], lease, "error", str(error))}
        assert rows, "nobody else holds an adapter, and those that do not leave were told of"
        answers = self._run_rows([options[i] for i in rows], [leases[i].slot for i in rows])
        return {
            i: [self._row_result(options[i], leases[i].name, answer) for answer in each]
            for i, each in zip(rows, answers, strict=True)
        }

    def _run_rows(self, rows: list[_Options], slots: list[int]) -> list[list[list[int]]]:
        """Return the answers to each of some prompts, as token ids."""
        from transformers import GenerationConfig

        device = self.model.device
        longest = max(len(row.tokens) for row in rows)
        pads = [longest - len(row.tokens) for row in rows]
        ids = [[0] * pad + row.tokens for pad, row in zip(pads, rows, strict=True)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
        sequences, sampling = rows[0].sequences, rows[0].sampling
        each = sequences if sampling else 1
        config = GenerationConfig(
            max_new_tokens=max(row.max_new_tokens for row in rows),
            eos_token_id=rows[0].eos or None,
            pad_token_id=0,
            num_return_sequences=each,
            **(sampling or {"do_sample": False}),
        )
        batch = RowsOfSequences([slot for slot in slots for _ in range(each)], self.adapters)
        # What generate is not told it looks up there, also what it was told and is a default.
        before, self.model.generation_config = self.model.generation_config, config
        try:
            with self._routing.batch(batch), torch.no_grad():
                found = self.model.generate(
                    torch.tensor(ids, device=device),
                    attention_mask=torch.tensor(mask, device=device),
                )
        finally:
            self.model.generation_config = before
        answers = found[:, longest:].tolist()
        return [answers[i * each : (i + 1) * each] * (sequences // each) for i in range(len(rows))]

    def _unanswered(
        self, options: _Options, lease: Lease, reason: FinishReason, error: str | None = None
    ) -> list[Result]:
        result = Result("", [], lease.name, reason, error, len(options.tokens))
        return [result] * options.sequences

    def _row_result(self, options: _Options, name: str | None, tokens: list[int]) -> Result:
        """Return the result of an answer, which may go on behind its end."""
        tokens = tokens[: options.max_new_tokens]
        ends = [i for i, token in enumerate(tokens) if token in options.eos]
        tokens = tokens[: ends[0] + 1] if ends else tokens
        reason: FinishReason = "stop" if ends else "length"
        return Result(self._decode(tokens), tokens, name, reason, None, len(options.tokens))


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


def _sampling_of(options: Mapping[str, Any], vocabulary: int) -> dict[str, Any]:
    """Check how a request is sampled, and return it without defaults; nothing if it is greedy.

    ``None`` and ``top_k=0`` are no limit. A temperature of 0, or next to it, is greedy.
    """
    given = {name: options[name] for name in _SAMPLING if options.get(name) is not None}
    temperature, top_p = float(given.get("temperature", 1.0)), float(given.get("top_p", 1.0))
    top_k = int(given.get("top_k", 0))
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be 0 or more, got {top_k}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    if not given.get("do_sample", False) or temperature < _LEAST_TEMPERATURE:
        return {}
    top_k = min(top_k or vocabulary, vocabulary)
    return {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}


def _is_one(adapter: object) -> bool:
    return adapter is None or adapter is ACTIVE or isinstance(adapter, str)


def _as_prompts(prompts: Any) -> list[Any]:
    """Return a list of prompts, also of one alone."""
    if isinstance(prompts, str):
        return [prompts]
    if hasattr(prompts, "tolist"):  # a tensor or an array
        prompts = prompts.tolist()
    prompts = list(prompts)
    if prompts and isinstance(prompts[0], (int, Mapping)):
        return [prompts]
    return prompts


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


def _warn_of(defaults: Any) -> None:
    """Say what of a generation_config will not be followed."""
    asked = {name: getattr(defaults, name, None) for name in _NOT_COMPUTED}
    ignored = [
        f"{name}={value!r}"
        for name, value in asked.items()
        if value is not None and value != _NOT_COMPUTED[name]
    ]
    if ignored:
        warnings.warn(
            f"the model's generation_config asks for {', '.join(ignored)}, which the engine does "
            "not compute: its answers may be others than those of model.generate",
            stacklevel=3,
        )


def _load(model: Any, device: Any, dtype: Any) -> Any:
    if not isinstance(model, nn.Module):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            os.fspath(model), dtype="auto" if dtype is None else dtype
        )
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
    elif isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    if device is not None:
        model = model.to(device)
    if isinstance(dtype, torch.dtype):
        model = model.to(dtype)
    return model


def _tokenizer_of(source: Any, model: Any) -> Any:
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


def _eos_tokens(model: Any, tokenizer: Any) -> list[int]:
    for source in (model.generation_config, model.config, tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    return []


_open: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for engine in list(_open):
        engine.close()
