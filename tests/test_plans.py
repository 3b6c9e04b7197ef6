"""Which plan a call follows: what is asked for, what the device can do, what was measured."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import warnings
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_peft

import fastlora
from fastlora import plans
from fastlora.kernels import tile_config
from fastlora.kernels.tile_config import DeviceLimits

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
H200 = DeviceLimits("NVIDIA H200", capability=90, shared_bytes=232448, processors=132)
OPERATIONS = ["shrink", "low_rank_gemm", "adapter_grads", "input_grad"]


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Pretend that ``CUDA`` is a device with some limits that passed (or failed) its check."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tile_config, "TUNED", tmp_path / "committed")
    monkeypatch.delenv(plans.ENVIRONMENT, raising=False)

    def start_anew():
        plans.unsupported_reason.cache_clear()
        plans.forget_measurements()

    def as_device(limits, failures=None):
        monkeypatch.setattr(plans, "device_limits", lambda device: limits)
        monkeypatch.setitem(plans._failures, CUDA, failures or {})
        start_anew()

    yield as_device
    start_anew()


def plan(operation="low_rank_gemm", device=CUDA, dtype=BF16, m=8192, n=4096, k=4096, r=16, **kw):
    return plans.plan_for(operation, device, dtype, m, n, k, r, **kw)


def test_without_a_gpu_everything_is_plain():
    for operation in OPERATIONS:
        assert plan(operation, CPU) == "plain"


@pytest.mark.skipif(not plans.interpreting(), reason="kernels are not interpreted here")
def test_interpreted_kernels_take_cpu_tensors_when_asked_to():
    with fastlora.backend("fused"):
        assert plan("low_rank_gemm", CPU) == "fused"
    with fastlora.backend("hybrid"):
        assert plan("low_rank_gemm", CPU) == "hybrid"
    assert plan("low_rank_gemm", CPU) == "plain"


def test_a_shape_that_was_not_measured_is_hybrid(pretend):
    pretend(H200)
    assert {plan(operation) for operation in OPERATIONS} == {"hybrid"}


def test_few_rows_go_to_cublas_unless_a_mask_is_drawn(pretend):
    pretend(H200)
    assert plan(m=63) == "plain"
    assert plan("shrink", m=63) == "plain"
    assert plan("shrink", m=63, masked=True) == "hybrid"
    assert plan(m=64) == "hybrid"


@pytest.mark.parametrize(("capability", "expected"), [(80, "plain"), (90, "fused"), (100, "plain")])
def test_a_step_has_products_of_its_own_where_they_were_timed(
    pretend, monkeypatch, capability, expected
):
    pretend(replace(H200, capability=capability))
    for kernel in plans._WITHOUT:
        monkeypatch.setitem(plans._segmented, (kernel, CUDA), "")
    checked = []
    reason = plans.segmented_reason
    monkeypatch.setattr(
        plans, "segmented_reason", lambda *args: checked.append(args[1:]) or reason(*args)
    )
    for kernel, m in itertools.product(("decode_gemm", "segmented_gemm"), (1, 64, 8192)):
        assert plan(kernel, m=m) == (expected if m > 1 or kernel == "decode_gemm" else "plain")
        # What is not to be taken is not checked.
        assert plan(kernel, m=m, dtype=FP32) == "plain"
    assert ((plans.DECODE_GEMM,) in checked) is (expected == "fused")
    assert plan("decode_gemm", n=3520) == "plain"
    with fastlora.backend("fused"):
        assert plan("decode_gemm", n=40) == "fused"
    monkeypatch.setitem(plans._segmented, (plans.SEGMENTED, CUDA), "the expand is wrong")
    plans._decided.cache_clear()
    assert plan("decode_gemm") == "plain"


@pytest.mark.parametrize(
    ("capability", "dtype", "count"), [(80, BF16, 1), (90, BF16, 3), (90, FP32, 1)]
)
def test_serving_checks_what_it_may_take_before_a_graph_is_captured(
    pretend, monkeypatch, capability, dtype, count
):
    pretend(replace(H200, capability=capability))
    checked = []

    def reason(device, kernel=plans.SEGMENTED):
        checked.append(kernel)
        return ""

    monkeypatch.setattr(plans, "segmented_reason", reason)
    plans.check_serving(CUDA, dtype)
    expected = (plans.SEGMENTED, plans.DECODE_GEMM, plans.SEGMENTED_GEMM)[:count]
    assert tuple(dict.fromkeys(checked)) == expected


def write_table(folder, plan, **key):
    key = {"operation": "low_rank_gemm", "dtype": "bfloat16", "n": 4096, "k": 4096, "r": 16} | key
    folder.mkdir(parents=True, exist_ok=True)
    entry = {"key": {"m": 8192} | key, "plan": plan, "tile": None}
    (folder / "nvidia-h200.json").write_text(json.dumps({"entries": [entry]}))


def test_a_measured_shape_follows_its_table(pretend, tmp_path):
    write_table(tmp_path / "fastlora" / "tuned", "fused")
    pretend(H200)
    assert plan() == "fused"
    assert plan(m=5000) == "fused"  # rounded up to 8192 rows
    assert plan(r=9) == "fused"  # padded to rank 16
    assert plan(m=2048) == "hybrid"
    assert plan(n=1024) == "hybrid"
    assert plan(dtype=FP16) == "hybrid"


def test_the_committed_table_stands_above_the_users_cache(pretend, tmp_path):
    write_table(tmp_path / "fastlora" / "tuned", "fused")
    write_table(tmp_path / "committed", "hybrid")
    pretend(H200)
    assert plan() == "hybrid"


@pytest.mark.parametrize(
    ("forced", "expected"),
    [("fused", "fused"), ("triton", "fused"), ("hybrid", "hybrid"), ("plain", "plain")],
)
def test_a_plan_can_be_forced(pretend, monkeypatch, forced, expected):
    pretend(H200)
    with fastlora.backend(forced):
        assert plan() == expected
    assert plan() == "hybrid"
    monkeypatch.setenv(plans.ENVIRONMENT, forced)
    assert plan() == expected
    with fastlora.backend("auto"):  # the innermost request counts
        assert plan() == "hybrid"


def test_a_wrong_name_is_refused_with_the_right_ones(monkeypatch):
    with pytest.raises(ValueError, match=r"backend must be one of .*'hybrid'.*, got 'cublas'"):
        fastlora.backend("cublas").__enter__()
    monkeypatch.setenv(plans.ENVIRONMENT, "fast")
    with pytest.raises(ValueError, match=r"FASTLORA_BACKEND must be one of .*, got 'fast'"):
        plans.requested()


@pytest.mark.parametrize(
    ("limits", "changes", "reason"),
    [
        pytest.param(
            DeviceLimits("Tesla T4", 75, 65536, 40), {}, "sm_75; the kernels need sm_80", id="old"
        ),
        pytest.param(H200, {"dtype": FP64}, "not in torch.float64", id="fp64"),
        pytest.param(H200, {"r": 257}, "ranks up to 256, not 257", id="rank"),
    ],
)
def test_what_the_kernels_cannot_take_is_plain_and_has_a_reason(pretend, limits, changes, reason):
    pretend(limits)
    with fastlora.backend("fused"):
        assert {plan(operation, **changes) for operation in OPERATIONS} == {"plain"}
    arguments = {"dtype": BF16, "r": 16} | changes
    assert reason in plans.unsupported_reason(CUDA, arguments["dtype"], arguments["r"])


def test_an_unknown_new_device_is_hybrid(pretend):
    pretend(DeviceLimits("NVIDIA Z900", capability=150, shared_bytes=300000, processors=1))
    assert plan() == "hybrid"


def test_exact_fp32_gemms_stay_with_cublas(pretend, monkeypatch):
    pretend(H200)
    monkeypatch.setattr(plans, "interpreting", lambda: False)
    with fastlora.backend("fused"):
        assert plan(dtype=FP32) == "hybrid"
        assert plan("shrink", dtype=FP32) == "fused"
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            assert plan(dtype=FP32) == "fused"
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [("low_rank_gemm", "hybrid"), ("shrink", "plain"), ("adapter_grads", "plain")],
)
def test_a_kernel_that_failed_its_check_is_not_used(pretend, kernel, expected):
    pretend(H200, {kernel: "h is off by 1.0e+00"})
    with fastlora.backend("fused"):
        assert plan() == expected
    described = plans.describe(CUDA)
    assert described.startswith(f"cuda:0 (NVIDIA H200): {expected}")
    assert f"{kernel}: h is off by 1.0e+00" in described


def test_without_the_low_rank_term_only_the_frozen_products_are_plain(pretend):
    failures = {"low_rank_term": "y is off by 1.0e+00", "low_rank_gemm": "y is off by 2.0e+00"}
    pretend(H200, failures)
    with fastlora.backend("fused"):
        assert plan("low_rank_gemm") == "plain"
        assert plan("input_grad", masked=True) == "plain"
        assert plan("shrink", masked=True) == "fused"
    described = plans.describe(CUDA)
    assert "(NVIDIA H200): plain for the frozen products; low_rank_term: y is off" in described
    assert "low_rank_gemm: y is off by 2.0e+00" in described


def test_a_table_s_entry_is_of_a_group_or_of_a_linear(pretend, tmp_path):
    write_table(tmp_path / "fastlora" / "tuned", "fused")
    pretend(H200)
    assert plan() == "fused"
    assert plan(siblings=3) == "hybrid"


def test_blocks_of_two_threads_may_overlap():
    first, second = fastlora.backend("hybrid"), fastlora.backend("plain")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert plans.requested() == "plain"
    second.__exit__(None, None, None)
    assert plans.requested() == "auto"


def test_a_table_of_the_user_that_is_wrong_is_left_out_with_a_warning(pretend, tmp_path):
    folder = tmp_path / "fastlora" / "tuned"
    pretend(H200)
    for broken, message in (
        ("fussed", "no such plan: 'fussed'"),
        (None, "is not a table of tuned tiles"),
    ):
        write_table(folder, broken or "fused")
        if broken is None:
            (folder / "nvidia-h200.json").write_text("[]")
        plans.forget_measurements()
        with pytest.warns(RuntimeWarning, match=message):
            assert plan() == "hybrid"


def test_a_table_of_another_triton_is_left_out_with_a_warning(pretend, tmp_path):
    folder = tmp_path / "fastlora" / "tuned"
    write_table(folder, "fused")
    path = folder / "nvidia-h200.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"triton": "2.1.0"}))
    pretend(H200)
    with pytest.warns(RuntimeWarning, match=r"measured with Triton 2\.1, and .* tune` again"):
        assert plan() == "hybrid"


def test_a_device_that_was_not_checked_is_plain_inside_a_capture(pretend, monkeypatch):
    pretend(H200)
    monkeypatch.delitem(plans._failures, CUDA)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(plans, "check_device", lambda device: pytest.fail("checked in a capture"))
    assert plan() == "plain"


@pytest.fixture
def unchecked(monkeypatch):
    monkeypatch.setattr(plans, "_failures", {})
    monkeypatch.setattr(plans, "_segmented", {})
    plans._decided.cache_clear()


interpreted = pytest.mark.skipif(not plans.interpreting(), reason="runs on the interpreter")


@interpreted
def test_correct_kernels_pass_the_check_once(unchecked, monkeypatch):
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plans.check_device(CPU) == {}
    assert torch.equal(torch.get_rng_state(), state)  # the user's random stream is untouched
    monkeypatch.setattr(plans, "_wrong_result", lambda *_: pytest.fail("checked twice"))
    assert plans.check_device(CPU) == {}


@interpreted
@pytest.mark.parametrize(
    ("kernel", "failed"),
    [
        # The two forms of one kernel, and the two kernels of one operator.
        ("low_rank_gemm", {"low_rank_term": "plain", "low_rank_gemm": "hybrid"}),
        ("shrink", {"shrink": "plain"}),
        ("output_pass", {"adapter_grads": "plain"}),
        ("input_pass", {"adapter_grads": "plain"}),
    ],
)
def test_a_wrong_kernel_is_found_and_leads_to_another_plan(unchecked, monkeypatch, kernel, failed):
    """The kernels themselves are broken here, not the check: the loads see a wrong stride."""
    import importlib

    module = importlib.import_module(f"fastlora.kernels.{kernel}")
    launch = getattr(module, f"_{kernel}_kernel")

    class Broken:
        def __getitem__(self, grid):
            def run(*args, **kwargs):
                launch[grid](*args, **kwargs)
                for tensor in outputs(args):
                    tensor.mul_(1.5)

            return run

    def outputs(args):
        """Everything the launch may have written: dense floating-point tensors."""
        for arg in args:
            if isinstance(arg, tuple):
                yield from outputs(arg)
            else:
                tensor = getattr(arg, "base", arg)
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    yield tensor

    monkeypatch.setattr(module, f"_{kernel}_kernel", Broken())
    with pytest.warns(RuntimeWarning) as warned:
        failures = plans.check_device(CPU)
    assert list(failures) == list(failed)
    for warning, (form, fallback) in zip(warned, failed.items(), strict=True):
        assert re.search(rf"{form} does not work .*the {fallback} plan", str(warning.message))
    with fastlora.backend("fused"):
        assert plan("low_rank_gemm", CPU) == "plain"


@interpreted
@pytest.mark.parametrize("kernel", [None, "segmented_shrink", "segmented_expand"])
def test_segmented_kernels_are_checked_on_their_own(unchecked, monkeypatch, kernel):
    import importlib

    arguments = ("segmented_add", CPU, FP16, 40, 48, 64, 32)
    if kernel is None:
        with fastlora.backend("fused"):
            assert plans.plan_for(*arguments) == "fused"
        monkeypatch.setattr(plans, "_wrong_result", lambda *_: pytest.fail("checked twice"))
        assert plans.segmented_reason(CPU) == ""
        assert plans._failures == {}  # training's kernels have nothing to do with it
        assert plans.plan_for(*arguments) == "plain"  # on a CPU, unless asked to
        return
    module = importlib.import_module(f"fastlora.kernels.{kernel}")
    prepare = getattr(module, f"prepare_{kernel}")

    def broken(*args, **kwargs):
        run = prepare(*args, **kwargs)

        def launch(*tensors):
            result = run(*tensors)
            (tensors[0][0] if result is None else result).mul_(1.5)
            return result

        return launch

    monkeypatch.setattr(module, f"prepare_{kernel}", broken)
    with (
        pytest.warns(RuntimeWarning, match="segmented kernels do not work .* is off by"),
        fastlora.backend("fused"),
    ):
        assert plans.plan_for(*arguments) == "plain"


@interpreted
@pytest.mark.parametrize(
    ("kernel", "instead"),
    [
        ("segmented_gemm", "are added to the frozen products"),
        ("decode_gemm", "frozen products are computed by PyTorch"),
    ],
)
def test_without_a_gemm_the_two_other_kernels_are_used(unchecked, monkeypatch, kernel, instead):
    import importlib

    sizes = 300, 48, 64, 32
    with fastlora.backend("fused"):
        assert plans.plan_for(kernel, CPU, FP16, *sizes) == "fused"
        assert plans.plan_for(kernel, CPU, torch.float32, *sizes) == "plain"
    plans._segmented.clear()
    plans._decided.cache_clear()
    module = importlib.import_module(f"fastlora.kernels.{kernel}")
    prepare = getattr(module, f"prepare_{kernel}")

    def broken(*operands):
        run = prepare(*operands)
        return lambda *tensors: [1.5 * y for y in run(*tensors)]

    monkeypatch.setattr(module, f"prepare_{kernel}", broken)
    wrong = f"{kernel} does not work .* is off by .* {instead}"
    with fastlora.backend("fused"):
        with pytest.warns(RuntimeWarning, match=wrong):
            assert plans.plan_for(kernel, CPU, FP16, *sizes) == "plain"
        assert plans.plan_for("segmented_add", CPU, FP16, *sizes) == "fused"


@interpreted
def test_the_check_does_not_depend_on_what_the_caller_set_up(unchecked):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.autocast("cpu", torch.bfloat16), FakeTensorMode(), torch.inference_mode():
        assert plans.check_device(CPU) == {}


def test_a_check_that_ran_out_of_memory_is_made_again(unchecked, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError

    plans.forget_measurements()
    before = plans.generation()
    monkeypatch.setattr(plans, "_wrong_result", fail)
    assert set(plans.check_device(CPU)) == set(plans.KERNELS)
    with fastlora.backend("fused"):
        assert plan("low_rank_gemm", CPU) == "plain"
        assert plans.generation() == before
        monkeypatch.setattr(plans, "_wrong_result", lambda *_: None)
        if plans.interpreting():  # on a CPU nothing else asks
            assert plan("low_rank_gemm", CPU) == "fused"
            assert plans.generation() > before
    assert plans.check_device(CPU) == {}


def test_a_compiler_that_fails_is_a_reason_and_not_an_error(unchecked, monkeypatch):
    def fail(*_):
        raise RuntimeError("ptxas: unsupported architecture\nmore")

    monkeypatch.setattr(plans, "_wrong_result", fail)
    with pytest.warns(RuntimeWarning, match="RuntimeError: ptxas: unsupported architecture"):
        failures = plans.check_device(CPU)
    assert set(failures) == set(plans.KERNELS)


@pytest.mark.parametrize("broken", ["the direct launch", "the kernel"])
def test_a_direct_launch_that_does_not_work_costs_no_plan(unchecked, monkeypatch, broken):
    """It is switched off for the process; a kernel that is wrong either way stays what it is."""
    from fastlora.kernels.launch import Launch

    def wrong_result(kernel, device):
        if Launch.may_be_direct:
            raise TypeError("function takes exactly 21 arguments (20 given)")
        return None if broken == "the direct launch" else "h is off by 1.0e+00"

    monkeypatch.setattr(Launch, "may_be_direct", True)
    monkeypatch.setattr(plans, "_wrong_result", wrong_result)
    monkeypatch.setattr(plans, "_neutral", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(plans, "device_limits", lambda device: H200)
    with pytest.warns(RuntimeWarning) as warned:
        failures = plans.check_device(CUDA)
    words = [str(warning.message) for warning in warned]
    if broken == "the direct launch":
        assert failures == {}
        assert not Launch.may_be_direct
        assert len(words) == 1
        assert "launching past Triton does not work on NVIDIA H200 (TypeError" in words[0]
    else:
        assert set(failures) == set(plans.KERNELS)
        assert Launch.may_be_direct
        assert not any("past Triton" in each for each in words)


def test_explain_names_the_plan_that_is_forced():
    model = tiny_peft()
    fastlora.patch(model)
    assert "plan on" not in fastlora.explain(model)
    with fastlora.backend("hybrid"):
        assert "  plan on cpu" in fastlora.explain(model)
