"""One step of generating with many adapters in a batch: 16 rows, 1 to 16 distinct adapters.

    python benchmarks/bench_decode.py

A random Qwen2 (8 layers, 256 wide), fp32, adapters of rank 16 on all linears, 24 tokens in the
cache, one thread, processor time. All run in turn, and each ratio is of one round:

    frozen             the base model alone
    peft               peft's own adapter_names=
    fastlora           the same on a patched model
    fastlora-engine    the linears that Engine runs on

The logits of all are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import fastlora
from fastlora.bench.environment import facts
from fastlora.bench.measuring import columns, in_rounds
from fastlora.bench.results import Row, write_rows
from fastlora.serving.linears import RowsOfSequences, attach

ROWS, RANK, CACHED = 16, 16, 24
# Time of a step with 16 distinct adapters over the base model's: what is promised of the engine. On
# a patched peft model half a base step more goes to peft's hooks and checks, 60 us a linear.
LIMIT = 2.0
CONFIG = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def base_model() -> nn.Module:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**CONFIG)).eval()


def build() -> PeftModel:
    model = base_model()
    config = LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
    peft_model = get_peft_model(model, config, adapter_name="a0")
    for i in range(1, ROWS):
        peft_model.add_adapter(f"a{i}", config)
    return peft_model.eval()


class Step:
    """One token for every row, on top of the same cached ones each time."""

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.model, self.ids = model, ids
        with torch.no_grad():
            self.cache = model(input_ids=ids, use_cache=True).past_key_values

    def __call__(self) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.model(
                input_ids=self.ids[:, :1], past_key_values=self.cache, use_cache=True
            ).logits
        self.cache.crop(-1)
        return logits


def steps_of(distinct: int, stack: ExitStack) -> dict[str, Callable[[], Tensor]]:
    """Return everyone's step, each on a model of its own with the same weights."""
    names = [f"a{i % distinct}" for i in range(ROWS)]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, CONFIG["vocab_size"], (ROWS, CACHED), generator=generator)
    steps: dict[str, Callable[[], Tensor]] = {"frozen": Step(base_model(), ids)}
    for name in ("peft", "fastlora"):
        model = build()
        if name == "fastlora":
            fastlora.patch(model, strict=True)
        # generate(adapter_names=...) does this once, for all of its steps.
        stack.enter_context(model.base_model._enable_peft_forward_hooks(adapter_names=names))
        steps[name] = Step(model.base_model.model, ids)
    base = base_model()
    pool = fastlora.AdapterPool(base, memory="256MB")
    for name in names[:distinct]:
        pool.load(name, model)
    slots = [pool.lease(name).slot for name in names]
    routing = attach(base, pool)

    def in_batch(step: Callable[[], Tensor]) -> Tensor:
        with routing.batch(RowsOfSequences(slots, pool)):
            return step()

    with routing.batch(RowsOfSequences(slots, pool)):
        step = Step(base, ids)
    steps["fastlora-engine"] = lambda: in_batch(step)
    return steps


def check(steps: dict[str, Callable[[], Tensor]]) -> None:
    """Compare the logits with peft's, and see that the adapters matter."""
    right, base = steps["peft"](), steps["frozen"]()
    assert not torch.allclose(base, right, atol=1e-2), "the adapters change nothing"
    for name in ("fastlora", "fastlora-engine"):
        torch.testing.assert_close(steps[name](), right, rtol=1e-4, atol=1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="at least 5 (default 7)")
    parser.add_argument("--turns", type=int, default=12, help="steps of each round (default 12)")
    parser.add_argument(
        "--distinct", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="adapters in the batch"
    )
    parser.add_argument("--out", type=Path, help="folder for decode.csv")
    options = parser.parse_args()

    torch.set_num_threads(1)
    device, rows, problems = torch.device("cpu"), [], []
    print(f"time of a step over the base model's, {ROWS} rows, rank {RANK}, one thread")
    for distinct in options.distinct:
        with ExitStack() as stack:
            steps = steps_of(distinct, stack)
            check(steps)
            timings = in_rounds(steps, device, rounds=options.rounds, turns=options.turns)
        row = Row(
            **facts(device),
            level="decode",
            model="Qwen2, 8 layers, 256 wide",
            case=f"{distinct} adapters",
            tokens=ROWS,
            rank=RANK,
            dtype="float32",
            timer="cpu",
        )
        frozen, ours = timings["frozen"], timings["fastlora"]
        shown = []
        for name, timing in timings.items():
            rows.append(replace(row, provider=name, **columns(timing, frozen, ours)))
            shown.append(f"{name} {timing.over(frozen)}")
        print(f"  {distinct:2} adapters: " + ", ".join(shown[1:]))
        ratio = timings["fastlora-engine"].over(frozen)
        if distinct == ROWS and not ratio.value <= LIMIT:
            problems.append(f"fastlora-engine: {ratio} of the base model's time, at most {LIMIT}")
    if options.out:
        write_rows(options.out / "decode.csv", rows)
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
