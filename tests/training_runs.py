"""Helpers of the tests that train: models that have something to learn, and what a run did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accuracy import assert_as_accurate
from peft import PeftModel
from tiny_models import VOCABULARY, tiny_model, tiny_peft
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

STEPS = 50
LEARNING_RATE = 1e-3
BATCH = (8, 17)  # rows and tokens of a batch
# AdamW divides by the size of a gradient, so two runs that differ by one rounding soon differ by
# many, and how many is chance. On eight tasks each, with fp32 and with bf16 bases, the ratio of our
# distance to peft's was 0.6 to 1.6 for one task, centred on 1.0, and 0.7 to 1.4 pooled over two.
TASKS = 2
POOLED_FACTOR = 2.0


def learnable_peft(dropout: float = 0.0, **config: object) -> PeftModel:
    """Build a tiny peft model that learns a batch by heart: the loss falls from 4.7 to 2.8.

    With transformers' ``initializer_range`` of 0.02 the logits of so small a model are near zero
    whatever the adapters do, and the loss stays at log(64) = 4.2.
    """
    base = tiny_model(initializer_range=0.2, **config)
    return tiny_peft(model=base, lora_dropout=dropout)


def task(seed: int, rows: int = BATCH[0]) -> Tensor:
    """Return token ids to learn by heart: ``[rows, 17]``."""
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randint(3, VOCABULARY, (rows, BATCH[1]), generator=generator)


@dataclass
class Run:
    """The loss of each step, and the adapters' gradients of the last one as one vector."""

    losses: Tensor
    gradients: Tensor


def adapter_gradients(model: torch.nn.Module) -> Tensor:
    """Return the gradients of all trained parameters as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def train(
    model: PeftModel, ids: Tensor, steps: int = STEPS, seed: int = 0, rate: float = LEARNING_RATE
) -> Run:
    """Train with AdamW in a loop of one's own: no autocast, each dtype as it is."""
    torch.manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    model.train()
    losses = []
    for _ in range(steps):
        logits = model(ids).logits
        # fp64 stays: transformers' own loss computes in fp32.
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(logits[:, :-1].mT, ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return Run(torch.stack(losses), adapter_gradients(model))


class _Recorder(TrainerCallback):
    """Keeps the gradients that the optimizer is about to see."""

    gradients: Tensor | None = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = adapter_gradients(model).clone()


def run(trainer: Trainer, **options: object) -> Run:
    """Let a trainer train, and record what it computes."""
    losses: list[Tensor] = []
    compute_loss = trainer.compute_loss

    def recorded(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        losses.append(loss.detach().clone())
        return loss

    trainer.compute_loss = recorded
    recorder = _Recorder()
    trainer.add_callback(recorder)
    trainer.remove_callback(PrinterCallback)
    trainer.train(**options)
    return Run(torch.stack(losses), recorder.gradients)


def arguments(folder: Path, **settings: object) -> dict[str, object]:
    """Return the arguments that every trainer of these tests gets."""
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH[0],
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **settings,
    }


def hf_trainer(model: PeftModel, ids: Tensor, folder: Path, **settings: object) -> Trainer:
    """Build transformers' Trainer for a model and a task."""
    rows = [{"input_ids": row, "labels": row} for row in ids]
    settings = {"max_grad_norm": 0.0, **settings}
    return Trainer(
        model=model, args=TrainingArguments(**arguments(folder, **settings)), train_dataset=rows
    )


def assert_runs_agree(
    ours: Callable[[int], Run], peft: Callable[[int], Run], exact: Callable[[int], Run]
) -> None:
    """Assert that losses and last gradients are as near to fp64 as peft's, pooled over the tasks.

    Args:
        ours: trains a patched model on the task of that number.
        peft: likewise without fastlora.
        exact: likewise in fp64.
    """
    runs = [[train_one(number) for number in range(TASKS)] for train_one in (ours, peft, exact)]
    for part in ("losses", "gradients"):
        actual, native, reference = (
            torch.cat([getattr(run, part) for run in runs_of_one]) for runs_of_one in runs
        )
        assert_as_accurate(actual, native, reference, POOLED_FACTOR, name=part)
    for run_of_exact in runs[2]:
        first, last = run_of_exact.losses[0], run_of_exact.losses[-1]
        assert last < 0.7 * first, f"there was nothing to learn: loss {first:.2f} -> {last:.2f}"
