"""The gate: a provider is timed only if what it computes is right, and otherwise refused.

Right means what it means in the tests: the distance from fp64 is at most 1.2 times that of peft in
the same dtypes, plus an eps of the result's dtype. That is asked without dropout, where there is
one right answer. With dropout every provider draws masks of its own, so it is asked for what holds
for any mask ``D`` of the right rate and the low-rank term ``L(D) = s (x * D) A^T B^T``:

- ``L`` is linear in x, in A and in B, so ``<dy, L> = <dx_L, x> = <dA, A> = <dB, B>`` where the
  backward pass uses the mask of the forward pass. With ``dy = L(D) - L(1)``, the part that the mask
  alone has caused, another mask in the backward pass would give next to nothing.
- The mean of ``D`` is 1: ``<L(D), L(1)>`` is ``|L(1)|^2``, and ``|L(D) - L(1)|^2`` has its
  expectation at the rate p; both within six standard deviations.
- Where a row of x has a single feature, the row of ``L(D)`` is 0 or ``L(1) / (1 - p)``, and another
  call has others of the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastlora.bench.accuracy import allowed_error, relative_error
from fastlora.bench.providers import SCALING, Provider, Weights, build, build_layer, find
from fastlora.bench.shapes import GROUPS

_DEVIATIONS = 6.0
_SEED = 20251122
_RATE_STEP = 2.0**-16
_FEWEST_ROWS = 16

# A module's forward and backward pass: outputs, gradients of the inputs, of the parameters.
Results = tuple[list[Tensor], list[Tensor], list[Tensor]]


class WrongResult(RuntimeError):
    """A provider computes something else than it should; the message says what and how far off."""


def check(
    found: Mapping[str, Tensor], native: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> float:
    """Hold results to the rule.

    Args:
        found: by name, what a provider computed.
        native: what peft, or plain PyTorch, computes in the same dtypes.
        exact: the same in fp64.

    Returns:
        The largest error as a share of what is allowed.

    Raises:
        WrongResult: an error is larger than allowed (or NaN), or a shape differs.
    """
    return check_errors(
        found, {name: relative_error(native[name], exact[name]) for name in exact}, exact
    )


def check_errors(
    found: Mapping[str, Tensor], native: Mapping[str, float], exact: Mapping[str, Tensor]
) -> float:
    """``check`` where the errors of ``native`` are known already."""
    if missing := exact.keys() - found.keys():
        raise WrongResult(f"{min(missing)} is missing")
    worst = 0.0
    for name, value in found.items():
        if value.shape != exact[name].shape:
            raise WrongResult(f"{name} is {list(value.shape)}, not {list(exact[name].shape)}")
        error = relative_error(value, exact[name])
        allowed = allowed_error(native[name], value.dtype)
        if not error <= allowed:  # so that NaN fails
            raise WrongResult(f"{name} is {error:.1e} from fp64, allowed are {allowed:.1e}")
        worst = max(worst, error / allowed)
    return worst


def run(
    module: nn.Module, parameters: Sequence[Tensor], inputs: Sequence[Tensor], dys: Sequence[Tensor]
) -> Results:
    """Run a module forward and backward."""
    outputs = _listed(module(*inputs))
    grads = [dy.to(y.dtype) for dy, y in zip(dys, outputs, strict=True)]
    found = torch.autograd.grad(outputs, [*inputs, *parameters], grads)
    return outputs, list(found[: len(inputs)]), list(found[len(inputs) :])


class _Exact:
    """One linear in fp64, for one input; ``dy`` comes later."""

    def __init__(self, weights: Weights, x: Tensor) -> None:
        base = weights.base
        self.x = x.detach().double().flatten(0, -2)
        self.w, self.a, self.b = (
            tensor.detach().double() for tensor in (base.weight, weights.lora_a, weights.lora_b)
        )
        bias = None if base.bias is None else base.bias.detach().double()
        self.base = nn.functional.linear(self.x, self.w, bias)
        self.h = self.x @ self.a.t()
        self.term = SCALING * self.h @ self.b.t()

    def grads(self, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return dx, dA and dB without dropout."""
        dy = dy.double().flatten(0, -2)
        dh = SCALING * dy @ self.b
        return dy @ self.w + dh @ self.a, dh.t() @ self.x, SCALING * dy.t() @ self.h

    def mean_deviation(self, p: float) -> float:
        """Return the standard deviation of ``<L(D), L(1)>``."""
        g = SCALING * (self.term @ self.b) @ self.a
        return math.sqrt(p / (1 - p) * (self.x * g).square().sum().item())

    def power(self, p: float) -> tuple[float, float]:
        """Return the expectation of ``|L(D) - L(1)|^2`` and the relative standard deviation.

        The latter from the second and the fourth moment of a mask's elements, with the mean of x^2
        for each.
        """
        gram, spread = self.b.t() @ self.b, self.a @ self.a.t()
        of_column = SCALING**2 * ((gram @ self.a) * self.a).sum(0)
        second, fourth = p / (1 - p), (1 - p) * (p / (1 - p)) ** 4 + p
        expected = second * (self.x.square() @ of_column).sum().item()
        product = gram @ spread
        effective_rank = product.trace().square() / (product @ product).trace()
        normal = 2 / (self.x.shape[0] * effective_rank.item())
        each = (self.x.square().square() @ of_column.square()).sum().item()
        # Where a mask has less weight in its tails than a normal number, this is more than need be.
        beyond = max(0.0, fourth - 3 * second**2) * each / expected**2
        return expected, math.sqrt(normal + beyond)


class Reference:
    """What the linears of a decoder layer, or a single one, should compute for given inputs.

    Args:
        weights: of the linears, in the order of the outputs. Those that share an input are the
            groups of ``shapes.GROUPS``; a single linear is a group by itself.
        inputs: one for each group, ``[.., k]``.
        dys: one for each linear, ``[.., n]``.
    """

    def __init__(
        self, weights: Mapping[str, Weights], inputs: Sequence[Tensor], dys: Sequence[Tensor]
    ) -> None:
        self._weights, self._inputs, self._dys = weights, list(inputs), list(dys)
        if len(weights) == 1:
            self._groups = [tuple(weights)]
        else:
            self._groups = [names for names in GROUPS if set(names) <= set(weights)]
        self._x_of = {name: i for i, names in enumerate(self._groups) for name in names}
        self._exact_linears = {
            name: _Exact(one, self._inputs[self._x_of[name]]) for name, one in weights.items()
        }
        of_each = {
            name: exact.grads(dy)
            for (name, exact), dy in zip(self._exact_linears.items(), self._dys, strict=True)
        }
        self._exact = self._named(
            [exact.base + exact.term for exact in self._exact_linears.values()],
            [sum_of([of_each[name][0] for name in names]) for names in self._groups],
            [grad for _, da, db in of_each.values() for grad in (da, db)],
        )
        self._native: dict[bool, dict[str, float]] = {}

    def _named(
        self, ys: Sequence[Tensor], dxs: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Name the results; rows as a matrix."""
        named = {f"y of {name}": y for name, y in zip(self._weights, ys, strict=True)}
        named |= {f"dx of {'/'.join(n)}": dx for n, dx in zip(self._groups, dxs, strict=True)}
        for i, name in enumerate(self._weights):
            named |= {f"dA of {name}": grads[2 * i], f"dB of {name}": grads[2 * i + 1]}
        return {name: tensor.detach().flatten(0, -2) for name, tensor in named.items()}

    def native_errors(self, mixed: bool) -> dict[str, float]:
        """Return peft's own errors, with fp32 adapters under autocast or in the base's dtype."""
        if mixed not in self._native:
            peft = find("peft" if mixed else "peft-bf16")
            module, parameters = build_any(peft, self._weights, 0.0)
            found = self._named(*run(module, parameters, self._inputs, self._dys))
            self._native[mixed] = {
                name: relative_error(value, self._exact[name]) for name, value in found.items()
            }
        return self._native[mixed]

    def check(
        self, provider: Provider, module: nn.Module, parameters: Sequence[Tensor], p: float
    ) -> float:
        """Hold a provider to the rule, without dropout and with it.

        Args:
            provider: whose module it is (its dtypes are those that peft is given).
            module: as ``providers.build`` or ``build_layer`` made it.
            parameters: likewise.
            p: the dropout that it was built with.

        Returns:
            The largest error as a share of what is allowed.

        Raises:
            WrongResult: it computes something else; the message says what.
        """
        native = self.native_errors(provider.mixed)
        module.eval()
        try:
            results = run(module, parameters, self._inputs, self._dys)
        finally:
            module.train()
        found = self._named(*results)
        worst = check_errors(found, native, self._exact)
        allowed = {name: allowed_error(native[name], value.dtype) for name, value in found.items()}
        self._check_gains(found, allowed)
        # With fewer rows chance alone would decide.
        if p and min(one.x.shape[0] for one in self._exact_linears.values()) >= _FEWEST_ROWS:
            self._check_dropout(module, parameters, p, allowed)
        return worst

    def _check_gains(self, found: Mapping[str, Tensor], allowed: Mapping[str, float]) -> None:
        """Check that errors are of rounding, which cancel, and not a factor.

        Of the roundings at least rank times the smallest size are independent.
        """
        smallest = min(min(*one.x.shape, *one.b.shape[:1]) for one in self._exact_linears.values())
        rank = next(iter(self._exact_linears.values())).a.shape[0]
        for name, value in found.items():
            exact = self._exact[name]
            norm = exact.square().sum().item()
            gain = (value.double() * exact).sum().item() / (norm or 1.0)
            limit = _DEVIATIONS * allowed[name] / math.sqrt(rank * smallest)
            if norm and not abs(gain - 1) <= limit:
                raise WrongResult(f"{name} is {gain:.4f} times what it should be")

    def _check_dropout(
        self,
        module: nn.Module,
        parameters: Sequence[Tensor],
        p: float,
        allowed: Mapping[str, float],
    ) -> None:
        torch.manual_seed(_SEED)
        ys = _outputs(module, self._inputs)
        linears = list(self._exact_linears.items())
        caused = []  # by the mask alone
        for (name, exact), y in zip(linears, ys, strict=True):
            noise = y.double().flatten(0, -2) - exact.base - exact.term
            _check_rate(name, exact, noise, p, allowed[f"y of {name}"])
            caused.append(noise.to(y.dtype).view_as(y))
        del ys
        torch.manual_seed(_SEED)
        found = self._named(*run(module, parameters, self._inputs, caused))
        inner, slack, dx_base = {}, {}, {}
        for (name, exact), dy in zip(linears, caused, strict=True):
            rows, y = dy.double().flatten(0, -2), found[f"y of {name}"].double()
            inner[name] = (rows * (y - exact.base)).sum().item()
            slack[name] = allowed[f"y of {name}"] * (y.norm() * rows.norm()).item()
            dx_base[name] = rows @ exact.w
            for what, operand in ((f"dA of {name}", exact.a), (f"dB of {name}", exact.b)):
                _check_identity(what, found[what], operand, inner[name], slack[name], allowed[what])
        for names in self._groups:
            what = f"dx of {'/'.join(names)}"
            total, unsure = (sum(each[name] for name in names) for each in (inner, slack))
            base = sum_of([dx_base[name] for name in names])
            x = self._exact_linears[names[0]].x
            _check_identity(what, found[what], x, total, unsure, allowed[what], base)
        self._check_single_features(module, p, allowed)

    def _check_single_features(
        self, module: nn.Module, p: float, allowed: Mapping[str, float]
    ) -> None:
        """Check inputs that have one feature other than zero in each row.

        So a row of the low-rank term is 0 or 1 / (1 - p) times what it is without dropout.
        """
        inputs = [_one_feature_a_row(x) for x in self._inputs]
        linears = {
            name: _Exact(one, inputs[self._x_of[name]]) for name, one in self._weights.items()
        }
        torch.manual_seed(_SEED)
        first, second = (_outputs(module, inputs) for _ in range(2))
        for (name, exact), *ys in zip(linears.items(), first, second, strict=True):
            kept = [_kept_rows(name, exact, y, p, allowed[f"y of {name}"]) for y in ys]
            rows = exact.x.shape[0]
            # By chance they are equal with a probability of less than 1e-8 then.
            if torch.equal(*kept) and rows * p * (1 - p) >= 9:
                raise WrongResult(f"the dropout of {name} has the same mask in two calls")


def _listed(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _outputs(module: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [y.detach() for y in _listed(module(*inputs))]


def _one_feature_a_row(x: Tensor) -> Tensor:
    """Return zeros but for one feature of each row, as large as a row of normal numbers."""
    rows, k = x.numel() // x.shape[-1], x.shape[-1]
    single = torch.zeros(rows, k, dtype=x.dtype, device=x.device)
    columns = torch.arange(rows, device=x.device) * 7919 % k  # a prime, so that all get their turn
    single.scatter_(1, columns.unsqueeze(1), float(round(math.sqrt(k))))
    return single.view_as(x).requires_grad_()


def _kept_rows(name: str, exact: _Exact, y: Tensor, p: float, allowed: float) -> Tensor:
    """Return which rows' only feature was kept."""
    rows = y.double().flatten(0, -2)
    found = rows - exact.base
    kept = (found * exact.term).sum(1) > exact.term.square().sum(1) / 2
    expected = kept.unsqueeze(1) * exact.term
    scale = 1 / (1 - p)
    if kept.any():
        scale = ((found * expected).sum() / expected.square().sum()).item()
    # A rate may be rounded to a multiple of 2**-16, as fastlora's is.
    rounded = abs(scale * (1 - p) - 1) <= _RATE_STEP / (1 - p) + allowed
    if not (rounded and (found - scale * expected).norm() <= allowed * rows.norm()):
        raise WrongResult(f"the dropout of {name} is not that of its input, scaled by 1 / (1 - p)")
    number = kept.numel()
    dropped = number - int(kept.sum())
    if not abs(dropped - p * number) <= _DEVIATIONS * math.sqrt(p * (1 - p) * number):
        raise WrongResult(f"the dropout of {name} drops {dropped} of {number}, p = {p}")
    return kept


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Add up tensors of one shape."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def _check_rate(name: str, exact: _Exact, noise: Tensor, p: float, allowed: float) -> None:
    """Check the mean and the variance of the low-rank term under dropout."""
    size = (exact.base.norm() + exact.term.norm()).item()
    mean = (noise * exact.term).sum().item()
    limit = _DEVIATIONS * exact.mean_deviation(p) + allowed * size * exact.term.norm().item()
    if not abs(mean) <= limit:
        share = mean / exact.term.square().sum().item()
        raise WrongResult(f"the dropout of {name} changes the mean of its output by {share:.1%}")
    expected, deviation = exact.power(p)
    power = noise.square().sum().item()
    rounding = (allowed * size) ** 2 + 2 * allowed * size * math.sqrt(expected)
    if not abs(power - expected) <= _DEVIATIONS * deviation * expected + rounding:
        raise WrongResult(
            f"the dropout of {name} has {power / expected:.2f} times the variance of p = {p}"
        )


def _check_identity(
    what: str,
    gradient: Tensor,
    operand: Tensor,
    inner: float,
    slack: float,
    allowed: float,
    base: Tensor | None = None,
) -> None:
    """Check ``<gradient, operand> = <dy, L>``, as nearly as both are known."""
    wide = gradient.double()
    found = ((wide if base is None else wide - base) * operand).sum().item()
    limit = slack + allowed * (wide.norm() * operand.norm()).item()
    if not abs(found - inner) <= limit:
        raise WrongResult(
            f"{what} does not belong to the dropout mask of the forward pass: {found:.4g} where it "
            f"should be {inner:.4g} within {limit:.2g}"
        )


def build_any(
    provider: Provider, weights: Mapping[str, Weights], p: float
) -> tuple[nn.Module, list[Tensor]]:
    """Build the linears of a decoder layer, or a single linear."""
    if len(weights) == 1:
        return build(provider, next(iter(weights.values())), p)
    return build_layer(provider, weights, p)
