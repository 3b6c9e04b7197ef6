"""The requests of an engine: what each was answered with, and how it comes to be answered.

A request is *open* from ``OpenRequests.begin`` until the last of its sequences has ended, and has a
lease of its adapter as long. Where the adapter is not on the device the request waits, and a thread
brings the adapters of those that wait there, one after the other.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fastlora.adapters.pool import AdapterPool
from fastlora.adapters.versions import Lease
from fastlora.serving.stops import StopStrings

FinishReason = Literal["stop", "length", "cancelled", "error"]

_logger = logging.getLogger(__name__)
_CHILD = "__child#"  # in the ids of transformers, of all sequences of a request but the first
# An adapter that an asynchronous batch has used may leave only a while after its requests ended.
RETRY_SECONDS = 0.05


@dataclass(frozen=True)
class Result:
    """What a prompt was answered with.

    Attributes:
        text: the answer without special tokens; empty where the engine has no tokenizer.
        token_ids: of the answer, with the token that ended it.
        adapter: that answered; ``None`` for the base model.
        finish_reason: ``"stop"`` (an end-of-sequence token or a stop string), ``"length"``
            (``max_new_tokens``), ``"cancelled"`` or ``"error"``.
        error: what went wrong, else ``None``.
        prompt_tokens: number of tokens of the prompt.
    """

    text: str
    token_ids: list[int]
    adapter: str | None
    finish_reason: FinishReason
    error: str | None = None
    prompt_tokens: int = 0


@dataclass(eq=False)
class Request:
    """A prompt under way, as ``Engine.submit`` returns it.

    Iterating over it gives the text as it comes (if it was submitted with ``stream=True``, else all
    of it at the end); ``result`` waits for the end. Both may be done again, and by any thread.

    Attributes:
        id: of the request.
        adapter: that answers, ``None`` for the base model.
        prompt: token ids.
        sequences: how many answers there will be.
    """

    id: str
    adapter: str | None
    prompt: list[int] = field(repr=False)
    sequences: int
    _lease: Lease = field(repr=False)
    _eos: frozenset[int] = field(repr=False)
    _stops: StopStrings | None = field(repr=False)
    # The engine's own methods: it is alive as long as somebody waits for an answer.
    _decode: Callable[[list[int]], str] = field(repr=False)
    _cancel: Callable[[Request, Sequence[str]], None] = field(repr=False)
    _is_left: bool = field(default=False, repr=False)  # by whoever asked
    # Of each sequence the tokens so far, and why it ended; of those that have come to a stop
    # string, how many tokens they are.
    _tokens: dict[str, list[int]] = field(default_factory=dict, repr=False)
    _stopped: dict[str, int] = field(default_factory=dict, repr=False)
    _ended: dict[str, tuple[FinishReason, str | None]] = field(default_factory=dict, repr=False)
    _changed: threading.Condition = field(default_factory=threading.Condition, repr=False)

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the answer.

        Args:
            timeout: seconds to wait; by default for as long as it takes.

        Raises:
            TimeoutError: it has not ended in that time.
        """
        return self.results(timeout)[0]

    def results(self, timeout: float | None = None) -> list[Result]:
        """Wait for all of a request's ``num_return_sequences`` answers; see ``result``."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.is_over, timeout):
                raise TimeoutError(f"request {self.id} is not over after {timeout} s")
        return [self._result(name) for name in self.names]

    def __iter__(self) -> Iterator[str]:
        """Yield the (first) answer's text in pieces that are whole characters.

        Raises:
            RuntimeError: at its end, if it ended by an error, or because the engine was closed.
        """
        seen = 0
        # What is decoded is the tokens from ``start`` on, of which those before ``shown`` were
        # yielded: a token's text may depend on the one before it.
        start = shown = 0
        ended = False
        while not ended:
            with self._changed:
                while not self.has_ended(self.id) and len(self._tokens.get(self.id, ())) == seen:
                    self._changed.wait()
                ended, tokens = self.has_ended(self.id), self._tokens[self.id]
            seen = len(tokens)
            before, text = self._decode(tokens[start:shown]), self._decode(tokens[start:])
            # A character of several tokens is not complete yet.
            if len(text) > len(before) and (ended or not text.endswith("\ufffd")):
                start, shown = shown, seen
                yield text[len(before) :]
        reason, error = self._ended[self.id]
        if reason == "error":
            raise RuntimeError(error)
        if reason == "cancelled" and not self._is_left:
            raise RuntimeError("the engine was closed before the answer was complete")

    def cancel(self) -> None:
        """Stop it; what has been generated is its result."""
        self._is_left = True
        self._cancel(self, self.names)

    @property
    def is_over(self) -> bool:
        """Whether all of its sequences have ended."""
        return len(self._ended) == self.sequences

    @property
    def names(self) -> list[str]:
        """The ids under which transformers knows its sequences."""
        return [self.id, *children_of(self.id, self.sequences - 1)]

    # The engine's side; none of it raises.

    def put(self, name: str, tokens: list[int]) -> None:
        """Take the tokens so far of a sequence that goes on, and cancel it at a stop string."""
        if name in self._stopped:
            return
        tokens = self._up_to_stop(name, tokens)
        with self._changed:
            self._tokens[name] = tokens
            self._changed.notify_all()
        if name in self._stopped:
            self._cancel(self, [name])

    def end(self, name: str, tokens: list[int], reason: FinishReason, error: str | None) -> None:
        """End a sequence, once."""
        tokens = self._up_to_stop(name, tokens)
        if name in self._stopped:
            reason, error = "stop", None
        with self._changed:
            if name not in self._ended:
                self._tokens[name], self._ended[name] = tokens, (reason, error)
                self._changed.notify_all()

    def _up_to_stop(self, name: str, tokens: list[int]) -> list[int]:
        if self._stops is not None and name not in self._stopped:
            end = None
            # What cannot be decoded has no stop string; whoever asks for the text hears of it.
            with contextlib.suppress(Exception):
                end = self._stops.end_of(tokens, known=len(self._tokens.get(name, ())))
            if end is not None:
                self._stopped[name] = end
        return tokens[: self._stopped.get(name)]

    def has_ended(self, name: str) -> bool:
        """Return whether a sequence has ended."""
        return name in self._ended

    def _result(self, name: str) -> Result:
        tokens, (reason, error) = self._tokens[name], self._ended[name]
        text = self._decode(tokens)
        return Result(text, tokens, self.adapter, reason, error, len(self.prompt))


def children_of(request_id: str, count: int) -> list[str]:
    """Return the ids that transformers gives to the forks of a request."""
    return [f"{request_id}{_CHILD}{i}" for i in range(count)]


class OpenRequests:
    """The requests of one engine that are not over.

    Args:
        pool: of their adapters.
    """

    def __init__(self, pool: AdapterPool) -> None:
        self._pool = pool
        self._open: dict[str, Request] = {}
        # Those whose adapter is not on the device, and what starts each.
        self._waiting: deque[tuple[Request, Callable[[], None]]] = deque()
        # The first of them found no room. Then nobody overtakes it, or it might wait for ever.
        self._starved = False
        self._closed = False
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._loader: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, request: Request, start: Callable[[], None]) -> None:
        """Open a request, and start it as soon as its adapter is on the device.

        Args:
            request: with its lease, which ends with it, or if this raises.
            start: queues it; may raise. Called here or by a thread of this object's.

        Raises:
            RuntimeError: this was closed.
            Exception: what ``start`` raises.
        """
        with self._lock:
            if self._closed:
                self._pool.give_back(request._lease)
                raise RuntimeError("the engine is closed")
            self._open[request.id] = request
            waits = request.adapter is not None and self._starved
            if waits or not self._pool.hold(request._lease):
                self._waiting.append((request, start))
                self._wake_loader()
                return
        try:
            start()
        except BaseException as error:
            self._end_all(request, "error", str(error))
            raise

    def withdraw(self, request: Request) -> bool:
        """Cancel a request that waits; ``False`` if it does not (any more)."""
        with self._lock:
            if not self._take(request):
                return False
            self._end_all(request, "cancelled", None)
            return True

    def is_open(self, name: str) -> bool:
        """Return whether a sequence, by its id, has yet to end."""
        request = self._request_of(name)
        return request is not None and not request.has_ended(name)

    def close(self) -> None:
        """Start none any more; what ends from now on, ``on_stop`` at the latest, was cancelled."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
        self._wake.set()
        loader = self._loader
        if loader is not None and loader is not threading.current_thread():
            loader.join()

    # What the thread that generates tells; nothing here may raise.

    def on_output(self, output: Any) -> None:
        """Take a ``GenerationOutput``."""
        name, tokens = output.request_id, list(output.generated_tokens)
        request = self._request_of(name)
        if request is None:
            return
        if not output.is_finished():
            request.put(name, tokens)
        elif output.error is not None:
            self._end(request, name, tokens, self._reason_of_error, output.error)
        else:
            is_eos = tokens and tokens[-1] in request._eos
            self._end(request, name, tokens, "stop" if is_eos else "length", None)

    def on_cancelled(self, name: str, tokens: list[int]) -> None:
        """Take the tokens of a sequence that was cancelled."""
        if (request := self._request_of(name)) is not None:
            self._end(request, name, tokens, "cancelled", None)

    def on_stop(self, error: str) -> None:
        """End all: nothing is generated any more."""
        with self._lock:
            self._waiting.clear()
            for request in list(self._open.values()):
                self._end_all(request, self._reason_of_error, error)

    @property
    def _reason_of_error(self) -> FinishReason:
        return "cancelled" if self._closed else "error"

    def _request_of(self, name: str) -> Request | None:
        return self._open.get(name.partition(_CHILD)[0])

    def _end(
        self,
        request: Request,
        name: str,
        tokens: list[int],
        reason: FinishReason,
        error: str | None,
    ) -> None:
        with self._lock:
            try:
                if all(request.has_ended(other) for other in request.names if other != name):
                    # Before anybody hears of the end.
                    self._open.pop(request.id, None)
                    self._wake.set()
                    self._pool.give_back(request._lease)
            except Exception:
                # Of a broken device, which others will meet, too; this one has its answer.
                _logger.exception("request %s is over, but not its use of its adapter", request.id)
            finally:
                request.end(name, tokens, reason, None if reason == "cancelled" else error)

    def _end_all(self, request: Request, reason: FinishReason, error: str | None) -> None:
        for name in request.names:
            if not request.has_ended(name):
                self._end(request, name, request._tokens.get(name, []), reason, error)

    # The thread that brings adapters to the device for requests that wait.

    def _wake_loader(self) -> None:
        if self._loader is None:
            self._loader = threading.Thread(
                target=self._load_for_ever, name="fastlora-loader", daemon=True
            )
            self._loader.start()
        self._wake.set()

    def _load_for_ever(self) -> None:
        while not self._closed:
            self._wake.wait(RETRY_SECONDS if self._starved else None)
            self._wake.clear()
            while self._load_one():
                pass

    def _load_one(self) -> bool:
        """Start the first that waits; ``False`` if there is none, or no room for its adapter."""
        with self._lock:
            if not self._waiting:
                self._starved = False
                return False
            request, start = self._waiting[0]
        try:
            is_ready = self._pool.make_ready(request._lease)
        except Exception as error:  # of this request alone
            if self._take(request):
                self._end_all(request, "error", str(error))
            return True
        with self._lock:
            self._starved = not is_ready
            if not is_ready:
                return False
            # It may have been withdrawn.
            is_there = self._take(request)
        if is_there:
            try:
                start()
            except Exception as error:
                self._end_all(request, "error", str(error))
        return True

    def _take(self, request: Request) -> bool:
        """Take a request from those that wait, if it is there."""
        with self._lock:
            for entry in self._waiting:
                if entry[0] is request:
                    self._waiting.remove(entry)
                    return True
            return False
