"""``torch.compile``: one graph, the masks of the forward pass in the backward, and few recompiles.

While compiling, siblings run one by one: handing out outputs that were computed with another call
is a side effect that dynamo has to break the graph for (24 graphs for a tiny Qwen2 when it was
tried), and the compiled graph keeps the host out of the way anyhow.
"""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCABULARY, tiny_model, tiny_peft
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from whole_models import assert_same, patched_twin

import fastlora
from fastlora import plans

# The last splits the joint graph as inductor does: what the backward pass needs is saved or
# computed again, whichever is cheaper.
BACKENDS = ["aot_eager", "aot_eager_decomp_partition"]


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ids(columns: int) -> Tensor:
    return torch.arange(2 * columns).view(2, columns) % VOCABULARY


def gradients(model: nn.Module, columns: int = 9) -> dict[str, Tensor]:
    """Return the logits and the gradient of each adapter; the masks follow a fixed seed."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    logits = model(ids(columns), use_cache=False).logits
    logits.square().mean().backward()
    named = {n.removeprefix("_orig_mod."): p.grad for n, p in model.named_parameters()}
    return {"logits": logits.detach(), **{n: g for n, g in named.items() if g is not None}}


@pytest.mark.parametrize("dropout_mask", ["bits", "recompute"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_are_those_of_the_forward_pass(backend: str, dropout_mask: str) -> None:
    """Adapters alone make the loss here, so that a mask drawn anew would show in every gradient."""
    linear = nn.Linear(40, 24)
    layer = fastlora.LoRALinear.from_linear(
        linear, r=4, lora_dropout=0.5, init_lora_weights=False
    ).train()
    layer.fastlora_dropout_mask = dropout_mask
    nn.init.zeros_(linear.weight)
    x = torch.randn(6, 40)

    def step(layer: nn.Module) -> list[Tensor]:
        torch.manual_seed(3)
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        # Work between the layer and the loss: something to recompute.
        loss = (y.sin() * y.cos()).sum()
        return [y, *torch.autograd.grad(loss, [inputs, *adapters])]

    adapters = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    eager, actual = step(layer), step(compiled)
    dropped = eager[1] == 0
    assert 0.3 < dropped.float().mean() < 0.7, "the mask shows in dx"
    assert torch.equal(actual[1] == 0, dropped)
    for one, two in zip(actual, eager, strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-6)


def test_a_patched_model_is_one_graph_that_follows_the_number_of_tokens() -> None:
    model = patched_twin(tiny_peft(model=tiny_model(num_hidden_layers=1))).train()
    # In eager mode siblings are computed together; a compiled call neither uses nor disturbs that.
    expected = {columns: gradients(model, columns) for columns in (9, 12, 15)}
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for columns, eager in expected.items():
        actual = gradients(compiled, columns)
        assert actual.keys() == eager.keys()
        for name in eager:
            assert torch.allclose(actual[name], eager[name], rtol=1e-4, atol=1e-6), name
    # The first length, then one graph for any.
    assert counter.frame_count == 2
    assert_same(gradients(model, 15), expected[15])


@pytest.mark.skipif(not plans.interpreting(), reason="runs on the interpreter")
@pytest.mark.parametrize("plan", ["hybrid", "fused"])
def test_compiled_calls_take_the_kernels_too(plan: str) -> None:
    layer = fastlora.LoRALinear.from_linear(
        nn.Linear(64, 48), r=4, lora_dropout=0.25, init_lora_weights=False
    ).train()
    x = torch.randn(6, 64)

    def step(layer: nn.Module) -> dict[str, Tensor]:
        layer.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        inputs = x.clone().requires_grad_()
        with fastlora.backend(plan):
            y = layer(inputs)
            y.square().sum().backward()
        grads = {n.removeprefix("_orig_mod."): p.grad for n, p in layer.named_parameters()}
        named = {n: g for n, g in grads.items() if g is not None}
        return {"y": y.detach(), "dx": inputs.grad, **named}

    eager = step(layer)
    assert_same(step(torch.compile(layer, fullgraph=True, backend="aot_eager")), eager)
