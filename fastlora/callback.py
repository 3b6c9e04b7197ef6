"""``FastLoRACallback``: ``patch`` as a callback of transformers' ``Trainer`` and TRL's trainers."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastlora.autograd import DropoutMask
from fastlora.patching import PatchReport, patch


class FastLoRACallback(TrainerCallback):
    """Patch the model when training begins: ``Trainer(..., callbacks=[FastLoRACallback()])``.

    For trainers that build the peft model themselves, such as ``SFTTrainer(peft_config=...)``.

    Args:
        dropout_mask: as in ``fastlora.patch``.
        strict: likewise.
        verbose: print the report, on the first process alone.

    Attributes:
        report: the ``PatchReport`` of the last training run, ``None`` before it.
    """

    def __init__(
        self, *, dropout_mask: DropoutMask = "bits", strict: bool = False, verbose: bool = True
    ) -> None:
        self.dropout_mask = dropout_mask
        self.strict = strict
        self.verbose = verbose
        self.report: PatchReport | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Patch ``model``, which the trainer passes to every callback."""
        if model is None:
            return
        self.report = patch(model, dropout_mask=self.dropout_mask, strict=self.strict)
        if self.verbose and state.is_world_process_zero:
            print(self.report)
