"""Sampling by request: each row of a batch is sampled, or not, as its own request says.

transformers' continuous batching has temperature, top-k and top-p by request, but decides once for
all whether it samples. Here a row that does not sample keeps nothing but its most likely token, and
a batch in which no row samples takes the arg max and sorts no vocabulary.
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


class SamplingProcessors(ContinuousBatchingLogitsProcessorList):
    """Temperature, top-k, top-p and greediness, of every row's own.

    Args:
        vocabulary: how many scores a row has.

    Attributes:
        vocabulary: likewise.
        sampling: whether any row of the batch that runs samples; set before each.
    """

    def __init__(self, vocabulary: int) -> None:
        processors = LogitsProcessorList(
            [
                ContinuousBatchingTemperatureLogitsWarper(TemperatureLogitsWarper(1.0)),
                ContinuousBatchingTopKLogitsWarper(TopKLogitsWarper(vocabulary)),
                ContinuousBatchingTopPLogitsWarper(TopPLogitsWarper(1.0)),
                GreedyRows(),
            ]
        )
        super().__init__(processors)
        self.tensors_required = len(processors)  # which are by request already
        self.vocabulary = vocabulary
        self.sampling = False

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Take what the engine made: whatever is wrong it told whoever asked for it."""

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """Process the scores ``[rows, vocabulary]``, if any row samples."""
        if not self.sampling:
            return scores
        processed: Tensor = super().__call__(input_ids, scores, logits_processor_args)
        return processed
