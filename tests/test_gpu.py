"""What only a GPU proves: graphs, streams, no synchronisation, real sizes in bf16, several devices.

The accuracy of every plan in bf16 is in ``test_triton_path.py``, of every kernel in
``test_kernels_*.py``: both take the GPU when there is one.
"""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from accuracy import assert_as_accurate, assert_layer_as_accurate, output_gradient
from torch import nn

import fastlora
from fastlora import LoRALinear, lora_linear, plans, siblings
from fastlora.bench import measuring, planning, session, shapes
from fastlora.bench.providers import build_layer, draw_weights
from fastlora.bench.shapes import INPUTS, MODELS, Linear

pytestmark = pytest.mark.gpu

PLANS = ["hybrid", "fused"]
CUDA = torch.device("cuda", 0)
# A decoder layer of which five linears are in two groups.
SMALL = {
    "q_proj": Linear(512, 512, True),
    "k_proj": Linear(128, 512, True),
    "v_proj": Linear(128, 512, True),
    "o_proj": Linear(512, 512),
    "gate_proj": Linear(1024, 512),
    "up_proj": Linear(1024, 512),
    "down_proj": Linear(512, 1024),
}


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


def layer_step(p=0.1, linears=SMALL, m=1024, provider="fastlora"):
    """Build a decoder layer; returns its forward and backward, under autocast as above."""
    weights = draw_weights(linears, 16, CUDA, torch.bfloat16)
    module, parameters = build_layer(provider, weights, p)
    inputs = [
        torch.randn(1, m, linears[name].k, device=CUDA).bfloat16().requires_grad_()
        for name in INPUTS
    ]

    def run():
        outputs = module(*inputs)
        dys = [torch.ones_like(y) for y in outputs]
        return [*outputs, *torch.autograd.grad(outputs, [*inputs, *parameters], dys)]

    return run


@pytest.fixture(autouse=True)
def checked():
    """The check of a device reads results back: it is over before anything is counted."""
    assert plans.check_device(CUDA) == {}


def test_every_kernel_is_right_on_this_device():
    assert plans.failed_kernels(CUDA) == {}


def one_linear(p=0.1):
    inputs = make_inputs()
    return lambda: step(inputs, p)


STEPS = pytest.mark.parametrize("make", [one_linear, layer_step], ids=["linear", "grouped layer"])


@STEPS
@pytest.mark.parametrize("plan", PLANS)
def test_nothing_waits_for_the_device(plan, make):
    run = make()
    with fastlora.backend(plan):
        run()  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_layer_runs_in_its_groups(spy):
    """Otherwise what is said of grouped layers here is said of single linears."""
    layer_step()()
    assert (spy.fused, spy.together, spy.peft) == (7, 5, 0)


@STEPS
@pytest.mark.parametrize("plan", PLANS)
def test_graph_replays_draw_fresh_masks(plan, make):
    replay = captured(plan, make(p=0.1))
    for one, two in zip(replay(), replay(), strict=True):
        assert not torch.equal(one, two)
        assert torch.isfinite(two).all()


@STEPS
@pytest.mark.parametrize("plan", PLANS)
def test_a_replayed_graph_agrees_with_eager(plan, make):
    run = make(p=0.0)
    replay = captured(plan, run)
    with fastlora.backend(plan):
        eager = run()
    for one, two in zip(replay(), eager, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("plan", PLANS)
def test_siblings_in_a_replayed_graph_keep_masks_of_their_own(plan):
    """Equal adapters on equal weights: only the masks can tell the outputs of two apart."""
    linears = SMALL | {"k_proj": Linear(512, 512, True), "v_proj": Linear(512, 512, True)}
    weights = draw_weights(linears, 16, CUDA, torch.bfloat16)
    module, _ = build_layer("fastlora-bf16", weights, 0.5)
    attention = module.self_attn
    for name in ("k_proj", "v_proj"):
        getattr(attention, name).load_state_dict(attention.q_proj.state_dict())
    x = torch.randn(64, 512, device=CUDA).bfloat16()
    with torch.no_grad():
        q, k, v = captured(plan, lambda: attention(x, x)[:3])()
    for one, two in ((q, k), (k, v), (q, v)):
        assert not torch.equal(one, two)


def captured(plan, run):
    """Capture a step in a CUDA graph; returns a function that replays it and copies its results."""
    with fastlora.backend(plan):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()

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


class TwoStreams(nn.Module):
    """Two projections of one input, the second on another stream."""

    def __init__(self):
        super().__init__()
        for name in ("k_proj", "v_proj"):
            base = nn.Linear(512, 512, device=CUDA, dtype=torch.bfloat16)
            self.add_module(name, LoRALinear.from_linear(base, r=16, init_lora_weights=False))
        self.side = torch.cuda.Stream()

    def forward(self, x):
        main = torch.cuda.current_stream()
        x_is_written = main.record_event()
        torch.cuda._sleep(
            1 << 28
        )  # a tenth of a second: what main computes comes too late for side
        k = self.k_proj(x)
        torch.cuda.set_stream(self.side)
        self.side.wait_event(x_is_written)
        v = self.v_proj(x)
        torch.cuda.set_stream(main)
        return k, v


@pytest.mark.parametrize("plan", PLANS)
def test_a_sibling_on_another_stream_computes_its_own(plan, spy):
    model = TwoStreams()
    fastlora.patch(model)
    assert [group.names for _, _, group in siblings.groups_of(model)] == [("k_proj", "v_proj")]
    x = torch.randn(1024, 512, device=CUDA).bfloat16()
    with fastlora.backend(plan), torch.no_grad():
        _, expected = model(x)  # compiles
        torch.cuda.synchronize()
        spy.reset()
        _, v = model(x)
        model.side.synchronize()
        with torch.cuda.stream(model.side):
            seen = v.clone()
    torch.cuda.synchronize()
    assert spy.together == 4  # k computed both, and so did v
    assert torch.equal(seen, expected)


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


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("model", "rows"), [("Qwen2.5-0.5B", 1000), ("Qwen2.5-7B", 2048)])
def test_groups_of_qwen_are_as_accurate_as_peft(model, rows, plan):
    linears = MODELS[model].linears
    inputs = [torch.randn(rows, linears[name].k, device=CUDA).bfloat16() for name in INPUTS]
    results = []
    for provider in ("fastlora-bf16", "peft-bf16", "exact"):
        name = "peft-bf16" if provider == "exact" else provider
        weights = draw_weights(linears, 16, CUDA, torch.bfloat16)
        module, parameters = build_layer(name, weights, 0.0)
        dtype = torch.float64 if provider == "exact" else torch.bfloat16
        module.to(dtype)
        xs = [x.detach().to(dtype).requires_grad_() for x in inputs]
        with fastlora.backend(plan):
            ys = module(*xs)
            dys = [output_gradient(y) for y in ys]
            grads = torch.autograd.grad(ys, [*xs, *parameters], dys)
        results.append([*ys, *grads])
    for number, values in enumerate(zip(*results, strict=True)):
        assert_as_accurate(*values, name=f"result {number}")


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


def test_a_captured_step_keeps_what_its_graph_reads_and_writes():
    y = torch.zeros(8, device=CUDA)

    def capture():
        x = torch.ones(8, device=CUDA)
        return measuring.captured(lambda: y.copy_(x), None), weakref.ref(x)

    replay, alive = capture()
    gc.collect()
    assert alive() is not None
    replay()
    assert y.sum() == 8
    del replay
    gc.collect()
    assert alive() is None


def test_a_session_measures_in_graphs_with_every_column_of_a_gpu(tmp_path, monkeypatch):
    """`fastlora bench` on a small model: every level, every provider but the compiled one."""
    monkeypatch.undo()  # poisoned memory cannot be filled where it requires a gradient
    monkeypatch.setattr(measuring, "turns_for", lambda *_: 1)  # else it takes all its seconds
    qwen = shapes.MODELS["Qwen2.5-0.5B"]
    config = {**qwen.config, "num_hidden_layers": 2, "vocab_size": 512}
    options = planning.Options(
        models=[shapes.Model("Qwen2.5-0.5B, cut", qwen.linears, 2, config)],
        tokens=(1024,),
        providers=("peft", "peft-bf16", "addmm", "fastlora-fused", "fastlora-hybrid"),
        device=CUDA,
        dtype=torch.bfloat16,
        rounds=5,
        seconds=300.0,
    )
    run = session.Session(options, tmp_path)
    rows = run.run()
    assert not run.notes
    assert not [row for row in rows if row.refused]
    timed = [row for row in rows if row.level not in ("counts", "roof")]
    assert {row.level for row in timed} == {"layer", "linear", "step", "operation"}
    for row in timed:
        assert row.timer == ("eager" if row.level == "step" else "graph")
        assert min(row.median_us, row.eager_us, row.host_us) > 0
        assert row.peak_mib >= 0
        assert row.gpu
        assert row.driver
        if row.level == "step":
            assert row.launches > 50
            assert row.tokens_per_s > 0
