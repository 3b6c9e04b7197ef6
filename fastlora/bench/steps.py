"""A training step of a whole model with random weights: forward, backward, AdamW on the adapters.

The model has the real shape, or is cut to a few layers and a small vocabulary where the device is a
CPU; attention, norms and loss are transformers' own, or Liger's. ``frozen`` is the model without
adapters, with the gradient of its embeddings: what no adapter can undercut.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastlora
from fastlora.bench.accuracy import relative_error
from fastlora.bench.checking import check_errors
from fastlora.bench.measuring import Step
from fastlora.bench.providers import SCALING, Provider, find
from fastlora.bench.results import is_ours
from fastlora.bench.shapes import NAMES, Model

# Others convert linears, not models.
_PROVIDERS = ("frozen", "peft", "peft-bf16", "fastlora")
_SEQUENCE = 4096  # tokens of one sequence, at most, where a batch can be cut evenly
_CHECKED_TOKENS = 128


@dataclass(frozen=True)
class Variant:
    """What is varied of a step.

    Attributes:
        checkpointing: gradient checkpointing, the kind that is not reentrant.
        liger: Liger's kernels in place of transformers' norms, activation, rotary embedding and
            loss.
    """

    checkpointing: bool = False
    liger: bool = False

    def __str__(self) -> str:
        parts = ["step", *(["checkpointing"] * self.checkpointing), *(["Liger"] * self.liger)]
        return ", ".join(parts)


VARIANTS = (Variant(), Variant(checkpointing=True), Variant(liger=True), Variant(True, True))


def providers(wanted: Sequence[Provider]) -> list[Provider]:
    """Return those of which there is a training step."""
    return [provider for provider in wanted if provider.name in _PROVIDERS]


def needed_bytes(model: Model, tokens: int, dtype: torch.dtype) -> int:
    """Estimate the memory of a step: the weights, the wider copy for the check, the logits."""
    layer = sum(linear.n * linear.k for linear in model.linears.values())
    embeddings = model.config["vocab_size"] * model.config["hidden_size"]
    copies = 1 if model.config.get("tie_word_embeddings") else 2
    wider = 8 if dtype == torch.float32 else 4
    weights = (model.layers * layer + copies * embeddings) * (dtype.itemsize + wider)
    # In the dtype of the weights, in fp32 for the loss, and the gradient of that.
    return int(weights + tokens * model.config["vocab_size"] * (dtype.itemsize + 8))


def cut(model: Model, layers: int, vocabulary: int) -> Model:
    """Return a model with fewer layers and a smaller vocabulary, and a name that says so."""
    layers, vocabulary = min(layers, model.layers), min(vocabulary, model.config["vocab_size"])
    config = {**model.config, "num_hidden_layers": layers, "vocab_size": vocabulary}
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:layers]
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        config.pop(token, None)  # they may be cut off, and a step generates nothing
    name = f"{model.name} ({layers} of {model.layers} layers, vocabulary {vocabulary:,})"
    return Model(name, model.linears, layers, config)


class TrainingStep:
    """A model, its adapters, and a batch; each provider has modules of its own on the same weights.

    Args:
        model: what is built, with random weights.
        tokens: of a batch, in sequences of at most 4,096.
        r: rank.
        p: dropout.
        device: where it trains.
        dtype: of the frozen weights; half precision trains under autocast, as by ``bf16=True``.
        variant: see there. Liger's replaces functions of transformers' modules for the rest of the
            process.
    """

    def __init__(
        self,
        model: Model,
        tokens: int,
        r: int,
        p: float,
        device: torch.device,
        dtype: torch.dtype,
        variant: Variant,
    ) -> None:
        self._r, self._p, self._device, self._dtype = r, p, device, dtype
        self._variant = variant
        self._native: dict[bool, dict[str, float]] = {}
        self._base = _build(model, device, dtype)
        if variant.liger:
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            _apply_liger_kernel_to_instance(model=self._base)
        fewest = -(-tokens // _SEQUENCE)
        # A number that cannot be cut evenly is one long sequence.
        sequences = next((n for n in range(fewest, 2 * fewest + 1) if tokens % n == 0), 1)
        generator = torch.Generator(device).manual_seed(0)
        shape, vocabulary = (sequences, tokens // sequences), model.config["vocab_size"]
        self._ids = torch.randint(vocabulary, shape, generator=generator, device=device)

    def checked_step(self, provider: Provider) -> tuple[Step, float | None]:
        """Build a provider's step, and check loss and gradients without dropout on 128 tokens.

        They are compared with the same model in fp32 (in fp64 if its weights are fp32), by the rule
        of ``checking``.

        Raises:
            WrongResult: they are farther off than peft's.
        """
        if provider.name == "frozen":
            return self._frozen(), None
        model = self._adapted(provider)
        with fastlora.backend(provider.plan):
            found = self._results(model, self._is_autocast(provider))
        gate = check_errors(found, self._native_errors(provider.mixed), self._exact)
        optimizer = torch.optim.AdamW(_trainable(model), lr=1e-4)

        def step() -> object:
            with fastlora.backend(provider.plan):
                loss = self._loss(model, self._is_autocast(provider), self._ids)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss

        return step, gate

    def _frozen(self) -> Step:
        model = self._copy()
        model.requires_grad_(False)
        embed = model.get_input_embeddings()
        self._prepare(model)

        def step() -> object:
            inputs = embed(self._ids).requires_grad_()
            loss = model(inputs_embeds=inputs, labels=self._ids).loss
            return torch.autograd.grad(loss, inputs)

        return step

    def _copy(self) -> Any:
        """Copy the modules and share the weights."""
        shared = [*self._base.parameters(), *self._base.buffers()]
        return copy.deepcopy(self._base, {id(tensor): tensor for tensor in shared})

    def _adapted(self, provider: Provider) -> Any:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=self._r,
            lora_alpha=SCALING * self._r,
            lora_dropout=self._p,
            target_modules=list(NAMES),
            init_lora_weights=False,
        )
        torch.manual_seed(0)  # the same adapters for everyone
        model: Any = get_peft_model(self._copy(), config, autocast_adapter_dtype=provider.mixed)
        dtype = torch.float32 if provider.mixed else self._dtype
        for parameter in _trainable(model):
            parameter.data = parameter.data.to(self._dtype).to(dtype)
        if is_ours(provider.name):
            fastlora.patch(model, strict=True)
        self._prepare(model)
        return model

    def _prepare(self, model: Any) -> None:
        model.train()
        model.config.use_cache = False
        if self._variant.checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})

    def _is_autocast(self, provider: Provider) -> bool:
        return provider.mixed and self._dtype in (torch.bfloat16, torch.float16)

    def _loss(self, model: Any, autocast: bool, ids: Tensor) -> Tensor:
        with torch.autocast(self._device.type, self._dtype) if autocast else nullcontext():
            loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    def _results(self, model: Any, autocast: bool) -> dict[str, Tensor]:
        """Return the loss, and the gradients of all A and of all B, without dropout.

        The loss in the dtype of the weights: it is a single number, whose error may be small by
        chance, so that what may be expected of it is that dtype's precision.
        """
        model.eval()
        loss = self._loss(model, autocast, self._ids[:1, :_CHECKED_TOKENS])
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, [parameter for _, parameter in named])
        model.train()
        found = {"loss": loss.detach().to(self._dtype).reshape(1)}
        for which in ("lora_A", "lora_B"):
            those = [grad for (name, _), grad in zip(named, grads, strict=True) if which in name]
            found[f"the gradient of all {which}"] = torch.cat([grad.flatten() for grad in those])
        return found

    @functools.cached_property
    def _exact(self) -> dict[str, Tensor]:
        wide = torch.float64 if self._dtype == torch.float32 else torch.float32
        model = copy.deepcopy(self._adapted(find("peft"))).to(wide)
        return self._results(model, autocast=False)

    def _native_errors(self, mixed: bool) -> dict[str, float]:
        if mixed not in self._native:
            peft = find("peft" if mixed else "peft-bf16")
            found = self._results(self._adapted(peft), self._is_autocast(peft))
            self._native[mixed] = {
                name: relative_error(value, self._exact[name]) for name, value in found.items()
            }
        return self._native[mixed]


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _build(model: Model, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**model.config)
    torch.manual_seed(0)
    with torch.device(device):
        built: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return built


def launches(step: Step) -> int:
    """Count the kernels that a step launches on a CUDA device, by PyTorch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    step()
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    # Copies and fills are not kernels.
    names = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names)


def variants(device: torch.device, wanted: Sequence[Variant] = VARIANTS) -> list[Variant]:
    """Return the variants that can run: Liger's kernels need a GPU, and the package."""
    from importlib.util import find_spec

    liger = device.type == "cuda" and find_spec("liger_kernel") is not None
    # Those without Liger first: it replaces functions for the rest of the process.
    return sorted((v for v in wanted if liger or not v.liger), key=lambda v: v.liger)
