"""The gate of the benchmark: right providers pass, and no wrong one is ever timed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from fastlora import cli, plans
from fastlora.bench import checking, measuring, session
from fastlora.bench.checking import WrongResult, check
from fastlora.bench.measuring import Timing
from fastlora.bench.modules import Case
from fastlora.bench.planning import Options
from fastlora.bench.providers import PROVIDERS, SCALING, Provider, find
from fastlora.bench.session import Session
from fastlora.bench.shapes import Linear, Model
from fastlora.kernels import low_rank_gemm
from fastlora.kernels.dtypes import dot
from fastlora.kernels.tile_order import load_tile

CPU = torch.device("cpu")
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
P = 0.1
ROWS, RANK = 128, 8

LINEAR = {"q_proj": Linear(40, 24, has_bias=True)}
# As in a model with few heads for keys: k and v are narrower, o is fed by q's width.
LAYER = {
    "q_proj": Linear(40, 24, has_bias=True),
    "k_proj": Linear(16, 24, has_bias=True),
    "v_proj": Linear(16, 24, has_bias=True),
    "o_proj": Linear(24, 40),
    "gate_proj": Linear(56, 24),
    "up_proj": Linear(56, 24),
    "down_proj": Linear(24, 56),
}
SHAPES = [pytest.param(LINEAR, id="linear"), pytest.param(LAYER, id="layer")]
DTYPES = [pytest.param(FP32, id="fp32"), pytest.param(BF16, id="bf16")]
# Their kernels are interpreted here, which is slow, and wrong in bf16: they are asked for less.
HELD_TO_A_PLAN = [name for name, provider in PROVIDERS.items() if provider.plan != "auto"]
ON_A_CPU = [
    name
    for name, provider in PROVIDERS.items()
    if provider.countable and name not in HELD_TO_A_PLAN
]


@functools.cache
def case_of(dtype: torch.dtype, p: float = P, layer: bool = False) -> Case:
    """A case whose fp64 results are computed once for all tests."""
    return Case(LAYER if layer else LINEAR, ROWS, RANK, p, CPU, dtype)


def test_the_providers_of_these_tests_are_all_but_the_compiled_one():
    assert {*ON_A_CPU, *HELD_TO_A_PLAN, "peft-compiled"} == set(PROVIDERS)
    assert {"frozen", "peft", "addmm", "fastlora"} <= set(ON_A_CPU)


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", [False, True], ids=["linear", "layer"])
@pytest.mark.parametrize("name", ON_A_CPU)
def test_a_right_provider_passes(name, layer, dtype, p):
    provider = find(name)
    if p and not provider.has_dropout:
        with pytest.raises(ValueError, match=f"{name} has no dropout, got p = {p}"):
            case_of(dtype, p, layer).checked_step(provider)
        return
    step, gate = case_of(dtype, p, layer).checked_step(provider)
    if name == "frozen":
        assert gate is None
    else:
        assert 0.0 < gate <= 1.0
    outputs, of_inputs, of_parameters = step()
    assert all(result.isfinite().all() for result in (*outputs, *of_inputs, *of_parameters))
    linears = len(LAYER) if layer else 1
    assert len(outputs) == linears
    assert len(of_inputs) == len(case_of(dtype, p, layer).inputs)
    assert len(of_parameters) == (0 if name == "frozen" else 2 * linears)


@pytest.mark.skipif(not plans.interpreting(), reason="the kernels are not interpreted")
@pytest.mark.parametrize(
    ("linears", "rows", "p"),
    [(LINEAR, ROWS, 0.0), (LINEAR, ROWS, P), (LAYER, 16, P)],
    ids=["linear", "linear-dropout", "layer-dropout"],
)
@pytest.mark.parametrize("name", HELD_TO_A_PLAN)
def test_our_kernels_pass(name, linears, rows, p):
    _, gate = Case(linears, rows, RANK, p, CPU, FP16).checked_step(find(name))
    assert 0.0 < gate <= 1.0


class Lora(nn.Module):
    """A right LoRA linear in plain PyTorch; every wrong one below overrides a part of it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.p = getattr(layer.lora_dropout["default"], "p", 0.0)  # nn.Identity has none

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.adapter(
            self.layer.lora_A["default"].weight, self.layer.lora_B["default"].weight
        )
        return self.output(self.base(x), self.term(x, a, b))

    def adapter(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a, b

    def base(self, x: Tensor) -> Tensor:
        return self.layer.base_layer(x)

    def dropped(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.p, self.training)

    def term(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        h = nn.functional.linear(self.dropped(x), a)
        return nn.functional.linear(h, b) * SCALING

    def output(self, base: Tensor, term: Tensor) -> Tensor:
        return base + term

    def keep(self, x: Tensor) -> Tensor:
        """Draw a mask, with its factor."""
        return nn.functional.dropout(torch.ones_like(x), self.p, self.training)


def changed(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the same values; what flows back through them is changed."""
    result = tensor.clone()
    result.register_hook(change)
    return result


def mixed(values_of: Tensor, gradient_of: Tensor) -> Tensor:
    """Return the values of one tensor with the gradient of another."""
    return gradient_of + (values_of - gradient_of).detach()


class ScaledOutput(Lora):
    def output(self, base, term):
        return (base + term) * 1.01


class OtherScaling(Lora):
    def output(self, base, term):
        return base + term / SCALING


class NoBias(Lora):
    def base(self, x):
        return nn.functional.linear(x, self.layer.base_layer.weight)


class LargeGradA(Lora):
    def adapter(self, a, b):
        # The least that is told from rounding: bf16 has 8 bits, and fp32 its 24.
        factor = 1.001 if self.layer.base_layer.weight.dtype == FP32 else 1 + 2**-6
        return changed(a, lambda grad: grad * factor), b


class ZeroGradB(Lora):
    def adapter(self, a, b):
        return a, changed(b, torch.zeros_like)


class TransposedGradB(Lora):
    def adapter(self, a, b):
        return a, changed(b, lambda grad: grad.t().reshape(grad.shape))


class NoLowRankGradX(Lora):
    def term(self, x, a, b):
        return super().term(x.detach(), a, b)


class NoFrozenGradX(Lora):
    def base(self, x):
        return super().base(x.detach())


def with_nan(tensor: Tensor) -> Tensor:
    spoiled = tensor.clone()
    spoiled.view(-1)[7] = float("nan")
    return spoiled


class OneNan(Lora):
    def output(self, base, term):
        return with_nan(base + term)


class OneNanInGradA(Lora):
    def adapter(self, a, b):
        return changed(a, with_nan), b


class OneColumnLess(Lora):
    def output(self, base, term):
        return (base + term)[..., :-1]


class IgnoresEval(Lora):
    def dropped(self, x):
        return nn.functional.dropout(x, self.p, training=True)


class NeverDrops(Lora):
    def dropped(self, x):
        return x


class NotScaledUp(Lora):
    def dropped(self, x):
        return super().dropped(x) * (1 - self.p if self.training else 1)


class HalfTheRate(Lora):
    def dropped(self, x):
        return nn.functional.dropout(x, self.p / 2, self.training)


class DropsTheFrozenInput(Lora):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, self.p, self.training))

    def dropped(self, x):
        return x


class OtherMaskForGradX(Lora):
    def dropped(self, x):
        first, second = self.keep(x), self.keep(x)
        return mixed(x * first, x * second)


class OtherMaskForGradA(Lora):
    def term(self, x, a, b):
        first, second = self.keep(x), self.keep(x)
        linear = nn.functional.linear
        # Values and dx by the first mask, dA by the second.
        h = mixed(linear(x * first, a), linear(x * first, a.detach()) + linear(x * second, a))
        h = h - linear((x * second), a.detach()) + linear((x * second).detach(), a.detach())
        return linear(h, b) * SCALING


class OtherMaskForGradB(Lora):
    def term(self, x, a, b):
        first, second = self.keep(x), self.keep(x)
        linear = nn.functional.linear
        h = linear(x * first, a)
        other = linear(linear(x * second, a).detach(), b)
        term = linear(h, b.detach())
        return mixed(term, term + other) * SCALING


class NoMaskInBackward(Lora):
    def dropped(self, x):
        return mixed(super().dropped(x), x)


class OneMaskForAllRows(Lora):
    def dropped(self, x):
        return x * self.keep(x[:, :1])


class DropsTheRank(Lora):
    def term(self, x, a, b):
        h = nn.functional.linear(x, a)
        return nn.functional.linear(h * self.keep(h), b) * SCALING


class DropsTheOutput(Lora):
    def term(self, x, a, b):
        term = super().term(x, a, b)
        return term * self.keep(term)

    def dropped(self, x):
        return x


class SameMaskAtEveryCall(Lora):
    def keep(self, x):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return super().keep(x)

    def dropped(self, x):
        return x * self.keep(x)


class SwappedParameters(Lora):
    """Registers B before A, where the gradient of A is expected first."""

    def __init__(self, layer):
        super().__init__(layer)
        self.b, self.a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        del self.layer.lora_A, self.layer.lora_B

    def forward(self, x):
        return self.output(self.base(x), self.term(x, self.a, self.b))


def wrong_by(convert: Callable[[nn.Module], nn.Module], **changes: object) -> Provider:
    return replace(find("peft"), name="wrong", convert=convert, **changes)


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_mixed", [True, False], ids=["mixed", "one-dtype"])
def test_the_module_that_the_wrong_ones_are_made_of_is_right(is_mixed, dtype, p):
    _, gate = case_of(dtype, p).checked_step(wrong_by(Lora, mixed=is_mixed))
    assert 0.0 < gate <= 1.0


OFF = r"of q_proj is \S+ from fp64, allowed are "
OTHER_MASK = "of q_proj does not belong to the dropout mask of the forward pass"
VARIANCE = "times the variance of p = 0.1"
WRONG = [
    # In bf16 the output is less than an eps off, and the fp32 gradients tell.
    (ScaledOutput, f"(y|dA) {OFF}"),
    (OtherScaling, f"y {OFF}"),
    (NoBias, f"y {OFF}"),
    (LargeGradA, f"dA {OFF}"),
    (ZeroGradB, f"dB {OFF}"),
    (TransposedGradB, f"dB {OFF}"),
    (NoLowRankGradX, f"dx {OFF}"),
    (NoFrozenGradX, f"dx {OFF}"),
    (OneNan, "y of q_proj is nan from fp64"),
    (OneNanInGradA, "dA of q_proj is nan from fp64"),
    (SwappedParameters, r"dA of q_proj is \[40, 8\], not \[8, 24\]"),
    (IgnoresEval, f"y {OFF}"),
    (NeverDrops, f"the dropout of q_proj has 0.00 {VARIANCE}"),
    (NotScaledUp, r"the dropout of q_proj changes the mean of its output by -1\d\.\d%"),
    (HalfTheRate, "the dropout of q_proj is not that of its input, scaled by"),
    (DropsTheFrozenInput, rf"the dropout of q_proj has [1-9]\.\d\d {VARIANCE}"),
    (OtherMaskForGradX, f"dx {OTHER_MASK}"),
    (OtherMaskForGradA, f"dA {OTHER_MASK}"),
    (OtherMaskForGradB, f"dB {OTHER_MASK}"),
    (NoMaskInBackward, f"dx {OTHER_MASK}"),
]


def name_of(value: object) -> str | None:
    return getattr(value, "__name__", "")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("module", "message"), WRONG, ids=name_of)
def test_a_wrong_provider_is_refused_and_told_what_is_wrong(module, message, dtype):
    with pytest.raises(WrongResult, match=message):
        case_of(dtype).checked_step(wrong_by(module))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_output_of_another_shape_is_refused(dtype):
    with pytest.raises(RuntimeError, match=r"shape.*\[1, 128, 40\].*shape.*\[1, 128, 39\]"):
        case_of(dtype).checked_step(wrong_by(OneColumnLess))


def test_one_mask_for_all_rows_is_refused_where_there_are_many():
    case = Case(LINEAR, 2048, RANK, P, CPU, FP32)
    with pytest.raises(WrongResult, match="the dropout of q_proj changes the mean of its output"):
        case.checked_step(wrong_by(OneMaskForAllRows))


@pytest.mark.parametrize(
    ("provider", "message"),
    [
        pytest.param(wrong_by(DropsTheRank), "not that of its input", id="drops-the-rank"),
        pytest.param(wrong_by(DropsTheOutput), "not that of its input", id="drops-the-output"),
        pytest.param(wrong_by(SameMaskAtEveryCall), "same mask in two calls", id="same-mask"),
        pytest.param(
            wrong_by(ScaledOutput, mixed=False),
            r"y of q_proj is 1\.\d+ times",
            id="one-percent-off",
        ),
    ],
)
def test_what_looks_like_rounding_or_like_dropout_is_refused(provider, message):
    with pytest.raises(WrongResult, match=message):
        case_of(BF16).checked_step(provider)


def wrong_in(name: str, module: type[Lora]) -> Provider:
    """Return a provider that is wrong in one linear of a layer, known by its sizes."""

    def convert(layer: nn.Module) -> nn.Module:
        is_it = layer.base_layer.weight.shape == (LAYER[name].n, LAYER[name].k)
        return (module if is_it else Lora)(layer)

    return wrong_by(convert)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("q_proj", NoLowRankGradX, "dx of q_proj/k_proj/v_proj is"),
        ("o_proj", LargeGradA, "dA of o_proj is"),
        ("down_proj", ZeroGradB, "dB of down_proj is"),
        ("down_proj", HalfTheRate, "the dropout of down_proj"),
        ("q_proj", OtherMaskForGradX, "dx of q_proj/k_proj/v_proj does not belong"),
        ("o_proj", OtherMaskForGradA, "dA of o_proj does not belong"),
    ],
    ids=name_of,
)
def test_one_wrong_linear_of_a_layer_is_found(name, module, message, dtype):
    with pytest.raises(WrongResult, match=message):
        case_of(dtype, layer=True).checked_step(wrong_in(name, module))


def test_the_error_is_told_as_a_share_of_what_is_allowed_and_nan_is_refused():
    exact = {"y": torch.tensor([3.0, 4.0], dtype=torch.float64)}
    native = {"y": torch.tensor([3.0, 4.5])}  # 0.1 off, so that 0.12 is allowed
    allowed = 1.2 * 0.1 + torch.finfo(FP32).eps
    share = check({"y": torch.tensor([3.0, 4.25])}, native, exact)
    assert share == pytest.approx(0.05 / allowed, abs=0, rel=1e-12)
    assert check({"y": torch.tensor([3.0, 4.0])}, native, exact) == 0.0
    with pytest.raises(WrongResult, match=r"y is 2.0e-01 from fp64, allowed are 1.2e-01"):
        check({"y": torch.tensor([3.0, 5.0])}, native, exact)
    with pytest.raises(WrongResult, match=r"y is nan from fp64"):
        check({"y": torch.tensor([3.0, float("nan")])}, native, exact)
    with pytest.raises(WrongResult, match=r"y is \[3\], not \[2\]"):
        check({"y": torch.zeros(3)}, native, exact)


@pytest.mark.parametrize(
    ("rank", "p"),
    [
        pytest.param(RANK, P, id="masks-with-tails"),
        pytest.param(16, 0.5, id="without"),
    ],
)
def test_the_spread_that_is_allowed_is_that_of_masks(rank, p):
    """Else a right provider with few in features is refused by its luck: 5 masks in 600."""
    case = Case(LINEAR, ROWS, rank, p, CPU, FP32)
    (exact,) = case.reference._exact_linears.values()
    expected, deviation = exact.power(p)
    powers = []
    for _ in range(500):
        dropped = nn.functional.dropout(exact.x, p)
        noise = SCALING * (dropped @ exact.a.t()) @ exact.b.t() - exact.term
        powers.append(noise.square().sum().item() / expected)
    powers = torch.tensor(powers)
    assert abs(powers.mean() - 1) <= 6 * powers.std() / len(powers) ** 0.5
    # The estimate from 500 masks is itself 3 % off, or 4 % as the tails are heavy.
    assert powers.std() / 1.2 <= deviation <= 1.5 * powers.std()


@pytest.mark.parametrize(
    ("rows", "rank", "p"),
    [
        pytest.param(64, 16, 0.5, id="without-tails"),
        pytest.param(16, RANK, 0.9, id="no-row-is-kept"),
        pytest.param(16, RANK, 0.1, id="few-rows"),
    ],
)
def test_no_mask_makes_a_right_provider_wrong(monkeypatch, rows, rank, p):
    case = Case(LINEAR, rows, rank, p, CPU, FP32)
    for seed in range(30):
        monkeypatch.setattr(checking, "_SEED", seed)
        for name in ("peft", "fastlora"):
            case.checked_step(find(name))


TINY = Model("tiny", LAYER, 2, {})


@pytest.fixture
def short(monkeypatch):
    """Do not measure the machine's roofs, which takes a second; time everything once a round."""
    roof = Timing(((1.0,),) * 5)
    monkeypatch.setattr(measuring, "copy_and_product", lambda device, dtype: (roof, roof, 1, 1))
    monkeypatch.setattr(measuring, "turns_for", lambda steps, device, rounds, seconds: 1)
    monkeypatch.setattr(session, "gc", SimpleNamespace(collect=lambda: None))  # 0.2 s a case


@dataclass
class Watched:
    """How often the wrong module was called, and what was timed."""

    calls: int = 0
    timed: list[set[str]] = field(default_factory=list)


@pytest.fixture
def watched(monkeypatch, short) -> Watched:
    """Register the provider "wrong", and watch what is timed."""
    seen = Watched()

    class Wrong(ScaledOutput):
        def forward(self, x):
            seen.calls += 1
            return super().forward(x)

    monkeypatch.setitem(PROVIDERS, "wrong", wrong_by(Wrong))
    for name in ("turns_for", "in_rounds"):
        function = getattr(measuring, name)

        def watch(steps, *args, function=function, **kwargs):
            seen.timed.append(set(steps))
            before = seen.calls
            result = function(steps, *args, **kwargs)
            assert seen.calls == before
            return result

        monkeypatch.setattr(measuring, name, watch)
    return seen


@pytest.mark.parametrize("level", ["layer", "linear"])
def test_a_deliberately_wrong_provider_is_refused_before_it_is_timed(watched, level, tmp_path):
    options = Options(
        models=[TINY], levels=[level], tokens=[ROWS], ranks=[RANK], dropouts=[P], rounds=5
    )
    rows = [row for row in Session(options, tmp_path).run() if row.level == level]
    of_wrong = [row for row in rows if row.provider == "wrong"]
    cases = {row.case for row in rows}
    assert len(cases) == (1 if level == "layer" else 5)
    assert {row.case for row in of_wrong} == cases
    for row in of_wrong:
        assert row.refused.startswith("y of ")
        assert row.median_us is row.gate is row.over_fastlora is None
    assert watched.calls > 0
    assert len(watched.timed) == 2 * len(cases)
    assert not any("wrong" in steps for steps in watched.timed)
    for case in cases:
        others = {row.provider: row for row in rows if row.case == case and row not in of_wrong}
        assert {"frozen", "peft", "peft-bf16", "fastlora", "fastlora-bf16"} <= set(others)
        assert all(row.median_us > 0 and not row.refused for row in others.values())
        assert all(row.gate <= 1 for name, row in others.items() if name != "frozen")
    written = (tmp_path / f"{level}.csv").read_text()
    assert written.count(",wrong,") == len(cases)


def test_the_command_says_refused_and_fails(watched, tmp_path, capsys):
    arguments = ["--levels", "linear", "--shape", "40", "24", "--tokens", str(ROWS), "--quick"]
    command = ["bench", *arguments, "--rank", str(RANK), "--out", str(tmp_path)]
    assert cli.main([*command, "--provider", "wrong", "--provider", "peft"]) == 1
    printed = capsys.readouterr().out
    for dropout in ("0.1", "0"):
        what = f"linear, 40 x 24 linear, 128 tokens, rank 8, dropout {dropout}"
        assert f"REFUSED wrong, {what}: y of linear is " in printed
    assert printed.count("REFUSED") == 2
    assert not any("wrong" in steps for steps in watched.timed)
    watched.timed.clear()
    assert cli.main([*command, "--provider", "peft"]) == 0
    assert "REFUSED" not in capsys.readouterr().out
    assert watched.timed


@triton.jit
def _first_chunk_of_the_rank(
    accumulator, h_ptr, term, first_row, M, first_column, N, R,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``gemm_tile.low_rank_product`` without its loop: right up to a rank of BLOCK_R."""
    h_g = h_ptr + tl.cast(term.first_h, tl.int64)
    h = load_tile(h_g, R, 1, first_row, M, 0, R, BLOCK_M, BLOCK_R)
    q = load_tile(term.q, term.stride_qr, term.stride_qn, 0, R, first_column, N, BLOCK_R, BLOCK_N)
    return dot(h, q.to(h.dtype), accumulator, PRECISION)


@pytest.mark.skipif(not plans.interpreting(), reason="the kernels are not interpreted")
def test_a_wrong_kernel_of_ours_is_refused_before_it_is_timed(monkeypatch, short, tmp_path):
    """One that the check of the device, at rank 16, does not find."""
    monkeypatch.setattr(low_rank_gemm, "low_rank_product", _first_chunk_of_the_rank)
    monkeypatch.setattr(plans, "_failures", {})
    assert plans.check_device(CPU) == {}
    options = Options(
        linears={"tiny": Linear(24, 16)}, levels=["linear"], tokens=[32], ranks=[16, 40],
        dropouts=[0.0], dtype=FP16, rounds=5, providers=["fastlora-fused", "peft"],
    )  # fmt: skip
    rows = Session(options, tmp_path).run()
    refused = {(row.provider, row.rank): row.refused for row in rows if row.refused}
    assert refused.keys() == {("fastlora-fused", 40)}
    assert refused["fastlora-fused", 40].startswith("y of linear is ")
    timed = {(row.provider, row.rank) for row in rows if row.level == "linear" and row.median_us}
    assert timed == {
        *((name, rank) for name in ("frozen", "peft", "fastlora") for rank in (16, 40)),
        ("fastlora-fused", 16),
    }


def test_a_result_that_is_missing_is_refused():
    exact = {name: torch.ones(3).double() for name in ("y", "dx")}
    with pytest.raises(WrongResult, match="dx is missing"):
        check({"y": torch.ones(3)}, exact, exact)
