"""Load and unload adapters under a running load of mixed requests, and look at every answer.

    python benchmarks/soak.py --loads 1000      # make soak

A tiny Qwen on the CPU serves four names, for which it has room to hold two or three. Threads ask it
without a pause, some with short and some with long prompts; meanwhile names get other adapters, or
are unloaded. Every answer has to be peft's for the adapter that its name had when it was asked for.
The exit code is 1 if one of them is not, or if resident memory grows by 1 MiB or more for every 100
loads over the last half of them.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import ContinuousBatchingConfig, Qwen2Config, Qwen2ForCausalLM

import fastlora

NAMES = ("red", "green", "blue", "grey")
NEW_TOKENS = 6
PROMPTS = (3, 11, 24, 40)  # their lengths
USERS = 3
MAX_SLOPE_MIB = 1.0  # for 100 loads
# Fewer say nothing about growth: memory is handed back late, and in large pieces.
LOADS_FOR_A_SLOPE = 400
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_SPECS = (
    {"r": 4, "target_modules": [*_ATTENTION, "gate_proj", "up_proj", "down_proj"]},
    {"r": 16, "target_modules": ["q_proj", "v_proj"]},
    {"r": 8, "target_modules": _ATTENTION, "use_rslora": True},
    {"r": 5, "target_modules": ["down_proj", "lm_head"]},
)


@dataclass
class Report:
    """What was seen.

    Attributes:
        loads: of adapters, that were followed by requests.
        unloads: of names.
        answers: that were compared.
        wrong: of these, or errors, as they are printed.
        mib: resident memory of the process after each load.
        seconds: it took.
    """

    loads: int = 0
    unloads: int = 0
    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    mib: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def slope_mib(self) -> float:
        """Growth of resident memory for 100 loads, by least squares over their last half."""
        last = torch.tensor(self.mib[len(self.mib) // 2 :], dtype=torch.float64)
        if len(last) < 2:
            return 0.0
        x = torch.arange(len(last), dtype=torch.float64)
        x -= x.mean()
        return float((x * (last - last.mean())).sum() / (x * x).sum()) * 100

    @property
    def has_failed(self) -> bool:
        """Whether an answer was wrong, or memory grew."""
        grew = self.loads >= LOADS_FOR_A_SLOPE and self.slope_mib >= MAX_SLOPE_MIB
        return bool(self.wrong) or grew

    def __str__(self) -> str:
        lines = [
            f"{self.loads} loads and {self.unloads} unloads, {self.answers} answers, "
            f"{len(self.wrong)} of them wrong, in {self.seconds:.0f} s",
            *self.wrong[:5],
            f"resident memory {self.mib[0]:.0f} MiB at first and {self.mib[-1]:.0f} MiB at last; "
            f"{self.slope_mib:+.2f} MiB for 100 loads over the last half",
        ]
        return "\n".join(lines)


def make_model() -> Qwen2ForCausalLM:
    """Return the base model."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    return model


class Expected:
    """Adapters on the disk, and what peft answers with each of them.

    Args:
        folder: to save them in.
        variants: how many adapters.
    """

    def __init__(self, folder: Path, variants: int) -> None:
        self.prompts = [torch.randint(128, (n,)).tolist() for n in PROMPTS]
        self.folders: list[Path] = []
        self.answers: dict[tuple[int | None, int], list[int]] = {}
        for variant in range(variants):
            spec = _SPECS[variant % len(_SPECS)]
            model: Any = get_peft_model(make_model(), LoraConfig(**spec))
            generator = torch.Generator().manual_seed(variant)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data.normal_(std=0.2, generator=generator)
            model.eval().save_pretrained(folder / str(variant), save_embedding_layers=False)
            self.folders.append(folder / str(variant))
            self._answer(model, variant)
        self._answer(make_model(), None)

    def _answer(self, model: Any, variant: int | None) -> None:
        for i, prompt in enumerate(self.prompts):
            ids = torch.tensor([prompt])
            found = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            self.answers[variant, i] = found[0, len(prompt) :].tolist()


class Soak:
    """One run.

    Args:
        engine: whose adapters are loaded and unloaded.
        expected: of it.
        seed: of all that is drawn.
    """

    def __init__(self, engine: fastlora.Engine, expected: Expected, seed: int) -> None:
        self.engine, self.expected = engine, expected
        self.report = Report()
        self._random = random.Random(seed)
        # Which adapter a name has: asking and loading take turns, so that this is known.
        self._held: dict[str, int] = {}
        self._lock = threading.Lock()
        self._counted = threading.Lock()
        self._done = threading.Event()

    def run(self, loads: int, told: Callable[[], None]) -> Report:
        """Load that often; ``told`` is called after each."""
        began = time.perf_counter()
        users = [
            threading.Thread(target=self._ask_on, args=(self._random.random(),))
            for _ in range(USERS)
        ]
        for user in users:
            user.start()
        try:
            for i in range(loads):
                before = self.report.answers
                self._change()
                told()
                # At least one answer for each load, and a few more.
                while self.report.answers <= before + i % 3 and any(u.is_alive() for u in users):
                    time.sleep(0.001)
                self.report.mib.append(resident_mib())
        finally:
            self._done.set()
            for user in users:
                user.join()
        self.report.seconds = time.perf_counter() - began
        return self.report

    def _change(self) -> None:
        """Load an adapter under a name, and perhaps unload another one."""
        name, variant = (
            self._random.choice(NAMES),
            self._random.randrange(len(self.expected.folders)),
        )
        with self._lock:
            self.engine.adapters.load(name, self.expected.folders[variant])
            self._held[name] = variant
            self.report.loads += 1
            other = self._random.choice(NAMES)
            if other != name and other in self._held and self._random.random() < 0.9:
                self.engine.adapters.unload(other)
                del self._held[other]
                self.report.unloads += 1

    def _ask_on(self, seed: float) -> None:
        draw = random.Random(seed)
        under_way: list[tuple[Any, int | None, int]] = []
        while not self._done.is_set() or under_way:
            while len(under_way) < 4 and not self._done.is_set():
                under_way.append(self._ask(draw))
            request, variant, prompt = under_way.pop(0)
            try:
                result = request.result(timeout=60)
            except TimeoutError as error:
                self._count(str(error))
                return
            if result.finish_reason == "cancelled":
                continue
            if result.error is not None:
                self._count(f"{result.adapter}: {result.error}")
            elif result.token_ids != self.expected.answers[variant, prompt]:
                self._count(f"{result.adapter}, prompt {prompt}: {result.token_ids}")
            else:
                self._count(None)

    def _ask(self, draw: random.Random) -> tuple[Any, int | None, int]:
        prompt = draw.randrange(len(PROMPTS))
        with self._lock:
            name = draw.choice([None, *self._held])
            variant = None if name is None else self._held[name]
            request = self.engine.submit(
                self.expected.prompts[prompt],
                name,
                max_new_tokens=NEW_TOKENS,
                ignore_eos=True,
                do_sample=False,
            )
        if draw.random() < 0.1:
            request.cancel()
        return request, variant, prompt

    def _count(self, wrong: str | None) -> None:
        with self._counted:
            self.report.answers += 1
            if wrong is not None:
                self.report.wrong.append(wrong)


def resident_mib() -> float:
    """Return how much memory this process has, on Linux."""
    import resource

    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def soak(loads: int, *, variants: int = 12, seed: int = 0, progress: bool = False) -> Report:
    """Run it.

    Args:
        loads: how many.
        variants: adapters that are loaded in turns.
        seed: of which, when, and what is asked.
        progress: whether to show a bar on a terminal.

    Returns:
        What was seen.
    """
    from tqdm import tqdm

    with tempfile.TemporaryDirectory() as folder:
        expected = Expected(Path(folder), variants)
        gc.collect()
        # Room for two or three of the names, so that adapters come and go for requests, too.
        engine = fastlora.Engine(
            make_model(),
            adapter_memory="52KiB",
            batching=ContinuousBatchingConfig(page_size=8, num_blocks=48, max_batch_tokens=96),
        )
        bar = tqdm(total=loads, desc="loads", unit="load", disable=None if progress else True)
        with engine, bar:
            return Soak(engine, expected, seed).run(loads, bar.update)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loads", type=int, default=1000, help="of adapters (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    report = soak(options.loads, seed=options.seed, progress=True)
    print(report)
    return int(report.has_failed)


if __name__ == "__main__":
    sys.exit(main())
