"""The one rule for numbers: not worse than PyTorch (or peft) in the same dtypes, against fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastlora.bench.accuracy import FACTOR, allowed_error, relative_error


def assert_as_accurate(
    actual: Tensor, native: Tensor, exact: Tensor, factor: float = FACTOR, name: str = "result"
) -> None:
    """Assert that ``actual`` is at most ``factor`` times as far from ``exact`` as ``native`` is.

    Args:
        actual: what fastlora computed.
        native: what peft, or plain PyTorch, computes in the same dtypes.
        exact: the same in fp64.
        factor: 1.2 norm-wise for results of the package; an eps of the result's dtype is added.
        name: what the message calls it.
    """
    assert actual.shape == native.shape == exact.shape, f"{name}: shapes differ"
    assert actual.dtype == native.dtype, f"{name}: {actual.dtype} instead of {native.dtype}"
    error, native_error = relative_error(actual, exact), relative_error(native, exact)
    allowed = allowed_error(native_error, actual.dtype, factor)
    # Written so that NaN fails.
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def gradients(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], dy: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the output ``y`` and ``d<name>`` of each input that requires a gradient."""
    y = function(**inputs)
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    dy = output_gradient(y) if dy is None else dy
    grads = torch.autograd.grad(y, list(wanted.values()), dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(wanted, grads, strict=True)}}


def output_gradient(y: Tensor) -> Tensor:
    """Return a fixed pseudo-random gradient that every dtype of ``y`` represents exactly."""
    generator = torch.Generator().manual_seed(1)
    return (torch.randint(-8, 9, y.shape, generator=generator) / 8).to(y.device, y.dtype)


def assert_layer_as_accurate(
    fused: nn.Module, peft: nn.Module, x: Tensor, **kwargs: object
) -> None:
    """Compare a patched layer or model with the same one in peft: output and every gradient.

    Args:
        fused: patched.
        peft: an unpatched copy with the same weights (``copy.deepcopy`` before ``patch``).
        x: the input; a gradient for it is compared as well if it is floating point.
        kwargs: passed to both.
    """
    exact = copy.deepcopy(peft).double()
    results = []
    for module in (fused, peft, exact):
        module_x = x.double() if module is exact and x.is_floating_point() else x
        module_x = module_x.detach().clone()
        if module_x.is_floating_point():
            module_x.requires_grad_()
        module.zero_grad(set_to_none=True)
        y = module(module_x, **kwargs)
        y = getattr(y, "logits", y)
        y.backward(output_gradient(y))
        named = {f"d{name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
        if module_x.grad is not None:
            named["dx"] = module_x.grad
        results.append({"y": y.detach(), **named})
    assert results[0].keys() == results[1].keys() == results[2].keys()
    for name in results[0]:
        assert_as_accurate(*(result[name] for result in results), name=name)
