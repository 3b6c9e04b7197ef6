"""A linear, or the seven linears of a decoder layer, by every provider: checked, then timed."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

import fastlora
from fastlora.bench import checking
from fastlora.bench.measuring import Step
from fastlora.bench.providers import Provider, draw_weights
from fastlora.bench.shapes import INPUTS, Linear


class Case:
    """Linears, and inputs and gradients for them, that every provider gets alike.

    Args:
        linears: a single one, or the seven of a decoder layer by their names in Qwen2.
        m: rows of every input.
        r: rank.
        p: dropout.
        device: where it runs.
        dtype: of inputs, frozen weights and gradients.
    """

    def __init__(
        self,
        linears: Mapping[str, Linear],
        m: int,
        r: int,
        p: float,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.p = p
        self.weights = draw_weights(linears, r, device, dtype)
        generator = torch.Generator(device).manual_seed(1)

        def draw(width: int) -> Tensor:
            return torch.randn(1, m, width, generator=generator, device=device).to(dtype)

        names = INPUTS if len(linears) > 1 else tuple(linears)
        self.inputs = [draw(linears[name].k).requires_grad_() for name in names]
        self.dys = [draw(linear.n) for linear in linears.values()]

    @functools.cached_property
    def reference(self) -> checking.Reference:
        """What is right, in fp64."""
        return checking.Reference(self.weights, self.inputs, self.dys)

    def forget_reference(self) -> None:
        """Free the fp64 results, which are large."""
        self.__dict__.pop("reference", None)

    def checked_step(self, provider: Provider) -> tuple[Step, float | None]:
        """Build a provider's step and check what it computes.

        Returns:
            A function that runs forward and backward; and the largest error as a share of what is
            allowed, ``None`` for the bare linears, which are PyTorch's own.

        Raises:
            WrongResult: the provider computes something else.
            ValueError: it has no dropout, and the case has.
        """
        module, parameters = checking.build_any(provider, self.weights, self.p)
        gate = None
        if provider.name != "frozen":
            with fastlora.backend(provider.plan):
                gate = self.reference.check(provider, module, parameters, self.p)

        def step() -> object:
            with fastlora.backend(provider.plan):
                return checking.run(module, parameters, self.inputs, self.dys)

        return step, gate
