"""Training on the CPU as users do it: a patched model learns what an unpatched one learns."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accuracy import assert_as_accurate
from conftest import Spy
from peft import PeftModel
from tiny_models import tiny_peft, token_ids
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from training_runs import (
    STEPS,
    TASKS,
    Run,
    adapter_gradients,
    assert_runs_agree,
    hf_trainer,
    learnable_peft,
    run,
    task,
    train,
)
from whole_models import LINEARS, assert_same, patched_twin

import fastlora
from fastlora import autograd, layers, siblings


def with_half_base(model: PeftModel) -> PeftModel:
    """Return a model with its base in bf16 and its adapters in fp32, as peft loads one."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    return model


# Fifty steps


@pytest.mark.parametrize("half_base", [False, True], ids=["fp32", "bf16-base"])
def test_fifty_steps_agree_with_peft_within_the_rounding_of_peft(half_base: bool, spy: Spy) -> None:
    plain = with_half_base(learnable_peft()) if half_base else learnable_peft()
    assert_runs_agree(
        lambda number: train(patched_twin(plain), task(number)),
        lambda number: train(copy.deepcopy(plain), task(number)),
        lambda number: train(copy.deepcopy(plain).double(), task(number)),
    )
    assert (spy.fused, spy.peft) == (TASKS * STEPS * LINEARS, 0)


def test_fifty_steps_of_trainer_in_bf16_agree_with_peft(tmp_path: Path, spy: Spy) -> None:
    plain = learnable_peft()

    def run_trainer(model: nn.Module, number: int, bf16: bool = True) -> Run:
        return run(hf_trainer(model, task(number), tmp_path, bf16=bf16))

    assert_runs_agree(
        lambda number: run_trainer(patched_twin(plain), number),
        lambda number: run_trainer(copy.deepcopy(plain), number),
        # transformers computes its loss in fp32 even here: 1e-7, where bf16 is off by 1e-3.
        lambda number: run_trainer(copy.deepcopy(plain).double(), number, bf16=False),
    )
    assert (spy.fused, spy.peft) == (TASKS * STEPS * LINEARS, 0)


SEEDS = range(5)


def last_losses(model: PeftModel) -> Tensor:
    """Return the mean of the last 10 losses of each seed: only the masks differ between seeds."""
    runs = [train(copy.deepcopy(model), task(0), seed=seed) for seed in SEEDS]
    return torch.stack([one.losses[-10:].mean() for one in runs])


def test_dropout_trains_to_the_same_loss_as_peft() -> None:
    plain = learnable_peft(dropout=0.3)
    ours, peft = last_losses(patched_twin(plain)), last_losses(plain)
    assert ours.unique().numel() == len(SEEDS), "two seeds draw the same masks"
    # Both means vary. (Over 40 seeds they are 4.3032 and 4.3003, 0.6 standard errors apart.)
    standard_error = ((ours.var() + peft.var()) / len(SEEDS)).sqrt()
    difference = (ours.mean() - peft.mean()).abs()
    assert difference <= 2 * standard_error, f"{ours.mean()} and {peft.mean()}, {standard_error}"


def test_recomputed_masks_train_to_the_very_same_losses() -> None:
    plain = learnable_peft(dropout=0.3)
    bits, recompute = (
        train(patched_twin(plain, dropout_mask=dropout_mask), task(0), steps=5)
        for dropout_mask in ("bits", "recompute")
    )
    assert torch.equal(bits.losses, recompute.losses)
    assert torch.equal(bits.gradients, recompute.gradients)


# Gradient accumulation


def test_accumulated_gradients_are_those_of_one_large_batch(tmp_path: Path) -> None:
    plain = learnable_peft()
    ids = task(0)

    def gradients(model: nn.Module, rows_at_once: int) -> Tensor:
        trainer = hf_trainer(
            model,
            ids,
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=rows_at_once,
            gradient_accumulation_steps=len(ids) // rows_at_once,
        )
        # Rows of different lengths: the mean over the tokens is not the mean over the batches.
        for number, row in enumerate(trainer.train_dataset):
            row["labels"] = row["labels"].clone()
            row["labels"][: 2 * number] = -100
        return run(trainer).gradients

    assert_as_accurate(
        gradients(patched_twin(plain), 2),
        gradients(copy.deepcopy(plain), 2),
        gradients(copy.deepcopy(plain).double(), len(ids)),
    )


# fp16 with a gradient scaler


def scaled_steps(
    model: PeftModel, scale: float, steps: int = 4
) -> list[tuple[float, bool, Tensor]]:
    """Train in fp16 with a scaler: of each step the new scale, whether it was skipped, the loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
    ids, results = task(0), []
    for _ in range(4):
        before = [p.detach().clone() for p in parameters]
        with torch.autocast("cpu", dtype=torch.float16):
            logits = model(ids).logits
        loss = F.cross_entropy(logits[:, :-1].float().mT, ids[:, 1:])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped = all(map(torch.equal, before, parameters))
        results.append((scaler.get_scale(), skipped, loss.detach()))
    return results


def test_overflow_in_fp16_skips_the_step_and_halves_the_scale(spy: Spy) -> None:
    plain = learnable_peft()
    # The largest gradient lies between 65,504 / 2^19 and 65,504 / 2^18: two steps overflow.
    ours, peft = (scaled_steps(model, 2.0**20) for model in (patched_twin(plain), plain))
    assert [step[:2] for step in ours] == [step[:2] for step in peft]
    expected = [(2.0**19, True), (2.0**18, True), (2.0**18, False), (2.0**18, False)]
    assert [step[:2] for step in ours] == expected
    assert ours[-1][2] < ours[0][2], "nothing was learned after the skipped steps"
    assert (spy.fused, spy.peft) == (4 * LINEARS, 0)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_reaches_every_gradient(value: float) -> None:
    layer = fastlora.LoRALinear.from_linear(
        nn.Linear(16, 24), r=4, lora_dropout=0.1, init_lora_weights=False
    )
    x = torch.randn(5, 16, requires_grad=True)
    dy = torch.ones(5, 24)
    dy[3, 7] = value
    layer(x).backward(dy)
    for gradient in (layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad):
        assert not gradient.isfinite().all()
    assert not x.grad[3].isfinite().any()
    assert x.grad[:3].isfinite().all()


# Activation offloading


def small_loss(model: nn.Module) -> Tensor:
    ids = token_ids()
    torch.manual_seed(3)
    return F.cross_entropy(model(ids).logits[:, :-1].mT, ids[:, 1:])


def test_offloaded_activations_give_the_same_gradients_bit_for_bit(spy: Spy) -> None:
    model = patched_twin(tiny_peft(lora_dropout=0.1)).train()
    offloaded = copy.deepcopy(model)
    small_loss(model).backward()
    with torch.autograd.graph.save_on_cpu():
        loss = small_loss(offloaded)
    loss.backward()
    assert torch.equal(adapter_gradients(offloaded), adapter_gradients(model))
    assert (spy.fused, spy.peft) == (2 * LINEARS, 0)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("dropout_mask", ["bits", "recompute"])
def test_everything_that_is_saved_passes_through_the_hooks(
    dropout_mask: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny_peft(lora_dropout=0.1)
    model = patched_twin(plain, dropout_mask=dropout_mask).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    inputs, nodes = [], []
    prepared, unprepared = autograd.apply_call, autograd._apply

    def watched(x: Tensor, ys: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs.append(StorageWeakRef(x.untyped_storage()))
        nodes.extend(y.grad_fn for y in ys)
        return ys

    for module in (layers, siblings):  # linears on their own, and groups
        monkeypatch.setattr(module, "apply_call", lambda call, x: watched(x, prepared(call, x)))
    monkeypatch.setattr(autograd, "_apply", lambda x, *a: watched(x, unprepared(x, *a)))

    def pack(saved: Tensor) -> Tensor:
        # Offloading keeps a copy elsewhere; the weights are not offloaded.
        return saved if saved.untyped_storage().data_ptr() in weights else saved.detach().clone()

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda copied: copied)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = small_loss(model)
    assert (len(inputs), len(nodes)) == (8, LINEARS)  # four groups, and o and down of two layers
    assert all(ref.expired() for ref in inputs), "an input is held outside of the hooks"
    for node in nodes:
        node = node if hasattr(node, "saved_tensors") else node.next_functions[0][0]
        held = [value for value in vars(node).values() if isinstance(value, Tensor)]
        assert not held, "a tensor hangs on ctx"
    loss.backward()
    assert adapter_gradients(model).isfinite().all()


# Generation between the steps, as in reinforcement learning


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_generation_between_steps_changes_no_gradient(checkpointing: bool, spy: Spy) -> None:
    plain = learnable_peft(dropout=0.1)
    patched = patched_twin(plain)
    if checkpointing:
        for model in (plain, patched):
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()

    def step(model: PeftModel) -> Tensor:
        model.train()
        model.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        ids = task(0)
        F.cross_entropy(model(ids).logits[:, :-1].mT, ids[:, 1:]).backward()
        return adapter_gradients(model)

    def generate(model: PeftModel) -> Tensor:
        # TRL switches checkpointing off around generation, since it excludes the cache.
        if checkpointing:
            model.gradient_checkpointing_disable()
        model.eval()
        with torch.no_grad():
            tokens = model.generate(
                task(1)[:2, :6], max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=True
            )
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return tokens

    first = step(patched)
    tokens = generate(patched)
    assert torch.equal(step(patched), first)
    assert spy.peft == 0
    assert torch.equal(tokens, generate(plain))


# Checkpoints


def test_training_resumed_from_a_checkpoint_ends_where_it_would_have(
    tmp_path: Path, spy: Spy
) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "bf16": True}
    ids = task(0, rows=32)  # 4 batches: the order of the data is resumed as well
    model = patched_twin(learnable_peft(dropout=0.1))
    run(hf_trainer(model, ids, tmp_path / "whole", **settings))
    resumed = patched_twin(learnable_peft(dropout=0.1))
    spy.reset()
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    run(
        hf_trainer(resumed, ids, tmp_path / "resumed", **settings),
        resume_from_checkpoint=checkpoint,
    )
    assert (spy.fused, spy.peft) == (2 * LINEARS, 0)
    assert_same(resumed.state_dict(), model.state_dict())


def test_checkpoint_of_a_patched_model_is_resumed_by_peft_and_the_other_way(
    tmp_path: Path,
) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    ids = task(0, rows=32)
    plain = learnable_peft()
    final: dict[str, Tensor] = {}
    for name, first, then in (
        ("patched then plain", patched_twin(plain), copy.deepcopy(plain)),
        ("plain then patched", copy.deepcopy(plain), patched_twin(plain)),
        ("exact", copy.deepcopy(plain).double(), copy.deepcopy(plain).double()),
        ("plain", copy.deepcopy(plain), copy.deepcopy(plain)),
    ):
        folder = tmp_path / name
        run(hf_trainer(first, ids, folder, **settings))
        run(
            hf_trainer(then, ids, folder / "resumed", **settings),
            resume_from_checkpoint=str(folder / "checkpoint-2"),
        )
        final[name] = torch.cat(
            [p.detach().flatten() for p in then.parameters() if p.requires_grad]
        )
    for name in ("patched then plain", "plain then patched"):
        assert_as_accurate(final[name], final["plain"], final["exact"], name=name)
