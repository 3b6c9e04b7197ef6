"""Two processes on the CPU: a patched model under DDP and FSDP, against one that is in neither."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from accuracy import assert_as_accurate
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from two_processes import WORLD_SIZE, join, leave, results_of

LINEARS = 14  # LoRA linears of a tiny Qwen2 with all-linear


def in_ddp(model: nn.Module) -> nn.Module:
    """Replicate a model, as accelerate does by default."""
    return nn.parallel.DistributedDataParallel(model)


def in_fsdp2(model: nn.Module) -> nn.Module:
    """Shard a model by decoder layer, as accelerate does with ``fsdp_version: 2``."""
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def in_fsdp2_by_linear(model: nn.Module) -> nn.Module:
    """Shard a model with each LoRA linear as a unit of its own."""
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for module in list(model.modules()):
        if isinstance(module, PeftLinear):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def in_fsdp2_by_adapter(model: nn.Module) -> nn.Module:
    """Shard a model with each trained leaf, ``lora_A`` and ``lora_B``, as a unit of its own."""
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for module in list(model.modules()):
        if isinstance(module, nn.Linear) and module.weight.requires_grad:
            fully_shard(module, mesh=mesh)
    return in_fsdp2(model)


def in_accelerate_fsdp2(model: nn.Module) -> nn.Module:
    """Shard a model by accelerate's own function, with its plugin as ``accelerate config`` asks."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen2DecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    # accelerate's Accelerator shards on GPUs alone; this is what its function reads of it.
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        device=torch.device("cpu"),
        is_main_process=torch.distributed.get_rank() == 0,
    )
    return fsdp2_prepare_model(accelerator, model)


def in_fsdp1(model: nn.Module) -> nn.Module:
    """Shard a model as accelerate does with ``fsdp_version: 1`` for a peft model."""
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=fsdp_auto_wrap_policy(model),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )


FUSED_WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": in_ddp,
    "FSDP2": in_fsdp2,
    "FSDP2-by-linear": in_fsdp2_by_linear,
    "FSDP2-by-accelerate": in_accelerate_fsdp2,
}
# What explain() says of a layer in the others, where lora_A and lora_B are units of their own.
REASONS = {
    "FSDP2-by-adapter": "lora_A is a FSDPLinear, not an nn.Linear",
    "FSDP1": "lora_A is a FullyShardedDataParallel, not an nn.Linear",
}
WRAPPERS = {**FUSED_WRAPPERS, "FSDP2-by-adapter": in_fsdp2_by_adapter, "FSDP1": in_fsdp1}
SCREEN = 25  # lines


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Return the gradient of each trained parameter, whole even where it is sharded."""
    logits = model(ids).logits
    F.cross_entropy(logits[:, :-1].mT, ids[:, 1:]).backward()
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return {
                name.replace("_fsdp_wrapped_module.", ""): p.grad.clone()
                for name, p in model.named_parameters()
                if p.grad is not None
            }
    # DDP calls the model that it wraps "module".
    grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {
        name: grad.full_tensor() if isinstance(grad, DTensor) else grad
        for name, grad in grads.items()
        if grad is not None
    }


def worker(rank: int, folder: Path) -> None:
    """Be one of the processes: gradients and the number of fused calls go to ``folder``."""
    from tiny_models import tiny_peft, token_ids
    from whole_models import counting_fused

    import fastlora

    join(rank, folder)
    ids = token_ids(rows=2 * WORLD_SIZE)
    own_ids = ids.chunk(WORLD_SIZE)[rank]
    plain = tiny_peft(lora_dropout=0.0).train()
    results: dict[str, object] = {"exact": gradients(copy.deepcopy(plain).double(), ids)}
    for name, wrap in WRAPPERS.items():
        patched = copy.deepcopy(plain)
        fastlora.patch(patched, strict=True)
        with counting_fused() as fused:
            wrapped = wrap(patched)
            # Again, as a callback would.
            before = str(fastlora.patch(wrapped, strict=name in FUSED_WRAPPERS))
            ours = gradients(wrapped, own_ids)
        peft = gradients(wrap(copy.deepcopy(plain)), own_ids)
        results[name] = {"ours": ours, "peft": peft, "fused": fused}
        results[name] |= {"before": before, "after": fastlora.explain(wrapped)}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fastlora.unpatch(wrapped)
        results[name]["unpatch_warnings"] = [str(warning.message) for warning in caught]
    leave(results, rank, folder)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    """Run the two processes once, and return what each has saved."""
    return results_of(worker, tmp_path_factory.mktemp("distributed"))


@pytest.mark.parametrize("wrapper", list(WRAPPERS))
def test_gradients_are_those_of_one_process_on_the_whole_batch(
    results: list[dict[str, dict]], wrapper: str
) -> None:
    for result in results:
        exact = result["exact"]
        ours, peft = result[wrapper]["ours"], result[wrapper]["peft"]
        assert len(exact) == 2 * LINEARS
        assert ours.keys() == peft.keys() == exact.keys()
        for part in ("lora_A", "lora_B"):
            # As one vector: a ratio of two errors in a tiny tensor is mostly chance.
            vectors = (
                torch.cat([grads[name].flatten() for name in exact if part in name])
                for grads in (ours, peft, exact)
            )
            assert_as_accurate(*vectors, name=part)


@pytest.mark.parametrize("wrapper", list(WRAPPERS))
def test_every_process_has_the_same_gradients(results: list[dict[str, dict]], wrapper: str) -> None:
    first, second = (result[wrapper]["ours"] for result in results)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("wrapper", list(FUSED_WRAPPERS))
def test_every_call_is_fused(results: list[dict[str, dict]], wrapper: str) -> None:
    for result in results:
        # q, k, v together, then o, gate and up together, down; or each whole only while it runs.
        expected = [1] * LINEARS if wrapper == "FSDP2-by-linear" else [3, 1, 2, 1] * 2
        assert result[wrapper]["fused"] == expected


@pytest.mark.parametrize("wrapper", list(REASONS))
def test_adapters_that_are_units_of_their_own_are_left_to_peft_and_explained(
    results: list[dict[str, dict]], wrapper: str
) -> None:
    for result in results:
        assert result[wrapper]["fused"] == []
        for report in (result[wrapper]["before"], result[wrapper]["after"]):
            first, *reasons = report.splitlines()
            assert first == "fused 0 of 14 LoRA linears; 14 fall back"
            assert len(reasons) < SCREEN
            told = [line for line in reasons if REASONS[wrapper] in line]
            assert len(told) == 1
            assert "(14 layers: " in told[0]
            assert "layers.0,1." in told[0]
            assert "self_attn.(q_proj, k_proj, v_proj, o_proj)" in told[0]
            assert "mlp.(gate_proj, up_proj, down_proj))" in told[0]


def test_report_of_a_replicated_model_is_that_of_the_model(results: list[dict[str, dict]]) -> None:
    for result in results:
        assert (
            result["DDP"]["before"].splitlines()[0]
            == "fused 14 of 14 LoRA linears in 4 groups; 0 fall back"
        )
        assert result["DDP"]["after"] == result["DDP"]["before"]


def test_report_of_a_sharded_model_tells_what_the_last_call_did(
    results: list[dict[str, dict]],
) -> None:
    # Between calls the weights are DTensors, inside of one plain tensors.
    sharded = ("FSDP2", "FSDP2-by-linear", "FSDP2-by-accelerate")
    for wrapper, result in ((wrapper, result) for wrapper in sharded for result in results):
        groups = "" if wrapper == "FSDP2-by-linear" else " in 4 groups"
        counts = (
            f"fused 0 of 14 LoRA linears{groups}; 0 fall back; 14 sharded, decided when they "
            "are called"
        )
        assert result[wrapper]["before"] == counts
        last_call = "  last call was fused: 14 of 14 sharded layers"
        assert result[wrapper]["after"] == f"{counts}\n{last_call}"


def test_layer_that_was_wrapped_by_itself_cannot_be_unpatched(
    results: list[dict[str, dict]],
) -> None:
    for result in results:
        assert result["DDP"]["unpatch_warnings"] == []
        messages = result["FSDP2-by-linear"]["unpatch_warnings"]
        assert len(messages) == LINEARS
        assert "FSDPLoRALinear cannot be unpatched" in messages[0]
