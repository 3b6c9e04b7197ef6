"""``repetition_penalty`` under continuous batching: which tokens every request has had.

A request that has a penalty is given a *place* in a table on the device, one bit for each token of
the vocabulary (19 kB for Qwen's). The host fills it when the request comes to a place, with the
prompt and what has been generated; from then on every step marks the token that it is given, so
that nothing is read back, and asynchronous batches and CUDA graphs see tokens that the host does
not know yet. Place 0 is that of rows without a penalty.

Keskar et al., CTRL, 2019, https://arxiv.org/abs/1909.05858, section 4.1; for tokens of the prompt,
too, as transformers has it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
)
from transformers.generation.continuous_batching.requests import FutureRequestState

# Batches in which a place that was used may still be read: the one that runs, and the one before.
_GRACE = 2


class RepetitionPenalty(ContinuousBatchingLogitsProcessor):
    """Makes tokens that a request has had less likely, by its own factor.

    Args:
        tokens: that there are: at least as many as a row has scores.
        device: of the scores.

    Attributes:
        rows: that a batch has at most; to be set before the first batch.
    """

    supported_kwargs: ClassVar[dict[str, type]] = {"repetition_penalty": float}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.rows = 0
        self._width, self._device = -(-tokens // 8), device
        self._seen: Tensor | None = None  # [places, bytes]
        self._factors: Tensor | None = None  # [places]
        # By request, the least recently used first: its place, and the batch that used it.
        self._places: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._batch = 0
        # What is to be copied to the device: a place, the request's tokens and its factor.
        self._new: list[tuple[int, list[int], float]] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Let rows without a request have no penalty."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        """Return ``[rows]``, the place of each; those of requests without one are new."""
        self._batch += 1
        places = [self._place_of(request.state) for request in requests_with_new_token]
        return torch.tensor(places, dtype=torch.int32, device="cpu")

    def upload(self) -> None:
        """Copy what new places hold to the device, in the order of the current stream."""
        for place, tokens, factor in self._new:
            seen, factors = self._tables()
            bits = torch.zeros(8 * self._width, dtype=torch.uint8)
            bits[torch.tensor(tokens)] = 1
            weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
            seen[place].copy_((bits.view(-1, 8) * weights).sum(-1, dtype=torch.uint8))
            factors[place].fill_(factor)
        self._new.clear()

    def mark(self, input_ids: Tensor, places: Tensor) -> None:
        """Mark the last token of every row, ``[rows]``, as one that its request has had."""
        seen, _ = self._tables()
        tokens = input_ids.long()
        at = places[: len(tokens)].long() * self._width + tokens // 8
        flat = seen.view(-1)
        flat[at] = flat[at] | torch.bitwise_left_shift(torch.ones_like(tokens), tokens % 8).to(
            torch.uint8
        )

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Divide the positive scores ``[rows, vocabulary]`` of such tokens, multiply the others."""
        seen, factors = self._tables()
        places = tensor_arg[: scores.size(0)].long()
        bits = torch.arange(8, dtype=torch.uint8, device=scores.device)
        has_had = torch.bitwise_right_shift(seen[places].unsqueeze(-1), bits) & 1
        has_had = has_had.flatten(1)[:, : scores.size(1)].bool()
        factor = factors[places].unsqueeze(-1)
        return torch.where(
            has_had, torch.where(scores < 0, scores * factor, scores / factor), scores
        )

    def _tables(self) -> tuple[Tensor, Tensor]:
        """Return the tables; made when they are first needed, and at one address from then on."""
        if self._seen is None or self._factors is None:
            places = (1 + _GRACE) * self.rows + 1
            self._seen = torch.zeros((places, self._width), dtype=torch.uint8, device=self._device)
            self._factors = torch.ones(places, device=self._device)
            if self._device.type == "cuda":
                # What fills them is on this stream, and others are to write there next.
                torch.cuda.current_stream(self._device).synchronize()
        return self._seen, self._factors

    def _place_of(self, state: Any) -> int:
        factor: float = state.logit_processor_kwargs.get("repetition_penalty", 1.0)
        if factor == 1.0:
            return 0
        name = state.request_id
        if name in self._places:
            place, _ = self._places[name]
        else:
            place = self._free_place()
            self._new.append((place, [*state.initial_tokens, *state.generated_tokens], factor))
        self._places[name] = (place, self._batch)
        self._places.move_to_end(name)
        return place

    def _free_place(self) -> int:
        """Return a place that nobody has, or that of a request that batches have not had for long.

        Should that one come back, all that it has had is known by then.
        """
        if len(self._places) < (1 + _GRACE) * self.rows:
            return len(self._places) + 1
        name, (place, batch) = next(iter(self._places.items()))
        assert batch + _GRACE < self._batch, "as many places as that many batches have rows"
        del self._places[name]
        return place
