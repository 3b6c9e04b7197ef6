"""The operators one by one: by what PyTorch runs for peft, and by each of fastlora's plans.

``torch`` is what autograd runs for peft (with PyTorch's dropout, where there is any), ``frozen``
the bare GEMM, ``fastlora`` the operator as its plan has it; on a GPU ``fastlora-fused`` and
``fastlora-hybrid`` are held to one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastlora
from fastlora import dropout, ops, plans, reference
from fastlora.bench.checking import WrongResult, check
from fastlora.bench.shapes import Linear

GAIN = 2.0
_SEED = 20251122

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Operation:
    """One operator for one linear.

    Attributes:
        name: of the operator.
        runs: by provider, what is timed.
        results: of ours, by provider: what they compute, by name.
        native: what PyTorch computes in the same dtype.
        exact: the same in fp64.
        bits: the dropout mask that ``results`` must have, if it has one.
    """

    name: str
    runs: dict[str, Callable[[], object]]
    results: dict[str, Callable[[], Named]]
    native: Named
    exact: Named
    bits: Tensor | None = None

    def check(self, provider: str) -> float | None:
        """Return the largest error as a share of what is allowed; ``None`` for PyTorch itself.

        Raises:
            WrongResult: it computes something else.
        """
        if provider not in self.results:
            return None
        found = self.results[provider]()
        bits = found.pop("mask", None)
        if self.bits is not None and (bits is None or not torch.equal(bits, self.bits)):
            raise WrongResult("the dropout mask is not the one of its seed")
        return check(found, self.native, self.exact)


class _Operands:
    """Random operands of a linear, in one dtype, and its dropout mask."""

    def __init__(
        self, shape: Linear, m: int, r: int, p: float, device: torch.device, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(size, generator=generator, device=device)
            return (drawn * scale).to(dtype)

        n, k = shape.n, shape.k
        self.p, self.dtype = p, dtype
        self.x, self.dy, self.weight = draw(m, k), draw(m, n), draw(n, k, scale=k**-0.5)
        self.bias = draw(n) if shape.has_bias else None
        self.a, self.b = draw(r, k, scale=k**-0.5), draw(n, r)
        self.h, self.dh = draw(m, r), draw(m, r)
        self.seed = torch.full((), _SEED, dtype=torch.int64, device=device)
        self.keep = dropout.keep_mask(self.seed, m, k, p) if p else None
        self.bits = None if self.keep is None else dropout.pack(self.keep)[None]

    def doubles(self, *names: str) -> list[Tensor]:
        return [getattr(self, name).double() for name in names]


def build(
    name: str,
    shape: Linear,
    m: int,
    r: int,
    p: float,
    device: torch.device,
    dtype: torch.dtype,
) -> Operation:
    """Build one operator.

    Args:
        name: one of ``OPERATIONS``.
        shape: of the linear.
        m: rows.
        r: rank.
        p: dropout.
        device: where it runs.
        dtype: of every operand.
    """
    return OPERATIONS[name](_Operands(shape, m, r, p, device, dtype))


def _held_to_plans(
    run: Callable[[], Named], device: torch.device
) -> dict[str, Callable[[], Named]]:
    def held(plan: str) -> Callable[[], Named]:
        def held_run() -> Named:
            with fastlora.backend(plan):
                return run()

        return held_run

    names = {"fastlora": "auto"}
    if plans.unsupported_reason(device) is None:
        names |= {"fastlora-fused": "fused", "fastlora-hybrid": "hybrid"}
    return {provider: held(plan) for provider, plan in names.items()}


def _shrink(o: _Operands) -> Operation:
    def ours() -> Named:
        seed = o.seed if o.p else None
        (h,), bits = ops.shrink(o.x, [o.a], seed, o.p, o.p > 0, rank_dtype=o.dtype)
        return {"h": h, "mask": bits} if o.p else {"h": h}

    results = _held_to_plans(ours, o.x.device)
    return Operation(
        "shrink",
        {"torch": lambda: nn.functional.dropout(o.x, o.p) @ o.a.t(), **results},
        results,
        {"h": reference.shrink(o.x, o.a, o.keep)},
        {"h": reference.shrink(o.x.double(), o.a.double(), o.keep)},
        o.bits,
    )


def _low_rank_gemm(o: _Operands) -> Operation:
    def ours() -> Named:
        tensors = o.x, [o.weight], [o.bias], o.h[None], [o.b]
        return {"y": ops.low_rank_gemm(*tensors, [GAIN], dtype=o.dtype)[0]}

    def frozen() -> Tensor:
        return nn.functional.linear(o.x, o.weight, o.bias)

    results = _held_to_plans(ours, o.x.device)
    x, weight, h, b = o.doubles("x", "weight", "h", "b")
    bias = None if o.bias is None else o.bias.double()
    return Operation(
        "low_rank_gemm",
        {"frozen": frozen, "torch": lambda: frozen() + (o.h @ o.b.t()) * GAIN, **results},
        results,
        {"y": reference.low_rank_gemm(o.x, o.weight, o.bias, o.h, o.b, GAIN)},
        {"y": reference.low_rank_gemm(x, weight, bias, h, b, GAIN)},
    )


def _input_grad(o: _Operands) -> Operation:
    def ours() -> Named:
        tensors = [o.dy], [o.weight], o.dh[None], [o.a], o.bits
        return {"dx": ops.input_grad(*tensors, o.p, dtype=o.dtype, grad_dtype=o.dtype)}

    def native() -> Tensor:
        # peft's dropout multiplies by its mask, which PyTorch keeps in bytes on a GPU.
        low_rank = o.dh @ o.a
        return o.dy @ o.weight + (low_rank if o.keep is None else low_rank * o.keep)

    results = _held_to_plans(ours, o.x.device)
    dy, weight, dh, a = o.doubles("dy", "weight", "dh", "a")
    return Operation(
        "input_grad",
        {"frozen": lambda: o.dy @ o.weight, "torch": native, **results},
        results,
        {"dx": native()},
        {"dx": reference.input_grad(dy, weight, dh, a, o.keep)},
    )


def _adapter_grads(o: _Operands) -> Operation:
    def ours() -> Named:
        tensors = [o.dy], o.x, o.h[None], [o.b], o.bits, [GAIN]
        found = ops.adapter_grads(*tensors, o.p, rank_dtype=o.dtype, grad_dtype=o.dtype)
        return dict(zip(("dh", "dA", "dB"), (of_one for (of_one,) in found), strict=True))

    # peft has saved its dropped-out input.
    dropped = o.x if o.keep is None else o.x * o.keep

    def native() -> Named:
        dh = (o.dy @ o.b) * GAIN
        return {"dh": dh, "dA": dh.t() @ dropped, "dB": (o.dy.t() @ o.h) * GAIN}

    results = _held_to_plans(ours, o.x.device)
    dy, x, h, b = o.doubles("dy", "x", "h", "b")
    exact = reference.adapter_grads(dy, x, h, b, o.keep, GAIN)
    return Operation(
        "adapter_grads",
        {"torch": native, **results},
        results,
        native(),
        dict(zip(("dh", "dA", "dB"), exact, strict=True)),
    )


OPERATIONS: dict[str, Callable[[_Operands], Operation]] = {
    "shrink": _shrink,
    "low_rank_gemm": _low_rank_gemm,
    "input_grad": _input_grad,
    "adapter_grads": _adapter_grads,
}
