"""Sampling by request: each row of a batch is sampled, or not, as its own request says.

transformers' continuous batching has temperature, top-k and top-p by request, but decides once for
all whether it samples. Here a row that does not sample keeps nothing but its most likely token, and
a batch in which no row samples takes the arg max and sorts no vocabulary. It has no penalty for
repetitions, which Qwen2.5's ``generation_config`` asks for: ``penalties.py`` has.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
    ContinuousBatchingTemperatureLogitsWarper,
    ContinuousBatchingTopKLogitsWarper,
    ContinuousBatchingTopPLogitsWarper,
)
from transformers.generation.continuous_batching.requests import FutureRequestState

from fastlora.serving.penalties import RepetitionPenalty

# What the engine tells a request that is not plainly greedy: one of them at least.
_WANTED = frozenset({"do_sample", "repetition_penalty"})


class GreedyRows(ContinuousBatchingLogitsProcessor):
    """Leave nothing but the most likely token in rows whose request does not sample.

    Nor in rows whose scores are not finite, of which a draw would fail, for all rows.
    """

    supported_kwargs: ClassVar[dict[str, type]] = {"do_sample": bool}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Let rows without a request be greedy."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        """Return ``[rows]``: 1 where the row samples."""
        flags = [
            bool(request.state.logit_processor_kwargs.get("do_sample", False))
            for request in requests_with_new_token
        ]
        return torch.tensor(flags, dtype=torch.int32, device="cpu")

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Mask the scores ``[rows, vocabulary]`` of greedy rows."""
        token = scores.argmax(dim=-1, keepdim=True)  # of a NaN where there is one
        samples = tensor_arg[: scores.size(0)].bool().unsqueeze(-1)
        samples = samples & scores.gather(-1, token).isfinite()
        only = torch.full_like(scores, float("-inf")).scatter_(-1, token, 0.0)
        return torch.where(samples, scores, only)


class MinP(ContinuousBatchingLogitsProcessor):
    """Leave the tokens that are at least so likely, as a share of the most likely one."""

    supported_kwargs: ClassVar[dict[str, type]] = {"min_p": float}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Let rows without a request keep all."""
        int32_tensor.zero_()  # also the bits of 0.0

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        """Return ``[rows]``: the bits of the fp32 share."""
        shares = [
            float(request.state.logit_processor_kwargs.get("min_p", 0.0))
            for request in requests_with_new_token
        ]
        return torch.tensor(shares, dtype=torch.float32, device="cpu").view(torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Mask the scores ``[rows, vocabulary]`` of tokens that are less likely."""
        shares = tensor_arg[: scores.size(0)].view(torch.float32).unsqueeze(-1)
        least = scores.amax(dim=-1, keepdim=True) + shares.log()
        return scores.masked_fill(scores < least, float("-inf"))


class SamplingProcessors(ContinuousBatchingLogitsProcessorList):
    """Repetition penalty, temperature, top-k, top-p, min-p and greediness, of every row's own.

    Args:
        vocabulary: how many scores a row has.
        penalty: of repetitions; whoever makes the batches has it copied to the device.

    Attributes:
        vocabulary: likewise.
        penalty: likewise.
        penalizing: whether any row of the batch that runs has a penalty; set before each.
        sampling: whether any samples; likewise.
    """

    def __init__(self, vocabulary: int, penalty: RepetitionPenalty) -> None:
        self.penalty = penalty
        processors = LogitsProcessorList(
            [
                penalty,
                ContinuousBatchingTemperatureLogitsWarper(TemperatureLogitsWarper(1.0)),
                ContinuousBatchingTopKLogitsWarper(TopKLogitsWarper(vocabulary)),
                ContinuousBatchingTopPLogitsWarper(TopPLogitsWarper(1.0)),
                MinP(),
                GreedyRows(),
            ]
        )
        super().__init__(processors)
        self.tensors_required = len(processors)  # which are by request already
        self.vocabulary = vocabulary
        self.sampling = self.penalizing = False

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Take what the engine made: whatever is wrong it told whoever asked for it."""

    def prepare_tensor_args(
        self, requests_in_batch: list[FutureRequestState], arg_storage: Tensor
    ) -> Tensor:
        """Write what each row of a batch has of its own into ``[processors, rows]``.

        Nothing of a batch in which no request asks for any of it, as most do.
        """
        asked = (request.state.logit_processor_kwargs for request in requests_in_batch)
        if all(_WANTED.isdisjoint(kwargs) for kwargs in asked):
            return arg_storage
        # Rows of padding must not have the place of a request that had the row before.
        arg_storage[0].zero_()
        stored: Tensor = super().prepare_tensor_args(requests_in_batch, arg_storage)
        return stored

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """Process the scores ``[rows, vocabulary]``, as far as any row asks for it.

        Args:
            input_ids: ``[rows]``, the last token of each row, after which the next is drawn.
            scores: fp32.
            logits_processor_args: ``[processors, rows]``.
        """
        places, *arguments = logits_processor_args
        penalty, *others = self.logits_processor
        if self.penalizing:
            penalty.mark(input_ids, places)
            scores = penalty(scores, places)
        if self.sampling:
            for processor, argument in zip(others, arguments, strict=True):
                scores = processor(scores, argument)
        return scores
