"""What only a GPU proves: graphs, streams, no synchronisation, real sizes in bf16, several devices.

The accuracy of every plan in bf16 is in ``test_triton_path.py``, of every kernel in
``test_kernels_*.py``: both take the GPU when there is one.
"""

from __future__ import annotations

import copy

import pytest
import torch
from accuracy import assert_layer_as_accurate

import fastlora
from fastlora import LoRALinear, lora_linear, plans

pytestmark = pytest.mark.gpu

PLANS = ["hybrid", "fused"]
CUDA = torch.device("cuda", 0)


def make_inputs(m=1024, k=512, n=768, r=16, dtype=torch.bfloat16, device=CUDA):
    def draw(*shape):
        return torch.randn(shape, device=device).to(dtype)

    return {
        "x": draw(m, k).requires_grad_(),
        "weight": draw(n, k) * k**-0.5,
        "bias": draw(n),
        "lora_a": (torch.randn(r, k, device=device) * k**-0.5).requires_grad_(),
        "lora_b": torch.randn(n, r, device=device).requires_grad_(),
    }


def step(inputs, p=0.1):
    """Forward and backward under autocast, as trainers run it; returns y and the gradients."""
    with torch.autocast("cuda", torch.bfloat16):
        y = lora_linear(**inputs, scaling=2.0, dropout_p=p)
    wanted = [inputs[name] for name in ("x", "lora_a", "lora_b")]
    return [y, *torch.autograd.grad(y, wanted, torch.ones_like(y))]


@pytest.fixture(autouse=True)
def checked():
    """The check of a device reads results back: it is over before anything is counted."""
    assert plans.check_device(CUDA) == {}


def test_every_kernel_is_right_on_this_device():
    assert plans.failed_kernels(CUDA) == {}


@pytest.mark.parametrize("plan", PLANS)
def test_nothing_waits_for_the_device(plan):
    inputs = make_inputs()
    with fastlora.backend(plan):
        step(inputs)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("plan", PLANS)
def test_graph_replays_draw_fresh_masks(plan):
    inputs = make_inputs()
    replay = captured(plan, inputs, p=0.1)
    for one, two in zip(replay(), replay(), strict=True):
        assert not torch.equal(one, two)
        assert torch.isfinite(two).all()


@pytest.mark.parametrize("plan", PLANS)
def test_a_replayed_graph_agrees_with_eager(plan):
    inputs = make_inputs()
    replay = captured(plan, inputs, p=0.0)
    with fastlora.backend(plan):
        eager = step(inputs, p=0.0)
    for one, two in zip(replay(), eager, strict=True):
        assert torch.equal(one, two)


def captured(plan, inputs, p):
    """Capture a step in a CUDA graph; returns a function that replays it and copies its results."""
    with fastlora.backend(plan):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(inputs, p)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = step(inputs, p)

    def replay():
        graph.replay()
        return [output.detach().clone() for output in outputs]

    return replay


@pytest.mark.parametrize("plan", PLANS)
def test_results_do_not_depend_on_the_stream(plan):
    inputs = make_inputs()
    results = []
    with fastlora.backend(plan):
        for stream in (torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()):
            torch.cuda.synchronize()
            torch.manual_seed(4)
            with torch.cuda.stream(stream):
                results.append(step(inputs))
    torch.cuda.synchronize()
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("plan", PLANS)
def test_nothing_needs_nondeterministic_algorithms(plan):
    inputs = make_inputs()
    torch.use_deterministic_algorithms(True)
    try:
        with fastlora.backend(plan):
            runs = []
            for _ in range(3):
                torch.manual_seed(6)
                runs.append(step(inputs))
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        for one, two in zip(runs[0], run, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("rows", [64, 1000, 8192])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (128, 896), (4864, 896), (1024, 4096)])
def test_layers_of_qwen_are_as_accurate_as_peft(n, k, rows, plan):
    layer = LoRALinear.from_linear(
        torch.nn.Linear(k, n, device=CUDA, dtype=torch.bfloat16), r=16, init_lora_weights=False
    )
    peft = copy.deepcopy(layer)
    fastlora.unpatch(peft)
    with fastlora.backend(plan):
        assert_layer_as_accurate(
            layer, peft, torch.randn(rows, k, device=CUDA, dtype=torch.bfloat16)
        )


def test_more_than_two_to_the_31_elements():
    """70,000 x 32,768 outputs: 32-bit offsets would wrap."""
    m, n, k = 70_000, 32_768, 64
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free memory")
    inputs = make_inputs(m, k, n)
    with torch.no_grad():
        results = {}
        for plan in ("plain", "fused"):
            with fastlora.backend(plan), torch.autocast("cuda", torch.bfloat16):
                results[plan] = lora_linear(**inputs, scaling=2.0)[-64:].float()
    error = (results["fused"] - results["plain"]).norm() / results["plain"].norm()
    assert error < 2**-7  # two roundings to bf16


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("plan", PLANS)
def test_operands_decide_the_device_and_not_the_current_one(plan):
    other = torch.device("cuda", 1)
    plans.check_device(other)
    inputs = make_inputs(device=other)
    with fastlora.backend(plan), torch.cuda.device(0):
        results = step(inputs, p=0.0)
    with fastlora.backend("plain"), torch.cuda.device(1):
        expected = step(inputs, p=0.0)
    for ours, plain in zip(results, expected, strict=True):
        assert ours.device == other
        assert (ours.float() - plain.float()).norm() < 2**-6 * plain.float().norm()
