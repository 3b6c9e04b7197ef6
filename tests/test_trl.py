"""TRL's SFTTrainer with its defaults: bf16 autocast, fp32 adapters, gradient checkpointing."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
import train_qwen
from conftest import Spy
from peft import LoraConfig, get_peft_model
from torch import nn
from training_runs import STEPS, TASKS, Run, arguments, assert_runs_agree, learnable_peft, run, task
from transformers import PreTrainedTokenizerBase
from whole_models import LINEARS, patched_twin

import fastlora

Dataset = pytest.importorskip("datasets").Dataset
SFTConfig, SFTTrainer = (
    getattr(pytest.importorskip("trl"), name) for name in ("SFTConfig", "SFTTrainer")
)

CHATS = train_qwen.read_chats(train_qwen.DATA)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_qwen.tiny_tokenizer(CHATS)


def trl_lora() -> LoraConfig:
    """The adapter that ``trl sft --use_peft`` trains, on all linears."""
    return LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


@pytest.mark.parametrize("way", ["patch", "callback", "enable_for"])
def test_every_call_of_sft_with_its_defaults_is_fused(
    way: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, spy: Spy
) -> None:
    model, _ = train_qwen.load(None, CHATS)
    callback = fastlora.FastLoRACallback(strict=True, verbose=False)
    options: dict[str, object] = {}
    if way == "patch":
        model = get_peft_model(model, trl_lora())
        fastlora.patch(model)
    elif way == "callback":
        options = {"peft_config": trl_lora(), "callbacks": [callback]}
    else:
        options = {"peft_config": fastlora.enable_for(trl_lora())}
    settings = arguments(tmp_path, max_steps=2, per_device_train_batch_size=2)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings),
        train_dataset=Dataset.from_list(CHATS[:4]),
        processing_class=tokenizer,
        **options,
    )
    assert trainer.args.bf16
    assert trainer.args.gradient_checkpointing
    adapters = [p for p in trainer.model.parameters() if p.requires_grad]
    assert {p.dtype for p in adapters} == {torch.float32}
    before = [p.detach().clone() for p in adapters]
    result = run(trainer)
    assert result.losses.isfinite().all()
    # Two steps; checkpointing calls each layer again in the backward pass.
    assert (spy.fused, spy.peft) == (2 * 2 * LINEARS, 0)
    assert not any(map(torch.equal, before, adapters)), "an adapter was not trained"
    if way == "callback":
        assert str(callback.report).startswith("fused 14 of 14")
    # peft builds the layers of a marked config one by one, and nobody sees the model.
    groups = "" if way == "enable_for" else " in 4 groups"
    explained = fastlora.explain(trainer.model)
    assert explained.startswith(f"fused 14 of 14 LoRA linears{groups}; 0 fall back")
    assert ("computed one by one until the next patch" in explained) == (way == "enable_for")


def test_fifty_steps_of_sft_agree_with_peft_within_the_rounding_of_peft(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, spy: Spy
) -> None:
    plain = learnable_peft()

    def train(model: nn.Module, number: int, bf16: bool = True) -> Run:
        settings = arguments(tmp_path, bf16=bf16)
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**settings),
            train_dataset=Dataset.from_dict({"input_ids": task(number).tolist()}),
            processing_class=tokenizer,
        )
        return run(trainer)

    assert_runs_agree(
        lambda number: train(patched_twin(plain), number),
        lambda number: train(copy.deepcopy(plain), number),
        lambda number: train(copy.deepcopy(plain).double(), number, bf16=False),
    )
    assert (spy.fused, spy.peft) == (2 * TASKS * STEPS * LINEARS, 0)


def test_example_trains_with_sft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spy: Spy
) -> None:
    arguments = ["--trainer", "sft", "--steps", "8", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train_qwen.py", *arguments])
    train_qwen.main()
    assert (spy.fused, spy.peft) == (2 * 8 * LINEARS, 0)
    assert "fused 14 of 14 LoRA linears in 4 groups; 0 fall back" in capsys.readouterr().out
    assert (tmp_path / "adapter_model.safetensors").exists()
