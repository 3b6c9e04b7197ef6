"""How many bytes LoRA adds to what a frozen layer saves for its backward pass: peft and fastlora.

    python benchmarks/bench_saved_memory.py

One decoder layer of Qwen2.5-0.5B's shape with random weights, sdpa attention, all seven linears
with r = 16 and dropout 0.1, on the CPU. Counted, not estimated: every tensor that autograd saves
passes a hook; storages are counted once, parameters left out; what the same layer saves without
LoRA is subtracted.

Two things to know when reading it. On a CPU torch's dropout saves its mask in the dtype of its
input; on a GPU it saves one byte an element, so peft's rows are smaller there. With an fp32 base
under autocast, torch saves a bf16 copy of every frozen weight, and the printed bytes are not
proportional to the tokens; fastlora casts again in the backward pass and adds less than nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

import fastlora
from fastlora.bench.environment import facts
from fastlora.bench.results import Row, write_rows

# The shape of Qwen2.5-0.5B.
SHAPE = Qwen2Config(
    hidden_size=896,
    intermediate_size=4864,
    num_attention_heads=14,
    num_key_value_heads=2,
    num_hidden_layers=1,
    max_position_embeddings=32768,
    attn_implementation="sdpa",
)


@dataclass(frozen=True)
class Case:
    """One row of the table: dtypes, and the promised limits (fastlora's bytes over peft's)."""

    name: str
    base: torch.dtype
    autocast: bool = False
    limit_default: float | None = None  # over peft with its default fp32 adapters
    limit_bf16: float | None = None  # over peft with bf16 adapters


CASES = (
    Case("bf16 base", torch.bfloat16, limit_default=0.25, limit_bf16=0.55),
    Case("bf16 base, autocast", torch.bfloat16, autocast=True),
    Case("fp32 base, autocast", torch.float32, autocast=True),
    Case("fp32 base", torch.float32),
)


class Layer(nn.Module):
    """A decoder layer with its rotary embedding, frozen, from hidden states to hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Qwen2DecoderLayer(SHAPE, layer_idx=0)
        self.rotary = Qwen2RotaryEmbedding(SHAPE)
        self.requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        positions = torch.arange(hidden.shape[1]).unsqueeze(0)
        rotary = self.rotary(hidden, positions)
        out = self.layer(hidden, position_embeddings=rotary, position_ids=positions)
        return out[0] if isinstance(out, tuple) else out


def build(base: torch.dtype, adapter: torch.dtype | None) -> Layer:
    """Build the layer; ``adapter`` is the dtype of its LoRA weights, or ``None`` for no LoRA."""
    torch.manual_seed(0)
    layer = Layer().to(base)
    if adapter is None:
        return layer
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.1,
        target_modules=r".*\.(q|k|v|o|gate|up|down)_proj",
        init_lora_weights=False,
    )
    inject_adapter_in_model(config, layer)
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter)
    return layer.train()


def saved_bytes(layer: Layer, tokens: int, autocast: bool) -> int:
    """Run the layer forward and count the bytes that autograd keeps, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, Tensor] = {}  # holding the tensors, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    dtype = next(layer.parameters()).dtype
    hidden = torch.randn(1, tokens, SHAPE.hidden_size, dtype=dtype, requires_grad=True)
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), context:
        out = layer(hidden)
    total = sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in parameters)
    out.sum().backward()  # the graph, and with it every saved tensor, was alive until here
    return total


def count(case: Case, tokens: int) -> dict[str, float]:
    """Return the bytes per token that LoRA adds, for each provider."""
    frozen = saved_bytes(build(case.base, None), tokens, case.autocast)

    def added(adapter: torch.dtype, dropout_mask: str | None) -> float:
        layer = build(case.base, adapter)
        if dropout_mask:
            fastlora.patch(layer, dropout_mask=dropout_mask, strict=True)
        return (saved_bytes(layer, tokens, case.autocast) - frozen) / tokens

    return {
        "peft": added(torch.float32, None),
        "peft, bf16 adapters": added(torch.bfloat16, None),
        "fastlora": added(torch.float32, "bits"),
        "fastlora, bf16 adapters": added(torch.bfloat16, "bits"),
        "fastlora, recompute": added(torch.float32, "recompute"),
    }


def as_row(case: Case, provider: str, tokens: int, bytes_per_token: float) -> Row:
    """Return what was counted as a row of the results."""
    return Row(
        **facts(torch.device("cpu")), level="saved", model="Qwen2.5-0.5B", case=case.name,
        tokens=tokens, rank=16, dropout=0.1, dtype=str(case.base).removeprefix("torch."),
        provider=provider, saved_mib=bytes_per_token * tokens / 2**20,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--out", type=Path, help="folder for saved_memory.csv")
    options = parser.parse_args()
    tokens = options.tokens

    problems, written = [], []
    print(
        "bytes per token that LoRA adds to what one layer of Qwen2.5-0.5B saves (r = 16, p = 0.1)"
    )
    for case in CASES:
        rows = count(case, tokens)
        print(f"\n{case.name}")
        for provider, used in rows.items():
            print(f"  {provider:24} {used:9,.0f}   {used / rows['peft']:5.2f} of peft's default")
            written.append(as_row(case, provider, tokens, used))
        for limit, ours, theirs in (
            (case.limit_default, rows["fastlora"], rows["peft"]),
            (case.limit_bf16, rows["fastlora, bf16 adapters"], rows["peft, bf16 adapters"]),
        ):
            if limit is not None and not ours <= limit * theirs:
                problems.append(f"{case.name}: {ours / theirs:.2f} of peft's, at most {limit}")
    if options.out:
        write_rows(options.out / "saved_memory.csv", written)
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
