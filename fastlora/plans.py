"""Plans: which code computes an operator, for each shape and device.

    fused     one Triton GEMM with the low-rank term inside; thin products in Triton
    hybrid    Triton writes the low-rank term, cuBLAS adds the frozen product to it
    plain     PyTorch

By a cost model of an H200, a fused GEMM wins only where it reaches about 95.5 % of cuBLAS (97 % for
Qwen3-32B), so the choice is a matter of measurement and of shape. ``auto`` takes the first of these
that knows:

    kernels/tuned/<device>.json    measured and committed
    the user's cache               measured by ``fastlora tune``
    a rule that is safe anywhere   hybrid; below 64 rows, cuBLAS for everything but dropout

Serving's two GEMMs (``decode_gemm``, ``segmented_gemm``) are taken on Hopper, where they were
timed, for the numbers of rows that ``segmented_ops`` gives them.

Before a device's first use every kernel computes one small problem, and a kernel that is wrong
there, or does not compile, is not used: without ``low_rank_gemm`` fused becomes hybrid, without
``low_rank_term`` the products with frozen weights become plain, and without ``shrink`` or
``adapter_grads`` everything does. An unknown device is never an error.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from fastlora import dropout, plain, segmented
from fastlora.kernels.tile_config import (
    allows_tf32,
    device_limits,
    forget_tiles,
    tile_key,
    tuned_entries,
)
from fastlora.segments import Segments

Plan = Literal["fused", "hybrid", "plain"]
FUSED: Plan = "fused"
HYBRID: Plan = "hybrid"
PLAIN: Plan = "plain"
PLANS: tuple[Plan, ...] = (PLAIN, HYBRID, FUSED)  # each needs everything that the one before needs
BACKENDS = ("auto", *reversed(PLANS))
ENVIRONMENT = "FASTLORA_BACKEND"

# What is checked, and the plan of everything (of GEMMS, for the last two) without it.
KERNELS: dict[str, Plan] = {
    "shrink": PLAIN,
    "adapter_grads": PLAIN,
    "low_rank_term": PLAIN,
    "low_rank_gemm": HYBRID,
}
# What only an engine needs, checked when a pool is made: the two segmented kernels, the frozen
# product of a step that generates, and the one that is a prefill's and the second of those in one.
SEGMENTED, DECODE_GEMM, SEGMENTED_GEMM = "segmented_add", "decode_gemm", "segmented_gemm"
_FOR_EVERYTHING = frozenset(("shrink", "adapter_grads"))
GEMMS = frozenset(("low_rank_gemm", "input_grad"))
MAX_RANK = 256  # the widest accumulator that stays in registers
# In training, a Triton tile is mostly padding below it, and cuBLAS has kernels for few rows.
MIN_ROWS = 64
MIN_COLUMNS = 3584  # of a decode_gemm: o and down of 7B, the fewest that were timed
_KERNEL_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32))

# The names given by backend(), innermost last. Process-wide and not a context variable: the
# backward pass runs on autograd's own threads.
_forced: list[_Request] = []


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a plan inside a ``with`` block, for tests and bug reports.

    Every call in the process that runs inside the block follows it, the backward pass included
    (which runs on threads of autograd's). Where a plan is impossible (no CUDA device, fp64, a rank
    above 256, a kernel that failed its check), the next one down is taken: fused, hybrid, plain.

    Args:
        name: ``"auto"``, ``"fused"`` (or ``"triton"``), ``"hybrid"`` or ``"plain"``. The
            environment variable ``FASTLORA_BACKEND`` does the same for a whole process.

    Raises:
        ValueError: there is no such plan.
    """
    request = _Request(_resolve(name, "backend"))
    _forced.append(request)
    try:
        yield
    finally:
        # Not pop(): a block of another thread may have begun since, and end later.
        _forced.remove(request)


class _Request:
    """One ``backend`` block; equal to itself alone."""

    def __init__(self, plan: str) -> None:
        self.plan = plan


@functools.cache
def _resolve(name: str, source: str) -> str:
    resolved = "fused" if name == "triton" else name
    if resolved not in BACKENDS:
        raise ValueError(f"{source} must be one of {BACKENDS}, got {name!r}")
    return resolved


def requested() -> str:
    """Return the plan that was asked for, by ``backend`` or the environment, or ``"auto"``."""
    if _forced:
        return _forced[-1].plan
    name = os.environ.get(ENVIRONMENT)
    return _resolve(name, ENVIRONMENT) if name else "auto"


def interpreting() -> bool:
    """Return whether Triton's kernels are interpreted: they then take CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in _TRUE


_TRUE = frozenset(("1", "true", "yes", "on", "y"))  # as Triton reads it


def plan_for(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    r: int,
    *,
    masked: bool = False,
    siblings: int = 1,
) -> Plan:
    """Choose the plan of one call.

    Args:
        operation: ``"shrink"``, ``"low_rank_gemm"``, ``"adapter_grads"``, ``"input_grad"``,
            ``"segmented_add"``, ``"decode_gemm"`` or ``"segmented_gemm"``.
        device: of the operands.
        dtype: of the frozen product for the two GEMMs, of the thin products for the others.
        m: rows.
        n: out features; of several siblings the sum.
        k: in features.
        r: rank, of one sibling.
        masked: dropout is on.
        siblings: linears that share the input and the call.

    Returns:
        The plan; for an operation without a GEMM fused and hybrid are the same.
    """
    wanted = requested()
    if wanted == PLAIN or (device.type != "cuda" and (wanted == "auto" or not interpreting())):
        # Kernels take CPU tensors only where they are interpreted, and only on request: the
        # interpreter is a thousand times slower than PyTorch.
        return PLAIN
    if operation in _WITHOUT:
        if operation != SEGMENTED and not _is_worth_it(operation, device, dtype, n, wanted):
            return PLAIN  # before it is checked: that takes seconds, and may warn
        segmented_reason(device, operation)
    elif device not in _failures:
        failed_kernels(device)
        if device not in _failures:  # nothing is known of it yet, nor to be remembered
            return PLAIN
    tf32 = dtype == torch.float32 and allows_tf32()
    return _decided(wanted, operation, device, dtype, m, n, k, r, masked, siblings, tf32)


@functools.lru_cache(maxsize=4096)
def _decided(
    wanted: str,
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    r: int,
    masked: bool,
    siblings: int,
    tf32: bool,
) -> Plan:
    """``plan_for`` a device that was checked; 3 us of the host's time if it were not remembered."""
    limit = possible_plan(operation, device, dtype, r, tf32=tf32)
    if wanted == "auto":
        wanted = _automatic(operation, device, dtype, m, n, k, r, masked, siblings)
    return PLANS[min(PLANS.index(limit), PLANS.index(wanted))]


def possible_plan(
    operation: str, device: torch.device, dtype: torch.dtype, r: int, *, tf32: bool
) -> Plan:
    """Return the furthest plan that this device and these operands allow.

    Args:
        operation: as in ``plan_for``; likewise the next three.
        device: likewise.
        dtype: likewise.
        r: likewise.
        tf32: fp32 products may be rounded to TF32.
    """
    if unsupported_reason(device, dtype, r) is not None:
        return PLAIN
    if operation == SEGMENTED:
        return PLAIN if segmented_reason(device) else FUSED
    if operation in (DECODE_GEMM, SEGMENTED_GEMM):
        wrong = any(segmented_reason(device, kernel) for kernel in (SEGMENTED, operation))
        return PLAIN if wrong or dtype == torch.float32 else FUSED
    failed = failed_kernels(device)
    if failed is None or not _FOR_EVERYTHING.isdisjoint(failed):
        return PLAIN
    if operation not in GEMMS:
        return FUSED
    if failed:
        return PLAIN if "low_rank_term" in failed else HYBRID
    if dtype == torch.float32 and not tf32 and not interpreting():
        # Exact fp32 has no tensor cores: a Triton GEMM would spill where cuBLAS does not.
        return HYBRID
    return FUSED


def _automatic(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    r: int,
    masked: bool,
    siblings: int,
) -> Plan:
    # Of the first, PyTorch would have to ask the device which adapters there are.
    if operation in (SEGMENTED, DECODE_GEMM):
        return FUSED
    default = FUSED if operation == SEGMENTED_GEMM else HYBRID
    if m < MIN_ROWS:
        # Without a mask PyTorch needs one launch for each thin product, as Triton does.
        return HYBRID if masked else PLAIN
    entries = tuned_entries(device_limits(device).name)
    entry = entries.get(tile_key(operation, dtype, m, n, k, r, siblings), {})
    plan: Plan = entry.get("plan", default)
    return plan


def _is_worth_it(
    operation: str, device: torch.device, dtype: torch.dtype, n: int, wanted: str
) -> bool:
    """Return whether a GEMM of serving's may be taken, if it is right on this device.

    Unless asked for, where it was timed: on Hopper, whose copies and early launches make it fast,
    and ``decode_gemm`` with at least 56 programs of 64 columns.
    """
    if dtype == torch.float32:
        return False
    timed = device_limits(device).capability == 90
    return wanted != "auto" or (timed and (operation != DECODE_GEMM or n >= MIN_COLUMNS))


@functools.cache
def unsupported_reason(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, r: int = 1
) -> str | None:
    """Return why the kernels cannot run here at all, or ``None``."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in _KERNEL_DTYPES:
        return f"the kernels compute in fp16, bf16 and fp32, not in {dtype}"
    if r > MAX_RANK:
        return f"the kernels take ranks up to {MAX_RANK}, not {r}"
    if device.type != "cuda":
        return None if interpreting() else f"the kernels need a CUDA device, not {device.type}"
    limits = device_limits(device)
    if torch.version.hip is None and limits.capability < 80:
        return f"{limits.name} is sm_{limits.capability}; the kernels need sm_80 or later"
    return None


# What each device's check found: the names of the kernels that failed, and why.
_failures: dict[torch.device, dict[str, str]] = {}
_checking = threading.RLock()


def failed_kernels(device: torch.device) -> dict[str, str] | None:
    """Return the kernels that failed this device's check, with reasons; checks on first use.

    ``None`` while a CUDA graph is being captured and nothing was checked before: a check reads
    results back, which a capture forbids.
    """
    failures = _failures.get(device)
    if failures is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        failures = check_device(device)
    return failures


def check_device(device: torch.device) -> dict[str, str]:
    """Let every kernel compute one small problem on a device and compare it with PyTorch.

    Runs once for each device: by ``patch`` for the devices of a model, else by the first call.

    Returns:
        The kernels that failed, and why.

    Warns:
        RuntimeWarning: for each kernel that failed, once.
    """
    with _checking:
        if device in _failures:
            return _failures[device]
        failures = {}
        for kernel in KERNELS:
            try:
                reason = _reason_against(kernel, device)
            except torch.OutOfMemoryError:
                # Nothing is known of the kernel: the next call checks again.
                return dict.fromkeys(KERNELS, "out of memory while it was checked")
            if reason is not None:
                failures[kernel] = reason
                warnings.warn(
                    f"fastlora's kernel {kernel} does not work on {device_limits(device).name} "
                    f"({reason}); the {KERNELS[kernel]} plan is used instead",
                    RuntimeWarning,
                    stacklevel=2,
                )
        _failures[device] = failures
        _start_generation()
    return failures


_segmented: dict[tuple[str, torch.device], str] = {}


def check_serving(device: torch.device, dtype: torch.dtype) -> None:
    """Check the kernels that a batch with adapters may take: a CUDA graph's capture could not.

    Args:
        device: of the model.
        dtype: of the adapters.
    """
    for operation in _WITHOUT:  # to ask for a plan is to check
        plan_for(operation, device, dtype, 1, MIN_COLUMNS, MIN_COLUMNS, 1)


def segmented_reason(device: torch.device, kernel: str = SEGMENTED) -> str:
    """Return why segmented kernels are not used on a device, empty if they are; checks once.

    Args:
        device: which.
        kernel: ``"segmented_add"`` for the two that any batch needs, ``"decode_gemm"`` or
            ``"segmented_gemm"``.

    Warns:
        RuntimeWarning: they are wrong there, or do not compile.
    """
    if reason := unsupported_reason(device):
        return reason
    with _checking:
        if (kernel, device) not in _segmented:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return "they were not checked before a CUDA graph was captured"
            try:
                reason = _reason_against(kernel, device) or ""
            except torch.OutOfMemoryError:
                return "out of memory while they were checked"
            _segmented[kernel, device] = reason
            _decided.cache_clear()
            if reason:
                name, instead = _WITHOUT[kernel]
                warnings.warn(
                    f"fastlora's {name} not work on {device_limits(device).name} "
                    f"({reason}); {instead}",
                    RuntimeWarning,
                    stacklevel=3,
                )
        return _segmented[kernel, device]


_WITHOUT = {
    SEGMENTED: (
        "segmented kernels do",
        "batches with several adapters are computed by PyTorch, slowly",
    ),
    DECODE_GEMM: ("kernel decode_gemm does", "a step's frozen products are computed by PyTorch"),
    SEGMENTED_GEMM: ("kernel segmented_gemm does", "adapters are added to the frozen products"),
}


def _reason_against(kernel: str, device: torch.device) -> str | None:
    """Return what is wrong with a kernel on a device, whichever way it is launched, or ``None``."""

    def reason_now() -> str | None:
        try:
            with _neutral(device):
                return _wrong_result(kernel, device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # an unknown device may fail anywhere in the compiler
            first_line = str(error).strip().partition("\n")[0]
            return f"{type(error).__name__}: {first_line}"

    reason = reason_now()
    if reason is None or device.type != "cuda":
        return reason
    from fastlora.kernels.launch import Launch

    if not Launch.may_be_direct:
        return reason
    Launch.may_be_direct = False
    if reason_now() is not None:
        Launch.may_be_direct = True  # it was not the way it is launched
        return reason
    warnings.warn(
        f"launching past Triton does not work on {device_limits(device).name} ({reason}): kernels "
        "are launched by it, which takes the host 12 to 40 us each",
        RuntimeWarning,
        stacklevel=3,
    )
    return None


@contextmanager
def _neutral(device: torch.device) -> Iterator[None]:
    """Undo what the caller may have set up: autocast, gradients, dispatch modes, another device."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.utils._python_dispatch._disable_current_modes())
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield


def _wrong_segmented(kernel: str, device: torch.device) -> str | None:
    """Return in what segmented kernels differ from PyTorch on small batches, or ``None``."""
    from fastlora.kernels.decode_gemm import prepare_decode_gemm
    from fastlora.kernels.segmented_expand import prepare_segmented_expand
    from fastlora.kernels.segmented_gemm import prepare_segmented_gemm
    from fastlora.kernels.segmented_shrink import prepare_segmented_shrink

    # On a GPU so many columns that a program of the expand has several blocks of them.
    k, n, dtype = (512, 16_576, torch.float16) if device.type == "cuda" else (64, 48, torch.float16)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    # Ranks that end in the middle of a tile, and one that takes two.
    adapters = [segmented.Factors(draw(r, k) * k**-0.5, draw(r, n), 0.5 + r) for r in (8, 20, 3)]
    arena, descriptors = segmented.pack(adapters)
    # Less than a tile, tiles of few rows, and of many.
    weight, bias = draw(n, k) * k**-0.5, draw(n)
    sizes = (5, 40, 300) if device.type == "cuda" else (5, 20)
    for tokens in sizes[:2] if kernel == DECODE_GEMM else sizes:
        slots = [(3 * t) % 4 for t in range(tokens)]
        rows = Segments.of_slots(slots, table=4, device=device)
        x, base = draw(tokens, k), draw(tokens, n)
        expected = base.float()
        if kernel != SEGMENTED:
            expected = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
        runs = rows.on_host()
        wide = [segmented.Factors(a.float(), b.float(), s) for a, b, s in adapters]
        found = segmented.Adapters([wide[slot - 1] for slot in runs.slots])
        segmented.add_adapters(expected, x.float(), found, runs)
        beside = kernel == DECODE_GEMM
        shrink = prepare_segmented_shrink(x, arena, descriptors, rows, max_rank=32, beside=beside)
        expand = gemm = decode = None
        for _ in range(2 if device.type == "cuda" else 1):  # from the second on past Triton
            y = base.clone()
            if kernel == DECODE_GEMM:
                decode = decode or prepare_decode_gemm(x, [weight], [bias])
                (y,) = decode(x, [weight], [bias])
            h = shrink(x, arena, descriptors, rows)
            operands = (h, arena, descriptors, rows)
            if kernel == SEGMENTED_GEMM:
                gemm = gemm or prepare_segmented_gemm(x, [weight], [bias], *operands)
                (y,) = gemm(x, [weight], [bias], *operands)
            else:
                expand = expand or prepare_segmented_expand([y], *operands)
                expand([y], *operands)
        if reason := _difference([(f"y of {tokens} rows", y, expected)]):
            return reason
    return None


def _wrong_result(kernel: str, device: torch.device) -> str | None:
    """Return in what a kernel's results differ from PyTorch's on one small problem, or ``None``."""
    if kernel in _WITHOUT:
        return _wrong_segmented(kernel, device)
    m, k, n, r, p = 256, 512, 256, 16, 0.25
    if device.type != "cuda":
        m, k, n = 32, 64, 48  # interpreted: a second, not a minute
    dtype = torch.float16
    generator = torch.Generator(device).manual_seed(0)  # its own: the user's stream is untouched

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    x, weight, dy = draw(m, k), draw(n, k) * k**-0.5, draw(m, n)
    a, b, h = draw(r, k) * k**-0.5, draw(n, r), draw(1, m, r)
    seed = torch.full((), 20251122, dtype=torch.int64, device=device)
    threshold = dropout.threshold(p)
    expected_h, bits = plain.shrink(x, [a], seed, p, True, rank_dtype=dtype)
    # What is prepared goes past Triton from the second call on: both ways are checked.
    times = range(2 if device.type == "cuda" else 1)
    if kernel == "shrink":
        from fastlora.kernels.shrink import prepare_shrink

        run = prepare_shrink(x, [a], threshold, dropped=True, rank_dtype=dtype, return_bits=True)
        for _ in times:
            got_h, got_bits = run(x, seed)
        if got_bits is None or not torch.equal(got_bits, bits):
            return "the dropout mask differs"
        return _difference([("h", got_h, expected_h)])
    if kernel == "adapter_grads":
        from fastlora.kernels.adapter_grads import prepare_adapter_grads

        dtypes: Any = {"rank_dtype": dtype, "grad_dtype": torch.float32}
        grads = prepare_adapter_grads([dy], x, [b], "bits", [1.5], **dtypes)
        for _ in times:
            got = grads([dy], x, h, bits)
        wanted = plain.adapter_grads([dy], x, h, [b], bits, [1.5], p, **dtypes)
        results: list[tuple[str, Tensor | None, Tensor]] = [("dh", got[0], wanted[0])]
        for name, ours, right in zip(("dA", "dB"), got[1:], wanted[1:], strict=True):
            results.append((name, ours[0] if ours else None, right[0]))
        return _difference(results)
    return _wrong_gemm(kernel == "low_rank_term", x, weight, dy, a, b, h, bits, p, times)


def _wrong_gemm(
    alone: bool,
    x: Tensor,
    weight: Tensor,
    dy: Tensor,
    a: Tensor,
    b: Tensor,
    h: Tensor,
    bits: Tensor,
    p: float,
    times: range,
) -> str | None:
    """``_wrong_result`` of the GEMM in both directions, or of its low-rank term alone."""
    from fastlora.kernels.low_rank_gemm import (
        prepare_input_grad,
        prepare_low_rank_gemm,
        prepare_low_rank_term,
    )

    m, dtype = x.shape[0], x.dtype
    bias = dy[0] if alone else None
    dys, weights = ([], []) if alone else ([dy], [weight])
    y, dx = x.new_empty((m, weight.shape[0])), torch.empty_like(x)
    backward = prepare_input_grad(
        dys, weights, [a], "bits", 0, m=m, rank_dtype=dtype, grad_dtype=dtype
    )
    if alone:
        weight = torch.zeros_like(weight)
        term = prepare_low_rank_term([b], [bias], [1.5], m=m, dtype=dtype, rank_dtype=dtype)
    else:
        forward = prepare_low_rank_gemm(x, [weight], [bias], [b], [1.5], rank_dtype=dtype)
    for _ in times:
        if alone:
            term(h, [y])
        else:
            forward(x, h, [y])
        backward(dys, h, bits, dx)
    (expected_y,) = plain.low_rank_gemm(x, [weight], [bias], h, [b], [1.5], dtype=dtype)
    operands = ([dy], [weight], h, [a], bits, p)
    expected_dx = plain.input_grad(*operands, dtype=dtype, grad_dtype=dtype)
    return _difference([("y", y, expected_y), ("dx", dx, expected_dx)])


# Both sides round an fp16 result a few times: 2**-11 each, relative to the whole.
_CHECK_TOLERANCE = 4 * 2**-11


def _difference(results: list[tuple[str, Tensor | None, Tensor]]) -> str | None:
    for name, got, expected in results:
        if got is None:
            return f"{name} is missing"
        wide = expected.float()
        error = ((got.float() - wide).norm() / wide.norm()).item()
        if not error <= _CHECK_TOLERANCE:  # so that NaN fails
            return f"{name} is off by {error:.1e}"
    return None


def forget_measurements() -> None:
    """Read the tuned tables again: one of them was written."""
    forget_tiles()
    _decided.cache_clear()
    _start_generation()


def generation() -> int:
    """Return a number that changes whenever a call may follow another plan than before.

    After tuning, and once a device was checked: before, as while a CUDA graph is captured, it is
    given no kernels.
    """
    return _generation


def _start_generation() -> None:
    global _generation
    _generation += 1


_generation = 0


def describe(device: torch.device) -> str:
    """Say in one line which plans a device follows, and why not others."""
    if reason := unsupported_reason(device):
        return f"{device}: plain PyTorch; {reason}"
    limits = device_limits(device)
    line = f"{device} ({limits.name}): "
    failures = _failures.get(device)
    if failures:
        reasons = "; ".join(f"{kernel}: {reason}" for kernel, reason in failures.items())
        if not _FOR_EVERYTHING.isdisjoint(failures):
            return f"{line}plain PyTorch; {reasons}"
        gemms = "plain for the frozen products" if "low_rank_term" in failures else "hybrid"
        line += f"{gemms}; {reasons}"
    elif entries := tuned_entries(limits.name):
        line += f"fused or hybrid by shape, {len(entries)} measured"
    else:
        line += "hybrid; no shape was measured on it: run `fastlora tune`"
    return line if requested() == "auto" else f"{line} (forced: {requested()})"
