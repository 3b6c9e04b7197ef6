"""Two processes on the CPU: a patched model under DDP and FSDP2, against one that is in neither."""

from __future__ import annotations

import copy
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from accuracy import assert_as_accurate
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

WORLD_SIZE = 2
TIMEOUT_S = 120
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


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": in_ddp,
    "FSDP2": in_fsdp2,
    "FSDP2-by-linear": in_fsdp2_by_linear,
}


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Return the gradient of each trained parameter, whole even where it is sharded."""
    logits = model(ids).logits
    F.cross_entropy(logits[:, :-1].mT, ids[:, 1:]).backward()
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

    import fastlora
    from fastlora import layers

    # Only the loopback: gloo would look for an interface by the host's name.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD_SIZE
    )
    ids = token_ids(rows=2 * WORLD_SIZE)
    own_ids = ids.chunk(WORLD_SIZE)[rank]
    plain = tiny_peft(lora_dropout=0.0).train()
    results: dict[str, object] = {"exact": gradients(copy.deepcopy(plain).double(), ids)}
    for name, wrap in WRAPPERS.items():
        patched = copy.deepcopy(plain)
        fastlora.patch(patched, strict=True)
        fused = mock.patch.object(layers, "apply_lora_linear", wraps=layers.apply_lora_linear)
        with fused as spy:
            wrapped = wrap(patched)
            before = str(fastlora.patch(wrapped, strict=True))  # again, as a callback would
            ours = gradients(wrapped, own_ids)
        peft = gradients(wrap(copy.deepcopy(plain)), own_ids)
        results[name] = {"ours": ours, "peft": peft, "fused_calls": spy.call_count}
        results[name] |= {"before": before, "after": fastlora.explain(wrapped)}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fastlora.unpatch(wrapped)
        results[name]["unpatch_warnings"] = [str(warning.message) for warning in caught]
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, dict]]]:
    """Run the two processes once, and return what each has saved."""
    folder = tmp_path_factory.mktemp("distributed")
    processes = torch.multiprocessing.start_processes(
        worker, args=(folder,), nprocs=WORLD_SIZE, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + TIMEOUT_S
    try:
        # join raises with the traceback of the process that failed, and ends the other.
        while not processes.join(timeout=1):
            if time.monotonic() > deadline:
                pytest.fail(f"the processes have not finished within {TIMEOUT_S} s")
        yield [torch.load(folder / f"{rank}.pt") for rank in range(WORLD_SIZE)]
    finally:
        for process in processes.processes:
            process.kill()


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


@pytest.mark.parametrize("wrapper", list(WRAPPERS))
def test_every_call_is_fused(results: list[dict[str, dict]], wrapper: str) -> None:
    for result in results:
        assert result[wrapper]["fused_calls"] == LINEARS


def test_report_of_a_replicated_model_is_that_of_the_model(results: list[dict[str, dict]]) -> None:
    for result in results:
        assert result["DDP"]["before"].splitlines()[0] == "fused 14 of 14 LoRA linears; 0 fall back"
        assert result["DDP"]["after"] == result["DDP"]["before"]


def test_report_of_a_sharded_model_tells_what_the_last_call_did(
    results: list[dict[str, dict]],
) -> None:
    # Between calls the weights are DTensors, inside of one plain tensors.
    counts = "fused 0 of 14 LoRA linears; 0 fall back; 14 sharded, decided when they are called"
    for result in results:
        for wrapper in ("FSDP2", "FSDP2-by-linear"):
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
