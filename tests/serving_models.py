"""Tiny models that are served with several adapters, and peft as the judge of their answers."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import VOCABULARY, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import ContinuousBatchingConfig, PreTrainedModel, PreTrainedTokenizerFast

import fastlora
from fastlora.adapters.files import CONFIG, WEIGHTS

QKV = ["q_proj", "k_proj", "v_proj"]
LINEARS = [*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"]
# Different ranks, scalings, targets and layers; ranks that differ inside a group, too.
SPECS: dict[str, dict[str, Any]] = {
    "all-4": {"r": 4, "lora_alpha": 8, "target_modules": LINEARS},
    "qv-16": {"r": 16, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "rs-8": {
        **{"r": 8, "lora_alpha": 12, "target_modules": LINEARS, "use_rslora": True},
        **{"rank_pattern": {"k_proj": 3}, "alpha_pattern": {"up_proj": 20}},
    },
    "one-layer-5": {
        **{"r": 5, "lora_alpha": 20, "target_modules": ["k_proj", "down_proj"]},
        "layers_to_transform": [1],
    },
}
NAMES = [None, *SPECS]
PATIENCE = 30.0  # seconds, after which nothing comes any more
# Room for all of them, in pages small enough that prompts have several.
BATCHING = {"page_size": 8, "num_blocks": 96, "max_batch_tokens": 256}


def served_model(family: str = "qwen2", attention: str = "sdpa", **overrides: Any) -> Any:
    """Return a model in which biases are not zero and tokens do not repeat for ever."""
    model = tiny_model(family, **{"max_position_embeddings": 512, **overrides}).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3, generator=generator)
    model.set_attn_implementation(attention)
    return model


def with_adapters(model: PreTrainedModel, specs: Mapping[str, dict[str, Any]]) -> PeftModel:
    """Return a peft model with adapters whose A and B are not small."""
    peft_model: Any = None
    for name, spec in specs.items():
        config = LoraConfig(**spec)
        if peft_model is None:
            peft_model = get_peft_model(model, config, adapter_name=name)
        else:
            peft_model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    return peft_model.eval()


class Judge:
    """What peft's own ``generate`` answers, one prompt after the other.

    Args:
        folder: where the adapters are saved, each in a folder of its name.
        specs: of the adapters.
        family: of the base model, and what else ``served_model`` takes.
    """

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, dict[str, Any]] = SPECS,
        family: str = "qwen2",
        **overrides: Any,
    ) -> None:
        self.model = with_adapters(served_model(family, **overrides), specs)
        self.model.save_pretrained(folder, save_embedding_layers=False)
        self.folders = {name: folder / name for name in specs}
        self._known: dict[Any, list[int]] = {}

    def answer(self, prompt: Sequence[int], adapter: str | None, new: int) -> list[int]:
        """Return the ``new`` most likely tokens."""
        key = (tuple(prompt), adapter, new)
        if key not in self._known:
            self._known[key] = self._generate(prompt, adapter, new)
        return self._known[key]

    def answers(
        self, prompts: Iterable[Sequence[int]], adapters: Iterable[str | None], new: int
    ) -> list[list[int]]:
        return [self.answer(*each, new) for each in zip(prompts, adapters, strict=True)]

    def logits(self, prompt: Sequence[int], adapter: str | None) -> torch.Tensor:
        """Return those of the next token."""
        with self._using(adapter), torch.no_grad():
            return self.model(torch.tensor([list(prompt)])).logits[0, -1]

    def _generate(self, prompt: Sequence[int], adapter: str | None, new: int) -> list[int]:
        ids = torch.tensor([list(prompt)])
        with self._using(adapter), torch.no_grad():
            # Without a mask generate makes one, which hides tokens that equal the padding.
            out = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                do_sample=False, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        return out[0, len(prompt) :].tolist()

    def _using(self, adapter: str | None) -> contextlib.AbstractContextManager[Any]:
        if adapter is None:
            return self.model.disable_adapter()
        self.model.set_adapter(adapter)
        return contextlib.nullcontext()


def engine_of(
    model: Any,
    adapters: Mapping[str, Any] | None = None,
    *,
    memory: int | str = "4MB",
    **batching: Any,
) -> fastlora.Engine:
    """Return an engine with a small cache."""
    config = ContinuousBatchingConfig(**{**BATCHING, **batching})
    return fastlora.Engine(model, adapters, adapter_memory=memory, batching=config)


def ask(
    engine: fastlora.Engine,
    prompts: Sequence[Any],
    adapters: Sequence[str | None] | str | None,
    new: int,
    **options: Any,
) -> list[list[int]]:
    """Return the tokens of greedy answers that go on for ``new`` tokens, none of which failed."""
    options = {"do_sample": False, "ignore_eos": True, "progress": False, **options}
    results = patiently(engine.generate, prompts, adapters, max_new_tokens=new, **options)
    assert [result.error for result in results] == [None] * len(results)
    return [result.token_ids for result in results]


def patiently(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function, and fail where it would wait for ever."""
    found: list[Any] = []
    raised: list[BaseException] = []

    def call() -> None:
        try:
            found.append(function(*args, **kwargs))
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), f"no answer after {PATIENCE} s"
    for error in raised:
        raise error
    return found[0]


def prompts_of(*lengths: int, seed: int = 7, vocabulary: int = VOCABULARY) -> list[list[int]]:
    """Return prompts with that many tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def changed(folder: Path, to: Path, change: Any = None, **fields: Any) -> Path:
    """Copy a saved adapter, with other tensors or fields of its config."""
    shutil.copytree(folder, to)
    config = json.loads((to / CONFIG).read_text())
    (to / CONFIG).write_text(json.dumps({**config, **fields}))
    tensors = safetensors.torch.load_file(to / WEIGHTS)
    for name, tensor in tensors.items():
        tensors[name] = tensor if change is None else change(name, tensor)
    safetensors.torch.save_file(tensors, to / WEIGHTS)
    return to


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for every byte, and 256 for the end.

    Other characters than those of ASCII are several tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    made.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return made


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return all of a model that an engine might leave changed."""
    modules = dict(model.named_modules())
    return {
        "classes": {name: type(module) for name, module in modules.items()},
        "attributes": {name: sorted(module.__dict__) for name, module in modules.items()},
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in modules.items()
        },
        "training": {name: module.training for name, module in modules.items()},
        "attention": model.config._attn_implementation,
        "defaults": model.generation_config.to_dict(),
    }
