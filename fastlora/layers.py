"""``LoRALinear``: peft's LoRA ``Linear`` with a fused forward.

The class adds no parameter, buffer or submodule and changes nothing but ``forward``, so a layer
becomes one by ``layer.__class__ = LoRALinear`` and everything else that peft does with it (saving,
merging, switching adapters, ...) is peft's own code. Whatever is not the plain case is handed to
peft's ``forward``, by the rules in ``rules.py``.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from fastlora import mixed, rules
from fastlora.autograd import DropoutMask, apply_call, apply_lora_linear, apply_scaled

FUSED = "fused"  # what is recorded of a call that did not go to peft


class LoRALinear(PeftLinear):
    """A frozen linear layer with LoRA adapters, computed as one operation.

    :math:`y = xW^T + b + s\\,\\mathrm{dropout}(x)A^TB^T` of Hu et al., 2021
    (https://arxiv.org/abs/2106.09685), by ``fastlora.lora_linear``. It *is* peft's
    ``peft.tuners.lora.layer.Linear`` in every other respect: same constructor, attributes and
    ``state_dict`` keys. ``fastlora.patch`` makes these out of the layers of a peft model;
    ``LoRALinear.from_linear`` makes one without a peft model.
    """

    # Instance attributes of the same names shadow these; none of them is part of the state_dict.
    fastlora_dropout_mask: DropoutMask = "bits"
    fastlora_takes_adapter_files: bool = False
    fastlora_last_call: str | None = None  # FUSED, or why it went to peft; None before the first
    fastlora_operands: rules.Operands | None = None  # what the rules found at the last call
    fastlora_known: tuple[rules.Operands | None, ...] = ()  # and at earlier ones
    fastlora_group: Any = None  # the siblings.SiblingGroup that it is in

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        adapter_name: str = "default",
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
    ) -> LoRALinear:
        """Put a LoRA adapter on a linear layer, without a peft model.

        Args:
            linear: the base layer, kept as ``base_layer`` and frozen (``requires_grad_(False)``). A
                subclass, which may keep its weight in another form, is refused.
            r: rank of the adapter, at least 1.
            lora_alpha: the adapter's scaling is ``lora_alpha / r``.
            lora_dropout: probability of zeroing an element of the adapter's input, in ``[0, 1)``.
            adapter_name: the name in the ``state_dict``: ``lora_A.<adapter_name>.weight``.
            use_rslora: scale by ``lora_alpha / sqrt(r)`` instead.
            init_lora_weights: as in ``peft.LoraConfig``; ``True`` makes the adapter a no-op at
                first.

        Returns:
            A layer whose adapter alone is trainable, in the base layer's dtype and on its device.
            Its ``state_dict`` has the keys of the same layer inside a peft model, and
            ``load_state_dict`` also takes an adapter file's ``lora_A.weight`` and
            ``lora_B.weight``.

        Raises:
            TypeError: ``linear`` is not exactly an ``nn.Linear``.
            ValueError: the rank is not positive, or ``lora_dropout`` is outside ``[0, 1)``.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(f"linear must be a plain torch.nn.Linear, got {type(linear).__name__}")
        if r < 1:
            raise ValueError(f"r must be a positive integer, got {r}")
        if not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {lora_dropout}")
        options = {
            "lora_dropout": lora_dropout,
            "use_rslora": use_rslora,
            "init_lora_weights": init_lora_weights,
        }
        # peft 0.19 gathered the options into a config; before, they were arguments.
        if "config" in inspect.signature(PeftLinear.__init__).parameters:
            options = {"config": LoraConfig(r=r, lora_alpha=lora_alpha, **options)}
        layer = cls(linear, adapter_name, r=r, lora_alpha=lora_alpha, **options)
        linear.requires_grad_(False)
        layer.fastlora_takes_adapter_files = True
        return layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``x [..., K]`` to ``[..., N]``, fused, or by peft where a rule says so."""
        own, compiling = self.__dict__, torch.compiler.is_compiling()
        if kwargs and kwargs.get("adapter_names") is not None:
            if not compiling:
                own["fastlora_last_call"] = "it was called with adapter_names="
            return super().forward(x, *args, **kwargs)  # which calls _mixed_batch_forward
        # After a call that went to peft the rules come first: they are the likelier to say no.
        usual = not (args or kwargs or compiling) and own.get("fastlora_last_call") == FUSED
        if usual and (y := self._usual(x)) is not None:
            return y
        reason = rules.argument_reason(args, kwargs) if args or kwargs else None
        found = rules.operands_now(self) if compiling else rules.operands(self)
        if reason is None:
            reason = rules.tracing_reason() or (
                found if isinstance(found, str) else rules.input_reason(found, x)
            )
        if not compiling:
            own["fastlora_last_call"] = reason or FUSED  # what explain() reports
        if reason is not None or isinstance(found, str):
            return super().forward(x, *args, **kwargs)
        group = None if usual or compiling or args or kwargs else own.get("fastlora_group")
        if group is not None and (y := group.output_of(self, x)) is not None:
            return y
        y = None if compiling else self._prepared(found, x)
        if y is not None:
            return y
        scalings, mask = found.scalings(self), self.fastlora_dropout_mask
        y = apply_lora_linear(x, *found.arguments(scalings), found.dropout_p(), None, mask)
        return found.finish(y, scalings)

    def _usual(self, x: Tensor) -> Tensor | None:
        """Return the output by what an earlier call has prepared, or ``None``."""
        own = self.__dict__
        group = own.get("fastlora_group")
        if group is not None and (y := group.output_of(self, x)) is not None:
            fused: Tensor = y
            return fused
        found: rules.Operands | None = own.get("fastlora_operands")
        return self._prepared(found, x) if found is not None and found.hold(self) else None

    def _prepared(self, found: rules.Operands, x: Tensor) -> Tensor | None:
        """Return the output by a prepared call, or ``None`` where there is none."""
        if found.siblings is None or (not found.simple and rules.input_reason(found, x)):
            return None
        scalings, p = found.scalings(self), found.dropout_p()
        call = found.siblings.call_for(x, scalings, p, self.fastlora_dropout_mask)
        if call is None:
            return None
        if found.siblings.scaled:
            return apply_scaled(call, x, (found.column_scale(scalings),))[0]
        return apply_call(call, x)[0]

    def _check_forward_args(self, x: Tensor, *args: Any, **kwargs: Any) -> None:
        names = kwargs.get("adapter_names")
        if names is not None and mixed.is_packed(x, names):
            x = x[0]  # one row for each name: peft counts rows of the batch
        super()._check_forward_args(x, *args, **kwargs)

    def _mixed_batch_forward(
        self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> Tensor:
        # Called by peft's forward, after its checks.
        reason = mixed.fallback_reason(self, x, args, kwargs, adapter_names)
        self.__dict__["fastlora_last_call"] = reason or FUSED
        if reason is None:
            return mixed.forward(self, x, adapter_names)
        if mixed.is_packed(x, adapter_names):
            packed: Tensor = super()._mixed_batch_forward(
                x[0], *args, adapter_names=adapter_names, **kwargs
            )
            return packed.unsqueeze(0)
        y: Tensor = super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        return y

    def _get_name(self) -> str:
        # peft's repr, get_layer_status() and get_model_status() report the class by this name.
        return "Linear"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # peft's adapter files leave the adapter's name out of their keys. In a peft model peft
        # itself puts it back.
        if self.fastlora_takes_adapter_files and len(self.lora_A) == 1:
            (adapter,) = self.lora_A
            for part in ("lora_A", "lora_B"):
                if (key := f"{prefix}{part}.weight") in state_dict:
                    state_dict[f"{prefix}{part}.{adapter}.weight"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
