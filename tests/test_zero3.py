"""DeepSpeed ZeRO-3: weights that exist only while their own module runs; emulated, and real."""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from accuracy import assert_as_accurate
from conftest import Spy
from peft import PeftModel
from tiny_models import tiny_peft, token_ids
from torch import Tensor, nn
from torch.nn import functional as F
from training_runs import adapter_gradients
from two_processes import WORLD_SIZE, join, leave, results_of
from whole_models import LINEARS, counting_fused, patched_twin

import fastlora

SCREEN = 25  # lines


class Partitioned:
    """Empties the parameters of a model except while their own module runs, as ZeRO-3 does.

    DeepSpeed gathers the parameters in a forward-pre hook of the module that has them, lets go of
    them in its forward hook, and gathers them again when the gradient of its output arrives
    (deepspeed 0.19.8, ``runtime/zero/parameter_offload.py``). A partitioned parameter has shape
    ``[0]`` and a ``ds_id``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.whole: dict[nn.Parameter, Tensor] = {}
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            if not own:
                continue
            for parameter in own:
                if parameter not in self.whole:
                    parameter.ds_id = len(self.whole)
                    self.whole[parameter] = parameter.data
            module.register_forward_pre_hook(self._before)
            module.register_forward_hook(self._after)
        self.release()

    def _before(self, module: nn.Module, *_: object) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = self.whole[parameter]

    def _after(self, module: nn.Module, args: object, output: Tensor) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.new_empty(0)
        if output.requires_grad:
            output.register_hook(lambda _: self._before(module))

    def release(self) -> None:
        for parameter in self.whole:
            parameter.data = parameter.new_empty(0)


def backward(model: nn.Module, ids: Tensor) -> None:
    """Run one forward and one backward pass."""
    F.cross_entropy(model(ids).logits[:, :-1].mT, ids[:, 1:]).backward()


def test_partitioned_model_is_left_to_peft_and_gives_its_gradients(spy: Spy) -> None:
    plain = tiny_peft(lora_dropout=0.0)
    patched = patched_twin(plain)
    for model in (patched, plain):
        partitioned = Partitioned(model)
        assert all(p.shape == (0,) for p in model.parameters())
        backward(model, token_ids())
        partitioned.release()
    assert (spy.fused, spy.peft) == (0, LINEARS)
    assert torch.equal(adapter_gradients(patched), adapter_gradients(plain))


def assert_explained(report: str) -> None:
    """Assert that a report says of all 14 layers that ZeRO-3 is why they are not fused."""
    first, *reasons = report.splitlines()
    assert first == "fused 0 of 14 LoRA linears; 14 fall back"
    assert len(reasons) < SCREEN
    told = [line for line in reasons if "DeepSpeed ZeRO-3" in line]
    assert len(told) == 1, report
    assert "(14 layers: " in told[0]
    assert "layers.0,1." in told[0]
    assert "self_attn.(q_proj, k_proj, v_proj, o_proj)" in told[0]
    assert "mlp.(gate_proj, up_proj, down_proj))" in told[0]


def test_partitioned_model_is_explained() -> None:
    model = patched_twin(tiny_peft(lora_dropout=0.0))
    Partitioned(model)
    assert_explained(fastlora.explain(model))
    backward(model, token_ids())
    assert_explained(fastlora.explain(model))


def test_model_that_is_patched_after_it_was_partitioned_is_explained_too() -> None:
    model = tiny_peft(lora_dropout=0.0)
    Partitioned(model)
    assert_explained(str(fastlora.patch(model)))


def engine_gradients(model: PeftModel, ids: Tensor, stage: int) -> tuple[Tensor, int]:
    """Return the adapters' gradients of a model in DeepSpeed's engine, and how often it fused."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    settings = {
        "train_micro_batch_size_per_gpu": len(ids),
        "zero_allow_untested_optimizer": True,
        # A threshold of 0: DeepSpeed would leave weights as small as these whole.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    with counting_fused() as fused:
        logits = engine(ids).logits
    engine.backward(F.cross_entropy(logits[:, :-1].mT, ids[:, 1:]))
    return torch.cat([safe_get_full_grad(p).flatten() for p in trained]), sum(fused)


def worker(rank: int, folder: Path) -> None:
    """Be one of two processes under DeepSpeed."""
    # DeepSpeed asks for them when it is imported and when it is initialised.
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(WORLD_SIZE)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE)}
    sys.argv = sys.argv[:1]
    join(rank, folder)
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    ids = token_ids(rows=2 * WORLD_SIZE)
    own_ids = ids.chunk(WORLD_SIZE)[rank]
    plain = tiny_peft(lora_dropout=0.0).train()
    exact = copy.deepcopy(plain).double()
    backward(exact, ids)
    results: dict[str, object] = {"exact": adapter_gradients(exact)}
    for stage in (2, 3):
        patched = patched_twin(plain)
        ours, fused_calls = engine_gradients(patched, own_ids, stage)
        peft, _ = engine_gradients(copy.deepcopy(plain), own_ids, stage)
        results[f"ZeRO-{stage}"] = {"ours": ours, "peft": peft, "fused_calls": fused_calls}
        results[f"ZeRO-{stage}"] |= {"report": fastlora.explain(patched)}
    leave(results, rank, folder)


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed; `make compat` installs it",
)
def test_real_deepspeed_fuses_with_zero2_and_is_left_to_peft_with_zero3(tmp_path: Path) -> None:
    for result in results_of(worker, tmp_path):
        for stage, fused_calls in (("ZeRO-2", LINEARS), ("ZeRO-3", 0)):
            engine = result[stage]
            assert engine["fused_calls"] == fused_calls
            assert_as_accurate(engine["ours"], engine["peft"], result["exact"], name=stage)
        assert result["ZeRO-2"]["report"] == "fused 14 of 14 LoRA linears in 4 groups; 0 fall back"
        assert_explained(result["ZeRO-3"]["report"])
