"""Without continuous batching: ``model.generate``, on rows with adapters of their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastlora.adapters.pool import AdapterPool
from fastlora.adapters.versions import Lease
from fastlora.serving.linears import Routing, RowsOfSequences
from fastlora.serving.options import Options
from fastlora.serving.requests import RETRY_SECONDS, FinishReason, Result

_MOST_ROWS = 64  # of one batch


class RowsGenerator:
    """Answers prompts by a model's ``generate``, as many at once as their adapters fit.

    Args:
        model: whose linears are routed.
        adapters: their pool.
        routing: of its linears.
    """

    def __init__(self, model: Any, adapters: AdapterPool, routing: Routing) -> None:
        self._model, self._adapters, self._routing = model, adapters, routing
        self._closed = False
        self._turn = threading.Lock()  # held while ``generate`` runs

    def generate(
        self,
        options: list[Options],
        names: list[str | None],
        decode: Callable[[list[int]], str],
        *,
        progress: bool,
    ) -> list[Result]:
        """Answer prompts, all sampled alike; see ``Engine.generate``.

        Args:
            options: of each prompt.
            names: of its adapter.
            decode: returns the text of token ids.
            progress: show a progress bar on a terminal.

        Raises:
            KeyError: an adapter is not loaded.
            RuntimeError: this was closed.
        """
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
                    leases[i] = self._adapters.lease(name)
                while leases:
                    done = self._run_some(options, leases, decode)
                    results |= done
                    for i in done:
                        self._adapters.give_back(leases.pop(i))
                    bar.update(len(done))
            finally:
                for lease in leases.values():
                    self._adapters.give_back(lease)
        return [result for i in range(len(names)) for result in results[i]]

    def close(self) -> None:
        """Cancel what runs after its present batch, and wait for that."""
        self._closed = True
        with self._turn:
            pass

    def _run_some(
        self,
        options: list[Options],
        leases: Mapping[int, Lease],
        decode: Callable[[list[int]], str],
    ) -> dict[int, list[Result]]:
        """Return the answers to some of the prompts whose leases these are, perhaps to none yet."""
        if self._closed:
            return {i: _unanswered(options[i], leases[i], "cancelled") for i in leases}
        rows: list[int] = []
        for i, lease in leases.items():
            try:
                if len(rows) < _MOST_ROWS and self._adapters.make_ready(lease):
                    rows.append(i)
            except Exception as error:  # of this prompt alone
                if not rows:
                    return {i: _unanswered(options[i], lease, "error", str(error))}
        if not rows:
            # Somebody else holds one: ``AdapterPool.pin`` does for a moment.
            time.sleep(RETRY_SECONDS)
            return {}
        answers = self._run([options[i] for i in rows], [leases[i].slot for i in rows])
        return {
            i: [_result(options[i], leases[i].name, answer, decode) for answer in each]
            for i, each in zip(rows, answers, strict=True)
        }

    def _run(self, rows: list[Options], slots: list[int]) -> list[list[list[int]]]:
        """Return the answers to each of some prompts, as token ids."""
        from transformers import GenerationConfig

        device = self._model.device
        longest = max(len(row.tokens) for row in rows)
        pads = [longest - len(row.tokens) for row in rows]
        # Masked; and no token that the prompt lacks, which repetition_penalty counted before
        # transformers 5.23.
        ids = [row.tokens[:1] * pad + row.tokens for pad, row in zip(pads, rows, strict=True)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
        sequences, sampling = rows[0].sequences, rows[0].sampling
        each = sequences if sampling.get("do_sample") else 1
        config = GenerationConfig(
            max_new_tokens=max(row.max_new_tokens for row in rows),
            eos_token_id=rows[0].eos or None,
            pad_token_id=0,
            num_return_sequences=each,
            **{"do_sample": False, **sampling},
        )
        batch = RowsOfSequences([slot for slot in slots for _ in range(each)], self._adapters)
        # What generate is not told it looks up there, also what it was told and is a default.
        before, self._model.generation_config = self._model.generation_config, config
        try:
            with self._routing.batch(batch), torch.no_grad():
                found = self._model.generate(
                    torch.tensor(ids, device=device),
                    attention_mask=torch.tensor(mask, device=device),
                )
        finally:
            self._model.generation_config = before
        answers = found[:, longest:].tolist()
        return [answers[i * each : (i + 1) * each] * (sequences // each) for i in range(len(rows))]


def _result(
    options: Options, name: str | None, tokens: list[int], decode: Callable[[list[int]], str]
) -> Result:
    """Return the result of an answer, which may go on behind its end."""
    tokens = tokens[: options.max_new_tokens]
    ends = [i + 1 for i, token in enumerate(tokens) if token in options.eos]
    if options.stop is not None and (end := options.stop.end_of(tokens)) is not None:
        ends.append(end)
    tokens = tokens[: min(ends)] if ends else tokens
    reason: FinishReason = "stop" if ends else "length"
    return Result(decode(tokens), tokens, name, reason, None, len(options.tokens))


def _unanswered(
    options: Options, lease: Lease, reason: FinishReason, error: str | None = None
) -> list[Result]:
    result = Result("", [], lease.name, reason, error, len(options.tokens))
    return [result] * options.sequences
