"""enable_for and FastLoRACallback: the ways in for code that builds the peft model itself."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import Spy
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.lora.layer import Linear as PeftLinear
from tiny_models import tiny_model, tiny_peft, token_ids
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from whole_models import (
    LINEARS,
    assert_fused_like_peft,
    assert_same,
    layers_of_type,
    lora_config,
    saved_config,
)

import fastlora
from fastlora.layers import LoRALinear


def test_enable_for_builds_fused_layers_without_patch(spy: Spy) -> None:
    plain = tiny_peft()
    config = lora_config()
    assert fastlora.enable_for(config) is config
    base = tiny_model()
    torch.manual_seed(1)  # as tiny_peft does
    fused = get_peft_model(base, config)
    assert len(layers_of_type(fused, LoRALinear)) == LINEARS
    assert_fused_like_peft(fused, plain, spy)


def test_enable_for_takes_no_subclass_of_linear() -> None:
    class ScaledLinear(nn.Linear):
        """Stands for a quantized base layer."""

    model = nn.Sequential(nn.Linear(4, 4), ScaledLinear(4, 4))
    inject_adapter_in_model(fastlora.enable_for(lora_config(["0", "1"])), model)
    assert type(model[0]) is LoRALinear
    assert type(model[1]) is PeftLinear


def test_enable_for_leaves_other_configs_alone() -> None:
    fastlora.enable_for(lora_config())
    model = get_peft_model(tiny_model(), lora_config())
    assert len(layers_of_type(model, PeftLinear)) == LINEARS


@pytest.mark.parametrize("config", [None, {"r": 8}, peft.IA3Config()], ids=["none", "dict", "ia3"])
def test_enable_for_refuses_what_is_not_a_lora_config(config: object) -> None:
    with pytest.raises(TypeError, match=type(config).__name__):
        fastlora.enable_for(config)


def test_enable_for_leaves_no_trace_in_the_saved_config(tmp_path: Path) -> None:
    for name, config in (("marked", fastlora.enable_for(lora_config())), ("plain", lora_config())):
        get_peft_model(tiny_model(), config).save_pretrained(tmp_path / name)
    assert saved_config(tmp_path / "marked") == saved_config(tmp_path / "plain")


def train(model: PeftModel, folder: Path, *callbacks: transformers.TrainerCallback) -> list[float]:
    """Train two steps with transformers' Trainer and return the two losses."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = [{"input_ids": row, "labels": row} for row in token_ids(rows=4)]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)  # it prints the log, and only ours is looked at
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_callback_patches_when_training_begins(
    tmp_path: Path, spy: Spy, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_peft(lora_dropout=0.1)
    twin = copy.deepcopy(model)
    callback = fastlora.FastLoRACallback(verbose=False, dropout_mask="recompute")
    assert callback.report is None
    losses = train(model, tmp_path, callback)
    assert (spy.fused, spy.peft) == (2 * LINEARS, 0)
    printed = capsys.readouterr().out  # DeepSpeed has words of its own, where it is installed
    report = fastlora.patch(twin, dropout_mask="recompute")
    assert str(report).splitlines()[0] not in printed
    assert callback.report == report
    assert train(twin, tmp_path) == losses
    assert len(losses) == 2
    assert_same(model.state_dict(), twin.state_dict())


def begin_training(callback: fastlora.FastLoRACallback, is_main_process: bool = True) -> PeftModel:
    """Call a callback as the trainer does when training begins."""
    model = tiny_peft()
    state = TrainerState(is_world_process_zero=is_main_process)
    callback.on_train_begin(None, state, TrainerControl(), model=model)
    return model


def test_callback_prints_the_report_once(capsys: pytest.CaptureFixture[str]) -> None:
    callback = fastlora.FastLoRACallback()
    model = begin_training(callback)
    assert capsys.readouterr().out == f"{callback.report}\n"
    assert str(callback.report) == fastlora.explain(model)
    begin_training(callback, is_main_process=False)
    assert capsys.readouterr().out == ""


def test_callback_hands_its_options_to_patch() -> None:
    model = begin_training(fastlora.FastLoRACallback(dropout_mask="recompute", verbose=False))
    masks = {m.fastlora_dropout_mask for m in model.modules() if isinstance(m, LoRALinear)}
    assert masks == {"recompute"}
    callback = fastlora.FastLoRACallback(strict=True)
    with pytest.raises(ValueError, match="no LoRA layers"):
        callback.on_train_begin(None, TrainerState(), TrainerControl(), model=tiny_model())
    assert callback.report is None


# Devices and dtypes are looked at when a layer is called


def square_net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def test_enable_for_leaves_fan_in_fan_out_to_peft() -> None:
    settings = {"r": 2, "target_modules": ["0", "1"], "init_lora_weights": False}
    config = fastlora.enable_for(LoraConfig(fan_in_fan_out=True, **settings))
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to True"):
        model = get_peft_model(square_net(), config)
    x = torch.randn(3, 8)
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


class TensorSubclass(torch.Tensor):
    pass


def test_enable_for_leaves_tensor_subclasses_to_peft() -> None:
    base = square_net()
    weight = base[0].weight.detach().as_subclass(TensorSubclass)
    base[0].weight = nn.Parameter(weight, requires_grad=False)
    config = fastlora.enable_for(LoraConfig(r=2, target_modules=["0", "1"]))
    model = get_peft_model(base, config).base_model.model
    assert [type(layer) for layer in model] == [PeftLinear, LoRALinear]


def test_enable_for_leaves_single_parameters_to_peft() -> None:
    config = fastlora.enable_for(LoraConfig(r=2, target_parameters=["0.weight"]))
    model = get_peft_model(square_net(), config).base_model.model
    assert type(model[0]).__name__ == "ParamWrapper"
