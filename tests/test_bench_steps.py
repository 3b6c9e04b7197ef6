"""A training step by every provider: checked, and doing what its row says."""

from __future__ import annotations

import pytest
import torch
import transformers
from small_session import CPU, TINY, options_for, save_config

import fastlora
from fastlora.bench import (
    planning,
    shapes,
    steps,
)
from fastlora.bench.checking import WrongResult
from fastlora.bench.providers import PROVIDERS, find
from fastlora.bench.shapes import MODELS


def training_step(p: float = 0.0, dtype: torch.dtype = torch.float32, **changes: object):
    settings = {"model": TINY, "tokens": 16, "variant": steps.Variant(), **changes}
    return steps.TrainingStep(
        settings["model"], settings["tokens"], 4, p, CPU, dtype, settings["variant"]
    )


STEPPED = ("frozen", "peft", "peft-bf16", "fastlora")


def test_only_what_makes_whole_models_has_a_training_step():
    assert [one.name for one in steps.providers(list(PROVIDERS.values()))] == list(STEPPED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_every_provider_passes_the_gate_and_trains(dtype, checkpointing):
    built = training_step(dtype=dtype, variant=steps.Variant(checkpointing))
    losses = {}
    for name in STEPPED:
        step, gate = built.checked_step(find(name))
        if name == "frozen":
            assert gate is None
            (gradient,) = step()
            assert gradient.shape == (1, 16, 32)
            assert gradient.norm() > 0
        else:
            assert 0 <= gate <= 1
            losses[name] = [step().item() for _ in range(4)]
    for found in losses.values():
        assert found == sorted(found, reverse=True)  # the same batch, step after step
        assert found[-1] < found[0]
        # All have the same adapters and the same batch.
        assert found[0] == pytest.approx(losses["peft"][0], rel=torch.finfo(dtype).eps * 10)


@pytest.mark.parametrize("name", ["peft", "fastlora"])
def test_a_step_trains_with_dropout_and_is_checked_without(name):
    for p in (0.0, 0.5):
        losses = []
        for seed in (1, 2):
            step, gate = training_step(p).checked_step(find(name))
            assert gate <= 1
            torch.manual_seed(seed)
            losses.append(step().item())
        assert (losses[0] == losses[1]) == (p == 0.0)


def test_checkpointing_runs_the_layers_a_second_time(monkeypatch):
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    calls = []
    forward = Qwen2MLP.forward

    def counted(self, *args, **kwargs):
        calls.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Qwen2MLP, "forward", counted)
    for checkpointing, times in ((False, 1), (True, 2)):
        built = training_step(variant=steps.Variant(checkpointing))
        for name in STEPPED:
            step, _ = built.checked_step(find(name))
            calls.clear()
            step()
            assert len(calls) == times * TINY.layers


def test_the_model_is_fastlora_s_in_its_own_step_alone(spy):
    built = training_step()
    for name in STEPPED:
        spy.reset()
        step, _ = built.checked_step(find(name))
        assert (spy.fused > 0) == (name == "fastlora")
        spy.reset()
        step()
        assert spy.fused == (7 * TINY.layers if name == "fastlora" else 0)


def test_weights_are_shared_and_stay_as_they_are():
    built = training_step()
    before = {name: p.detach().clone() for name, p in built._base.named_parameters()}
    model = built._adapted(find("fastlora"))
    pointers = {p.data_ptr() for p in built._base.parameters()}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert {p.data_ptr() for p in frozen} == pointers
    for name in STEPPED:
        step, _ = built.checked_step(find(name))
        step()
    assert all(torch.equal(p, before[name]) for name, p in built._base.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_model_that_is_patched_wrong_is_refused(monkeypatch, dtype):
    patch = fastlora.patch

    def wrong(model, **kwargs):
        report = patch(model, **kwargs)
        layer = model.base_model.model.model.layers[0].mlp.down_proj
        layer.scaling["default"] *= 1.5
        return report

    monkeypatch.setattr(fastlora, "patch", wrong)
    built = training_step(dtype=dtype)
    with pytest.raises(WrongResult, match=r"(loss|the gradient of all lora_[AB]) is .* from fp64"):
        built.checked_step(find("fastlora"))
    monkeypatch.undo()
    assert built.checked_step(find("fastlora"))[1] <= 1


def test_a_model_that_falls_back_is_refused(monkeypatch):
    """Else peft's own time would stand there as fastlora's."""
    build = steps._build

    def with_odd_layer(*args):
        model = build(*args)
        model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: None)
        return model

    monkeypatch.setattr(steps, "_build", with_odd_layer)
    with pytest.raises(ValueError, match="q_proj"):
        training_step().checked_step(find("fastlora"))


def test_the_memory_that_a_step_needs_is_estimated():
    model = MODELS["Qwen2.5-0.5B"]
    with torch.device("meta"):
        whole = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**model.config)
        )
    weights = sum(parameter.numel() for parameter in whole.parameters())
    logits = 2048 * model.config["vocab_size"]
    for dtype, wider in ((torch.bfloat16, 4), (torch.float32, 8)):
        size = dtype.itemsize
        exact = weights * (size + wider) + logits * (size + 4 + 4)
        assert steps.needed_bytes(model, 2048, dtype) == pytest.approx(exact, rel=1e-3)


def test_a_cut_model_says_what_is_left_of_it():
    model = steps.cut(MODELS["Qwen3-8B"], 2, 4096)
    assert model.name == "Qwen3-8B (2 of 36 layers, vocabulary 4,096)"
    assert (model.layers, model.linears) == (2, MODELS["Qwen3-8B"].linears)
    assert (model.config["num_hidden_layers"], model.config["vocab_size"]) == (2, 4096)
    assert MODELS["Qwen3-8B"].config["num_hidden_layers"] == 36


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        pytest.param("llama", {"num_hidden_layers": 4}, id="four-layers-of-one-kind"),
        pytest.param(
            "qwen2", {"num_hidden_layers": 4}, id="four-layers-with-a-list-of-kinds",
        ),
        pytest.param(
            "qwen2", {"num_hidden_layers": 1}, id="a-single-layer",
        ),
        pytest.param(
            "llama", {"vocab_size": 8192, "pad_token_id": 8000}, id="a-padding-token-that-is-cut",
        ),
    ],
)  # fmt: skip
def test_a_folder_s_model_is_cut_for_the_step_of_a_cpu(tmp_path, kind, changes):
    model = shapes.find(save_config(tmp_path, kind, **changes))
    (item, _) = planning.plan(options_for(models=[model], levels=["step"]))[1:]
    step, _ = training_step(model=item.model).checked_step(find("fastlora"))
    assert step().isfinite()


def test_a_step_trains_as_many_tokens_as_its_row_says(monkeypatch):
    monkeypatch.setattr(steps, "_SEQUENCE", 8)
    for tokens, shape in ((16, (2, 8)), (12, (2, 6)), (7, (1, 7)), (1, (1, 1)), (13, (1, 13))):
        assert training_step(tokens=tokens)._ids.shape == shape


def test_a_step_trains_on_a_prime_number_of_tokens(monkeypatch):
    monkeypatch.setattr(steps, "_SEQUENCE", 8)
    step, _ = training_step(tokens=13).checked_step(find("fastlora"))
    assert step().isfinite()
