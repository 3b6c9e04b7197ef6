"""Launches and bytes: the counter is right where one can count by hand, and fastlora keeps to them.

Everything is bf16, 2 bytes, unless it says otherwise.
"""

from __future__ import annotations

import json

import counts
import pytest
import torch

import fastlora
from fastlora import dropout, plans
from fastlora.bench import counting, providers
from fastlora.bench.shapes import (
    DROPOUT,
    GROUPS,
    INPUTS,
    LORAFUSION,
    MAIN_MODELS,
    MODELS,
    NAMES,
    RANK,
    Linear,
)
from fastlora.kernels import adapter_grads, low_rank_gemm, shrink, tile_config
from fastlora.kernels.tile_config import TileConfig

M = 2048
SQUARE = Linear(4096, 4096)
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def poisoned_empty():
    """Override the fixture of all tests: filling what fastlora allocates would be counted."""


@pytest.fixture
def no_tuned_tiles(monkeypatch, tmp_path):
    """Count with default tiles, so that the number of launches does not follow the table."""
    monkeypatch.setattr(tile_config, "TUNED", tmp_path)
    counting.clear()
    yield tmp_path
    counting.clear()


def empty(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype)


def both(provider, plan, shape, m):
    """Count forward and backward of one linear together."""
    forward, backward = counting.count(provider, shape, m, plan=plan)
    return forward + backward


def counted(function, *tensors, **kwargs):
    """Count what one call launches."""
    with counting.recording() as recorder:
        function(*[empty(*shape) for shape in tensors], **kwargs)
    return recorder.counts()


@pytest.mark.parametrize(
    ("function", "shapes", "elements"),
    [
        pytest.param(torch.mm, [(4, 8), (8, 6)], 32 + 48 + 24, id="mm"),
        pytest.param(lambda x: x @ x.t(), [(4, 8)], 32 + 16, id="an-operand-used-twice"),
        pytest.param(lambda x: x.add_(1), [(4, 8)], 2 * 32, id="in-place-reads-and-writes"),
        pytest.param(lambda x: x.zero_(), [(4, 8)], 32, id="zero-only-writes"),
        pytest.param(lambda x, y: x.copy_(y), [(4, 8), (4, 8)], 2 * 32, id="copy-reads-one"),
        pytest.param(
            lambda out, x, y: torch.mm(x, y, out=out),
            [(4, 6), (4, 8), (8, 6)],
            32 + 48 + 24,
            id="out-is-not-read",
        ),
        pytest.param(
            lambda out, x, y: out.addmm_(x, y),
            [(4, 6), (4, 8), (8, 6)],
            32 + 48 + 2 * 24,
            id="addmm-reads-what-it-adds-to",
        ),
        pytest.param(
            lambda out, x, y: out.addmm_(x, y, beta=0),
            [(4, 6), (4, 8), (8, 6)],
            32 + 48 + 24,
            id="beta-0-is-not-read",
        ),
        pytest.param(
            lambda dy, x: dy.expand(4, 8) * x, [(1, 8), (4, 8)], 8 + 2 * 32, id="expanded"
        ),
        pytest.param(lambda x: x[:2] + 1, [(4, 8)], 2 * 16, id="a-slice-is-what-it-shows"),
    ],
)
def test_one_operation_moves_each_operand_once(function, shapes, elements):
    found = counted(function, *shapes)
    assert (found.launches, found.bytes, found.scratch) == (1, 2 * elements, 0)


def test_views_and_allocations_cost_nothing():
    def views(x):
        x.t().view(8, 4).detach()[1:].unsqueeze(0).expand(3, -1, -1)
        x.new_empty(5), torch.empty_like(x), torch.promote_types(x.dtype, torch.float32)

    found = counted(views, (4, 8))
    assert (found.launches, found.bytes) == (0, 0)


def test_dropout_is_one_launch_that_saves_a_byte_mask_as_in_cuda():
    found = counted(torch.nn.Dropout(0.5), (4, 8))
    assert found.names == {"native_dropout": 1}
    assert found.bytes == 2 * 32 + 2 * 32 + 32


@pytest.mark.parametrize("splits", [1, 2])
def test_a_kernel_moves_each_tensor_in_its_arguments_once_and_partial_results_twice(splits):
    m, k, r = 64, 256, 16
    config = TileConfig(32, block_k=32, splits=splits)
    with counting.recording() as recorder:
        x, a, seed = empty(m, k), empty(r, k), torch.empty((), dtype=torch.int64)
        shrink.shrink(
            x, [a], seed, dropout.threshold(0.5), rank_dtype=BF16, return_bits=True, config=config
        )
    found = recorder.counts()
    operands = 2 * (m * k + r * k + m * r) + m * k // 8 + 8
    scratch = 2 * splits * 4 * m * r if splits > 1 else 0
    assert found.launches == splits
    assert (found.operands, found.scratch) == (operands, scratch)


def test_tensors_inside_descriptors_and_stand_ins_for_absent_ones_are_counted_once():
    m, n, k, r = 64, 96, 128, 16
    with counting.recording() as recorder:
        x, weight, h, b = empty(m, k), empty(n, k), empty(1, m, r), empty(n, r)
        low_rank_gemm.low_rank_gemm(x, [weight], [None], h, [b], [1.0])
    found = recorder.counts()
    assert found.names == {"_low_rank_gemm_kernel": 1}
    assert found.bytes == 2 * (m * k + n * k + m * r + n * r + m * n)


def test_an_expanded_dy_costs_a_kernel_what_it_holds():
    m, n, r = 64, 96, 16

    def run(dy):
        with counting.recording() as recorder:
            operands = [dy()], None, empty(1, m, r), [empty(n, r)], None, [1.0]
            adapter_grads.adapter_grads(*operands, rank_dtype=BF16, grad_dtype=BF16)
        return recorder.counts().bytes

    whole, one = run(lambda: empty(m, n)), run(lambda: empty(1, 1).expand(m, n))
    assert whole - one == 2 * (m * n - 1)


@pytest.mark.parametrize("case", LORAFUSION)
def test_the_fused_plan_moves_what_the_design_says_and_stays_within_the_limits(case):
    m, shape = 8192, LORAFUSION[case]
    n, k, r = shape.n, shape.k, RANK
    found = both("fastlora-bf16", "fused", shape, m)
    x, y, weight, bits, seed = m * k, m * n, n * k, m * k // 8, 8
    thin, a, b = m * r, r * k, n * r
    forward = seed + (2 * (x + a + thin) + seed + bits) + 2 * (x + weight + thin + b + y)
    backward = (
        2 * (y + b + thin)  # dy, B and h
        + 2 * (thin + b)  # dh and dB, as sums
        + (2 * (x + thin) + bits)  # x and dh
        + 2 * a  # dA, as a sum
        + (2 * (y + weight + thin + a + x) + bits)  # dx
    )
    assert found.operands == forward + backward
    assert found.operands <= counts.LIMITS[case] * counts.GIB
    assert found.scratch > 0


# At 8192 rows there are row blocks enough and shrink is one launch; fewer rows split K and add one.
@pytest.mark.parametrize(
    ("shape", "p", "provider", "plan", "forward", "backward"),
    [
        (SQUARE, DROPOUT, "fastlora", "fused", 3, 5),
        (SQUARE, DROPOUT, "fastlora", "hybrid", 4, 6),
        (SQUARE, 0.0, "fastlora", "fused", 2, 5),
        (SQUARE, 0.0, "fastlora", "hybrid", 3, 6),
        (MODELS["Qwen2.5-0.5B"].linears["q_proj"], DROPOUT, "fastlora", "fused", 3, 5),
        (MODELS["Qwen2.5-0.5B"].linears["q_proj"], DROPOUT, "fastlora", "hybrid", 4, 6),
        (SQUARE, DROPOUT, "frozen", "auto", 1, 1),
        (SQUARE, 0.0, "addmm", "auto", 5, 10),
        (SQUARE, DROPOUT, "peft-bf16", "auto", 6, 8),
        (SQUARE, DROPOUT, "peft", "auto", 10, 12),
    ],
)
def test_launches_of_one_linear(no_tuned_tiles, shape, p, provider, plan, forward, backward):
    passes = counting.count(provider, shape, 8192, p=p, plan=plan)
    assert [one.launches for one in passes] == [forward, backward]


@pytest.mark.parametrize("plan", ["fused", "hybrid"])
def test_fp32_adapters_are_cast_inside_the_kernels(plan):
    mixed, half = (both(provider, plan, SQUARE, M) for provider in ("fastlora", "fastlora-bf16"))
    assert "_to_copy" not in mixed.names
    assert mixed.names == half.names


LAYERS = pytest.mark.parametrize("model", MAIN_MODELS)
LIMITED = pytest.mark.parametrize("plan", counts.LAUNCH_LIMITS)


def layer(provider, model, m, p=DROPOUT, plan=None):
    """Record the linears of a decoder layer."""
    return counting.record_layer(provider, MODELS[model].linears, m, p=p, plan=plan)


@LAYERS
@LIMITED
def test_launches_of_a_decoder_layer_stay_within_the_promised_limits(no_tuned_tiles, model, plan):
    forward, backward = layer("fastlora", model, 8192, plan=plan).counts
    assert counts.exceeded(plan, forward, backward) is None


@LIMITED
def test_every_group_draws_one_seed_and_none_without_dropout(plan):
    for p, seeds in ((DROPOUT, len(GROUPS)), (0.0, 0)):
        forward, backward = layer("fastlora", "Qwen2.5-0.5B", M, p, plan).counts
        assert (forward.names.get(counting.SEED, 0), backward.names.get(counting.SEED, 0)) == (
            seeds,
            0,
        )


@LIMITED
def test_beside_its_frozen_products_a_group_reads_x_twice(plan):
    """Once for every h of the group, once for every dA."""
    passes = layer("fastlora", "Qwen3-8B", M, plan=plan)
    for number, names in enumerate(GROUPS):
        # The fused products of a group are one launch.
        products = {"fused": ["_low_rank_gemm_kernel"], "hybrid": ["addmm_"] * len(names)}[plan]
        expected = ["_shrink_kernel", *products, "_input_pass_kernel"]
        assert passes.readers(number) == expected, INPUTS[number]


@pytest.mark.parametrize(
    ("provider", "plan", "additions"),
    [("frozen", "auto", 3), ("fastlora", "fused", 0), ("fastlora", "hybrid", 0)],
)
def test_autograd_adds_up_the_gradients_of_shared_inputs_for_bare_linears_and_not_for_groups(
    provider, plan, additions
):
    _, backward = layer(provider, "Qwen2.5-7B", M, 0.0, plan).counts
    assert sum(backward.names.get(name, 0) for name in ("add", "add_")) == additions


def test_a_layer_of_peft_launches_what_its_linears_do_and_the_additions():
    """Nothing of it is shared, so that seven linears one by one are a check of the whole."""
    linears = MODELS["Qwen2.5-0.5B"].linears
    whole = layer("peft", "Qwen2.5-0.5B", M).counts
    parts = [counting.count("peft", shape, M) for shape in linears.values()]
    forward, backward = (sum((each[i] for each in parts), counting.Counts()) for i in (0, 1))
    additions = 2 * M * 3 * 3 * linears["q_proj"].k
    assert (whole[0].launches, whole[0].bytes) == (forward.launches, forward.bytes)
    assert whole[1].launches == backward.launches + 3
    assert whole[1].bytes == backward.bytes + additions


@LAYERS
def test_fused_moves_less_than_hybrid_and_hybrid_less_than_peft(model):
    passes = {name: layer(provider, model, M).counts for name, provider in counts.COLUMNS.items()}
    sums = {name: forward + backward for name, (forward, backward) in passes.items()}
    moved = [sums[name].bytes for name in ("frozen", "fused", "hybrid", "peft-bf16", "peft")]
    assert moved == sorted(moved)
    assert len(set(moved)) == len(moved)
    launches = [sums[name].launches for name in ("fused", "hybrid", "peft-bf16", "peft")]
    assert launches == sorted(launches)
    assert sums["frozen"].saved == 0
    for name in ("fused", "hybrid"):
        assert 0 < sums[name].saved < 0.25 * sums["peft"].saved


def test_saved_bytes_are_h_and_one_bit_an_element():
    (forward, _) = counting.count("fastlora", SQUARE, M, plan="fused")
    assert forward.saved == 2 * M * RANK + M * SQUARE.k // 8


def test_automatic_plans_follow_the_committed_table_and_no_user_s(
    no_tuned_tiles, monkeypatch, tmp_path_factory
):
    linears = MODELS["Qwen3-8B"].linears
    n = linears["gate_proj"].n
    keys = [
        tile_config.tile_key("low_rank_gemm", BF16, M, 2 * n, 4096, RANK, siblings=2),
        tile_config.tile_key("input_grad", BF16, M, 2 * n, 4096, RANK, siblings=2),
    ]
    table = json.dumps({"entries": [{"key": vars(key), "plan": "fused"} for key in keys]})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    tile_config.user_cache().mkdir(parents=True)
    (tile_config.user_cache() / "nvidia-h200.json").write_text(table)
    hybrid = counts.automatic_plans(linears, M)
    assert set(hybrid["low_rank_gemm"].values()) == {"hybrid"}
    assert hybrid["input_grad"] == {"/".join(names): "hybrid" for names in GROUPS}
    (no_tuned_tiles / "nvidia-h200.json").write_text(table)
    tuned = counts.automatic_plans(linears, M)
    for operation in ("low_rank_gemm", "input_grad"):
        assert tuned[operation] == hybrid[operation] | {"gate_proj/up_proj": "fused"}


def test_the_automatic_plan_is_counted_as_an_h200_would_follow_it(no_tuned_tiles):
    found, hybrid = (
        layer("fastlora", "Qwen2.5-0.5B", M, plan=plan).counts[0].names for plan in (None, "hybrid")
    )
    assert found == hybrid


def test_a_cpu_is_counted_by_what_it_runs():
    """Dropout of peft is three operations and a mask in the dtype of x; ours draws integers."""
    linears = MODELS["Qwen2.5-0.5B"].linears

    def here(provider, p):
        return counting.record_layer(
            provider, linears, 64, p=p, dtype=torch.float32, as_h200=False
        ).counts[0]

    bare, peft = here("frozen", 0.0), here("peft", DROPOUT)
    assert (bare.launches, bare.names) == (7, {"addmm": 3, "mm": 4})
    assert {peft.names[name] for name in ("bernoulli_", "div_", "mul")} <= {7, 14}
    assert "native_dropout" not in peft.names
    ours = here("fastlora", DROPOUT)
    assert not any(name.endswith("_kernel") for name in ours.names)
    assert ours.launches > peft.launches
    assert ours.saved < peft.saved / 10
    # Bare linears are the same on both, but for the name of the device.
    assert bare.bytes == layer_in_fp32("frozen").bytes


def layer_in_fp32(provider):
    linears = MODELS["Qwen2.5-0.5B"].linears
    return counting.record_layer(provider, linears, 64, p=0.0, dtype=torch.float32).counts[0]


@pytest.mark.parametrize("provider", ["peft-compiled", "nobody"])
def test_what_cannot_be_counted_is_refused(provider):
    message = "cannot be counted" if provider == "peft-compiled" else "there is no provider"
    with pytest.raises(ValueError, match=message):
        counting.count(provider, SQUARE, M)


def test_flops_are_those_of_the_products():
    m, n, k, r = 8192, SQUARE.n, SQUARE.k, RANK
    assert both("frozen", None, SQUARE, m).flops == 4 * m * n * k
    thin = 3 * 2 * m * r * (n + k)  # h, y; dh, dB, dA, dx
    for provider, plan in (("peft", None), ("fastlora", "fused"), ("fastlora", "hybrid")):
        assert both(provider, plan, SQUARE, m).flops == 4 * m * n * k + thin
    # It computes h again in the backward pass.
    forward, backward = counting.count("addmm", SQUARE, m, p=0.0)
    assert (forward + backward).flops == 4 * m * n * k + thin + 2 * m * k * r


def test_a_layer_calls_each_linear_on_its_input_and_returns_them_in_order():
    linears = {name: Linear(8 + i, 24) for i, name in enumerate(NAMES)}
    weights = providers.draw_weights(linears, 8, torch.device("cpu"), torch.float32)
    module, _ = providers.build_layer("frozen", weights, 0.0)
    inputs = dict(zip(GROUPS, torch.randn(len(GROUPS), 5, 24), strict=True))
    built = dict(module.self_attn.named_children()) | dict(module.mlp.named_children())
    expected = {name: built[name](x) for names, x in inputs.items() for name in names}
    for name, y in zip(linears, module(*inputs.values()), strict=True):
        assert torch.equal(y, expected[name])


def test_counting_leaves_nothing_behind():
    device = torch.device("cpu")
    before = tile_config.tile_config_for("shrink", device, BF16, 64, k=8192, r=16)
    failures = dict(plans._failures)
    counting.clear()
    counting.count("fastlora", Linear(64, 8192), 64, plan="fused")
    assert tile_config.tile_config_for("shrink", device, BF16, 64, k=8192, r=16) == before
    assert plans.device_limits(device) == tile_config.INTERPRETER
    assert plans._failures == failures
    layer = fastlora.LoRALinear.from_linear(torch.nn.Linear(8, 8), lora_dropout=0.5)
    assert layer(torch.ones(2, 8)).isfinite().all()


def test_the_command_fails_where_a_limit_on_operands_is_exceeded(monkeypatch, capsys):
    _, problems = counts.lorafusion_table()
    assert problems == []
    monkeypatch.setitem(counts.LIMITS, "5120 x 5120", 0.6)
    rows, problems = counts.lorafusion_table()
    assert [problem.partition(":")[0] for problem in problems] == ["5120 x 5120"]
    assert [row["case"] for row in rows] == list(LORAFUSION)
    assert "EXCEEDED" in capsys.readouterr().out


def test_the_command_fails_where_a_layer_launches_more_than_promised(monkeypatch, capsys):
    monkeypatch.setattr(counts, "MAIN_MODELS", ["Qwen2.5-0.5B"])
    assert counts.layers_table()[1] == []
    for limits in ((7, 20), (8, 19)):
        monkeypatch.setitem(counts.LAUNCH_LIMITS, "fused", limits)
        rows, problems = counts.layers_table()
        assert [problem.partition(":")[0] for problem in problems] == ["Qwen2.5-0.5B, fused"]
        assert "8 and 20 launches beside 4 seeds" in problems[0]
    assert [row["rows"] for row in rows] == [8192, 2048]
    assert "EXCEEDED" in capsys.readouterr().out
