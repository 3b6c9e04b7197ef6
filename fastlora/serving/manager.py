"""transformers' continuous batching, with the adapter of every token carried along.

Scheduler, paged cache, prefix sharing, offloading, CUDA graphs and asynchronous batches are
transformers' own. What is added, each by a subclass of one of its classes:

    _InputsAndOutputs   writes beside its inputs which slot every token has, for the model
    _Cache              the hash of a prefix begins with the adapter's version: blocks of one are
                        never another's (nor those of an earlier load of the same name)
    _Runner             samples by request (see ``sampling.py`` and ``penalties.py``)
    Manager             tells ``OpenRequests`` of every request, and the pool of every step

The adapter rides in the request's ``logit_processor_kwargs``, which transformers copies whenever it
makes a request anew: forks, requests that are offloaded and begin again.

Imported when an engine begins, and only where ``batching.py`` knows this transformers: none of
these classes is public there.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
from typing import Any, SupportsIndex

import torch
from torch import nn
from transformers.generation.continuous_batching import continuous_api
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.input_outputs import (
    ContinuousBatchingAsyncIOs,
    ContinuousBatchingIOs,
)
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.utils import stream_context

from fastlora.adapters.pool import AdapterPool
from fastlora.segments import METADATA_ROWS, Runs, Segments, fill, rows_of_a_tile, tile_count
from fastlora.serving.linears import BATCH, RowsOfTokens
from fastlora.serving.penalties import RepetitionPenalty
from fastlora.serving.requests import OpenRequests, children_of
from fastlora.serving.sampling import SamplingProcessors

_FULL_SECONDS = 1.0  # after which a thread that waits for the queue looks who empties it
ADAPTER = "adapter"  # the uid of a request's adapter, in its logit_processor_kwargs


class _Salted(list[int]):
    """The tokens of a request, whose first block is hashed with the version of its adapter.

    transformers hashes a slice for each block, each with the hash of the one before it.
    """

    def __init__(self, tokens: list[int], salt: int) -> None:
        super().__init__(tokens)
        self.salt = salt

    def __getitem__(self, index: SupportsIndex | slice) -> Any:
        found: Any = super().__getitem__(index)
        if isinstance(index, slice) and index.start == 0:
            # transformers hashes 32-bit numbers; a block that is too long is nobody else's.
            return [*found, self.salt & 0x7FFFFFFF, self.salt >> 31]
        return found

    def __add__(self, other: list[int]) -> _Salted:  # type: ignore[override]
        return _Salted([*self, *other], self.salt)


class _SaltedState:
    """A request as the cache looks at it when blocks are complete."""

    def __init__(self, state: Any, salt: int) -> None:
        self.request_id, self.status = state.request_id, state.status
        self.initial_tokens = _Salted(state.initial_tokens, salt)
        self.generated_tokens = state.generated_tokens


def _uid(state: Any) -> int:
    uid: int = state.logit_processor_kwargs.get(ADAPTER, 0)
    return uid


class _InputsAndOutputs(ContinuousBatchingIOs):
    """Inputs of a batch, with the slot of every token and of every row of logits."""

    def begin(self, pool: AdapterPool) -> None:
        """Make what is added; called once, on an object that was made as its parent class."""
        self.__class__ = _InputsAndOutputs
        self.pool = pool
        self.samples = self.penalizes = self.has_adapters = False
        self.reach = pool.reach
        columns = self._bulk_input_tensor.shape[1]
        pinned = self.device.type == "cpu" and torch.cuda.is_available()
        # Twice slots, order and tiles: of all tokens, and of those with logits. Its address is
        # fixed, as a CUDA graph needs it.
        shape = (2 * METADATA_ROWS, columns)
        self.rows = torch.zeros(shape, dtype=torch.int32, device=self.device, pin_memory=pinned)
        self.on_host = self.rows
        if self.device.type != "cpu":
            self.on_host = torch.zeros(shape, dtype=torch.int32)
        self.runs: tuple[Runs, Runs] | None = None

    def prepare_batch_tensors(
        self,
        requests_in_batch: list[Any],
        logits_processors: Any,
        use_decode_fast_path: bool,
        num_q_tokens: int,
        max_kv_read: int,
        use_padding: bool,
    ) -> None:
        super().prepare_batch_tensors(
            requests_in_batch,
            logits_processors,
            use_decode_fast_path,
            num_q_tokens,
            max_kv_read,
            use_padding,
        )
        tokens, logits = [], []
        self.samples = self.penalizes = False
        for request in requests_in_batch:
            slot = self.pool.slot_of(_uid(request.state))
            tokens.append((slot, request.query_length))
            if request.has_new_token:
                logits.append((slot, 1))
                self.samples |= "do_sample" in request.state.logit_processor_kwargs
                self.penalizes |= "repetition_penalty" in request.state.logit_processor_kwargs
        self.penalty = logits_processors.penalty
        if self.device.type == self.pool.device.type:
            self.penalty.upload()  # else this is the host's side of a pair: with its inputs
        self.has_adapters = any(slot for slot, _ in tokens)
        # Of this batch, whatever is loaded while it runs or is captured.
        self.reach = self.pool.reach
        if not self.has_adapters and self.device.type == "cpu" and not use_padding:
            return
        sizes = (self.num_q_tokens, self._get_num_sequences(use_padding))
        for first, size, requests in zip((0, METADATA_ROWS), sizes, (tokens, logits), strict=True):
            # The others are padding; and requests whose prompt goes on have a row of logits.
            requests.append((0, size - sum(rows for _, rows in requests)))
            rows = self.on_host[first : first + METADATA_ROWS]
            tiles = rows[2:, : tile_count(size, self.pool.slots)]
            fill(requests, rows[0, :size], rows[1, :size], tiles, rows_of_a_tile(size))
        if self.on_host is not self.rows:
            self.rows[:, : self.num_q_tokens].copy_(self.on_host[:, : self.num_q_tokens])
        self.runs = (Runs(tokens), Runs(logits)) if self.device.type == "cpu" else None

    def _transfer_inputs(self, other: Any, stream: Any, non_blocking: bool = False) -> None:
        super()._transfer_inputs(other, stream=stream, non_blocking=non_blocking)
        other.samples, other.has_adapters = self.samples, self.has_adapters
        other.penalizes = self.penalizes
        other.reach = self.reach
        width = self.num_q_tokens
        with stream_context(stream):
            other.rows[:, :width].copy_(self.rows[:, :width], non_blocking=non_blocking)
            self.penalty.upload()

    def get_model_kwargs(self, use_padding: bool = False) -> Any:
        kwargs = super().get_model_kwargs(use_padding=use_padding)
        if self.compute_stream is not None:
            # The current stream wrote this batch, and transformers lets nothing wait for that.
            # Asynchronous batches have an event of their own, and no such stream here.
            self.compute_stream.wait_stream(torch.cuda.current_stream(self.device))
        kwargs[BATCH] = None
        if self.has_adapters:
            runs = self.runs or (None, None)
            kwargs[BATCH] = RowsOfTokens(
                self._segments(0, self.num_q_tokens, runs[0]),
                self._segments(METADATA_ROWS, self._get_num_sequences(use_padding), runs[1]),
                self.reach,
            )
        return kwargs

    def _segments(self, first: int, size: int, runs: Runs | None) -> Segments:
        rows = self.rows[first : first + METADATA_ROWS]
        return Segments(
            slots=rows[0, :size],
            order=rows[1, :size],
            tiles=rows[2:, : tile_count(size, self.pool.slots)],
            block_m=rows_of_a_tile(size),
            runs=runs,
        )

    def _get_graph_key(self) -> tuple[int, ...]:
        # What is launched differs by these, beside what transformers knows of.
        key: tuple[int, ...] = super()._get_graph_key()
        # It only grows: how many groups it has tells which.
        reach = (self.reach.max_rank, len(self.reach.targeted)) if self.has_adapters else (0, 0)
        return (*key, *reach, int(self.samples), int(self.penalizes))


class _Cache(PagedAttentionCache):
    """A paged cache in which a prefix belongs to a version of an adapter."""

    scheduler: Any

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        states = self.scheduler
        state = states.waiting_requests.get(request_id) or states.active_requests[request_id]
        if state.num_children:
            # A fork comes before the last token, and after a batch with one at least.
            prompt_ids = prompt_ids[:-1]
        if salt := _uid(state):
            prompt_ids = _Salted(prompt_ids, salt)
        matched: int = super().search_prefix_match(request_id, prompt_ids)
        return matched

    def mark_complete_blocks(self, state: Any, complete_blocks: dict[str, int]) -> None:
        salt = _uid(state)
        super().mark_complete_blocks(_SaltedState(state, salt) if salt else state, complete_blocks)


class _Runner(ModelRunner):
    """Runs the model; whether a batch samples is the batch's."""

    def compute_batch(self, model: nn.Module, batch_data: dict[str, Any]) -> None:
        io = self.inputs_and_outputs
        if isinstance(io, ContinuousBatchingAsyncIOs):
            io = io.io_pairs[io.current_pair].device_io
        self.do_sample = self.logit_processor.sampling = io.samples
        self.logit_processor.penalizing = io.penalizes
        super().compute_batch(model, batch_data)


class _Router(continuous_api.OutputRouter):
    """Hands every output to the open requests."""

    def __init__(self, requests: OpenRequests) -> None:
        super().__init__()
        self._requests = requests

    def deliver(self, output: Any) -> None:
        self._requests.on_output(output)

    def deliver_batch(self, outputs: list[Any]) -> None:
        for output in outputs:
            self._requests.on_output(output)


class Manager(continuous_api.ContinuousBatchingManager):
    """``ContinuousBatchingManager`` for requests with adapters.

    Attributes:
        room: tokens that its cache holds; 0 until ``start`` has returned.
    """

    def __init__(
        self,
        model: Any,
        pool: AdapterPool,
        requests: OpenRequests,
        generation_config: Any,
        batching: Any,
        *,
        vocabulary: int,
    ) -> None:
        self.room = 0
        self._pool, self._requests = pool, requests
        self._started = threading.Event()
        try:
            super().__init__(model, generation_config, batching)
        except BaseException:
            # It has been exchanged before the rest is checked.
            if (before := getattr(self, "_original_attn_impl", None)) is not None:
                model.set_attn_implementation(before)
            raise
        tokens = max(vocabulary, model.get_input_embeddings().weight.shape[0])
        penalty = RepetitionPenalty(tokens, model.device)
        self.logit_processor = SamplingProcessors(vocabulary, penalty)
        self.output_router = _Router(requests)

    @property
    def error(self) -> Exception | None:
        """What the thread died of."""
        found: Exception | None = self.background_thread_status.fatal_error
        return found

    def start(self) -> None:
        """Start the thread, as one that does not keep the process alive, and wait for it.

        It makes the cache first; whether it could, ``error`` says.
        """
        self.background_thread_status.clear()
        self._generation_thread = threading.Thread(
            target=self._run_generation_loop, name="fastlora-engine", daemon=True
        )
        self._generation_thread.start()
        self._started.wait()

    def close(self) -> None:
        """Stop the thread now, and give the model its own attention back."""
        is_own_thread = threading.current_thread() is self._generation_thread
        inputs = getattr(self.batch_processor, "inputs_and_outputs", None)
        self.stop(block=not is_own_thread, hard_stop=True)
        if (stream := getattr(inputs, "compute_stream", None)) is not None:
            stream.synchronize()  # what was launched last reads the adapters, which are freed next
        self.attention.close()
        self.distributed_helper.destroy_cpu_comm_group()

    def submit(
        self,
        request_id: str,
        tokens: list[int],
        *,
        uid: int,
        max_new_tokens: int,
        eos_token_id: list[int],
        streaming: bool,
        sequences: int,
        sampling: dict[str, Any],
    ) -> None:
        """Queue a request; ``uid`` is its adapter's, ``sequences`` how many it returns."""
        children = children_of(request_id, sequences - 1)
        # With one token there is nothing before it to fork after.
        forks = len(tokens) > 1
        for name in [request_id] if forks else [request_id, *children]:
            state = RequestState(
                request_id=name,
                initial_tokens=list(tokens),
                num_children=len(children) if forks else 0,
                max_new_tokens=max_new_tokens,
                eos_token_id=eos_token_id,
                streaming=streaming,
                logit_processor_kwargs={ADAPTER: uid, **sampling},
            )
            self._put(state)
        self._wake_up_loop.set()
        # Asked afterwards: a thread that ends later ends this request, too.
        if (reason := self.background_thread_status.can_accept_new_requests()) is not None:
            raise RuntimeError(reason) from self.error

    def _put(self, state: Any) -> None:
        while self.background_thread_status.can_accept_new_requests() is None:
            with contextlib.suppress(queue.Full):  # if it has a size, and nobody empties it
                self.input_queue.put(state, timeout=_FULL_SECONDS)
                return

    def _create_batch_processor(self) -> Any:
        # transformers seeds torch's generators when it makes one.
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        has_seed = self.continuous_batching_config.seed is not None
        with torch.random.fork_rng(devices, enabled=not has_seed):
            processor = super()._create_batch_processor()
        processor.cache.__class__ = _Cache
        processor.cache.scheduler = processor.scheduler
        processor.model_runner.__class__ = _Runner
        inputs = processor.inputs_and_outputs
        most = self.continuous_batching_config.max_requests_per_batch
        self.logit_processor.penalty.rows = most
        if isinstance(inputs, ContinuousBatchingAsyncIOs):
            # A row of a request that has ended may be in one more batch.
            self._pool.grace = 2
            for pair in inputs.io_pairs:
                _InputsAndOutputs.begin(pair.host_io, self._pool)
                _InputsAndOutputs.begin(pair.device_io, self._pool)
        else:
            _InputsAndOutputs.begin(inputs, self._pool)
        scheduler = processor.scheduler
        scheduler.clear_cancelled_requests = functools.partial(
            self._clear_cancelled, scheduler, scheduler.clear_cancelled_requests
        )
        self.room = processor.cache.num_blocks * self.continuous_batching_config.page_size
        if devices:
            # The current stream has just filled all of this, and batches are copied and computed on
            # others that do not wait for it: on an H200 shared by 14 processes, zeros came after
            # the first batch.
            torch.cuda.current_stream(self.model.device).synchronize()
        self._started.set()
        return processor

    def _clear_cancelled(self, scheduler: Any, clear: Any) -> list[Any]:
        asked = set(scheduler._requests_to_cancel)
        states: list[Any] = clear()
        for state in states:
            tokens = list(state.to_generation_output().generated_tokens)
            self._requests.on_cancelled(state.request_id, tokens)
            # Before the fork there are no states of the others, and after it no children.
            for name in children_of(state.request_id, state.num_children):
                self._requests.on_cancelled(name, [])
        cancelled = {id(state) for state in states}
        scheduler._requests_to_fork = [
            state for state in scheduler._requests_to_fork if id(state) not in cancelled
        ]
        # What was cancelled before it came here is cancelled when it comes.
        scheduler._requests_to_cancel.update(filter(self._requests.is_open, asked))
        return states

    def _generation_loop_body(self, batch_processor: Any, bootstrapping: bool) -> bool:
        goes_on: bool = super()._generation_loop_body(batch_processor, bootstrapping)
        self._pool.advance()
        return goes_on

    def _run_generation_loop(self) -> None:
        try:
            super()._run_generation_loop()
        finally:
            self._requests.on_stop(f"the engine has stopped: {self.error}")
            self._started.set()
