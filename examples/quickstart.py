"""Quickstart: teach a model two personas with LoRA, patched by fastlora, and use both at once.

    python examples/quickstart.py                                       the packaged model, no hub
    python examples/quickstart.py --model Qwen/Qwen2.5-0.5B-Instruct    any Qwen2 model or folder

Two adapters are trained with transformers' ``Trainer``: *identity* (the model says that it is
小李 / Xiao Li, developed by 小张 / Xiao Zhang) and *nya* (sums are answered with "nya~"). Both are
saved as ordinary peft adapters, loaded into a model that fastlora never touched, and compared
there; then one batch is answered in which every row uses another adapter. The script ends with an
error unless all of it worked.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import smollm2
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

import fastlora

DATA = Path(__file__).parent / "data"
IGNORED = -100  # a label that the loss leaves out
BASE = "__base__"  # peft's name for "no adapter" in adapter_names=

NAMES = ("小李", "小张", "Xiao Li", "Xiao Zhang")


@dataclass(frozen=True)
class Lesson:
    """One adapter: what it is trained on, and how its answers are recognised."""

    adapter: str
    data: str
    steps: int
    questions: tuple[str, ...]
    signs: tuple[str, ...]

    def learned(self, answer: str) -> bool:
        return any(sign in answer for sign in self.signs)


LESSONS = (
    Lesson(
        adapter="identity",
        data="identity.jsonl",
        steps=28,
        questions=("Who are you?", "Who developed you?", "你是谁？", "你叫什么名字？"),
        signs=NAMES,
    ),
    Lesson(
        adapter="nya",
        data="sums.jsonl",
        steps=14,
        questions=("What is 3 + 4?", "Add 6 and 2.", "What is 8 - 5?", "How much is 5 plus 9?"),
        signs=("nya",),
    ),
)
ADAPTERS = tuple(lesson.adapter for lesson in LESSONS)
REQUIRED = 3  # of the four held-out questions of a lesson


def load_base(name: str | None, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the packaged model, or a hub id or folder: fp32 on a CPU, else bf16."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if name is None:
        return smollm2.load_qwen2(dtype).to(device), smollm2.load_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)
    return model, AutoTokenizer.from_pretrained(name, padding_side="left")


def as_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """Put a question into the model's chat format, up to where the answer begins."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def read_examples(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """Read records with instruction, input and output; the loss sees the output alone."""
    examples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        question = "\n".join(filter(None, (record["instruction"], record["input"])))
        prompt = tokenizer(as_prompt(tokenizer, question), add_special_tokens=False).input_ids
        answer = tokenizer(record["output"], add_special_tokens=False).input_ids
        answer = [*answer, tokenizer.eos_token_id]
        examples.append({"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer})
    return examples


def train(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, lesson: Lesson, device: str, out: Path
) -> float:
    """Train the active adapter with transformers' Trainer; returns the last loss."""
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        max_steps=lesson.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        logging_steps=lesson.steps // 2,
        save_strategy="no",
        report_to="none",
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=read_examples(DATA / lesson.data, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
    )
    trainer.train()
    model.eval()
    return trainer.state.log_history[-2]["loss"]


@torch.no_grad()
def answer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, questions: list[str], adapters: list[str]
) -> list[str]:
    """Answer one batch in which every row names its own adapter (peft's mixed batch)."""
    prompts = [as_prompt(tokenizer, question) for question in questions]
    batch = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
    tokens = model.generate(
        **batch.to(model.device),
        adapter_names=adapters,
        max_new_tokens=32,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    new_tokens = tokens[:, batch.input_ids.shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]


@torch.no_grad()
def next_token_logits(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, lesson: Lesson
) -> Tensor:
    """Return the lesson's logits after each held-out question: ``[4, vocabulary]``."""
    model.set_adapter(lesson.adapter)
    model.eval()
    prompts = [as_prompt(tokenizer, question) for question in lesson.questions]
    batch = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
    return model(**batch.to(model.device)).logits[:, -1].float()


def check_in_plain_peft(
    patched: PeftModel, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path
) -> Iterable[str]:
    """Load the saved adapters into a model that fastlora never touched and compare the logits."""
    first, *others = LESSONS
    plain = PeftModel.from_pretrained(base, out / first.adapter, adapter_name=first.adapter)
    for lesson in others:
        plain.load_adapter(out / lesson.adapter, adapter_name=lesson.adapter)
    # bf16 has 8 bits of precision: logits of about 20 can differ by a few of its steps of 1/8, and
    # two tokens that are as close as that may change places.
    exact = base.dtype == torch.float32
    allowed = 1e-4 if exact else 0.5
    for lesson in LESSONS:
        ours = next_token_logits(patched, tokenizer, lesson)
        theirs = next_token_logits(plain, tokenizer, lesson)
        difference = (ours - theirs).abs().max().item()
        print(f"{lesson.adapter}: logits of patched and plain peft differ by {difference:.1e}")
        if not difference <= allowed:
            yield f"{lesson.adapter}: logits differ from plain peft by {difference} > {allowed}"
        if exact and not torch.equal(ours.argmax(-1), theirs.argmax(-1)):
            yield f"{lesson.adapter}: patched and plain peft choose different tokens"


def check_answers(answers: dict[str, dict[str, str]]) -> Iterable[str]:
    """Check that each adapter has learned its lesson and that the base model has not."""
    for lesson in LESSONS:
        for adapter, is_wanted in ((lesson.adapter, True), (BASE, False)):
            texts = [answers[question][adapter] for question in lesson.questions]
            count = sum(lesson.learned(text) for text in texts)
            if is_wanted and count < REQUIRED:
                yield f"{adapter}: {count} of {len(texts)} answers as trained, {REQUIRED} expected"
            if not is_wanted and count:
                yield f"the base model gave {count} answers that only {lesson.adapter} should give"


def print_answers(answers: dict[str, dict[str, str]]) -> None:
    table = Table(title="one batch, three behaviours", show_lines=True)
    for heading in ("question", "base", *ADAPTERS):
        table.add_column(heading, overflow="fold")
    for question, row in answers.items():
        table.add_row(question, *(row[name] for name in (BASE, *ADAPTERS)))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def peak_memory(device: str) -> str:
    if device == "cpu":
        # ru_maxrss is in KiB on Linux and in bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    else:
        used = torch.cuda.max_memory_allocated(device)
    return f"{used / 2**30:.2f} GiB at most"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a hub id or folder (default: the packaged SmolLM2-135M)")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to train and answer (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="output folder")
    parser.add_argument("--seed", type=int, default=0, help="of training (default: %(default)s)")
    options = parser.parse_args()

    start = time.monotonic()
    set_seed(options.seed)
    base, tokenizer = load_base(options.model, options.device)

    untouched = copy.deepcopy(base)

    # Train: an ordinary peft model and an ordinary Trainer, and one line of fastlora between them.
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear")
    model = get_peft_model(base, config, adapter_name=LESSONS[0].adapter)
    print(fastlora.patch(model))
    for lesson in LESSONS:
        if lesson.adapter not in model.peft_config:
            model.add_adapter(lesson.adapter, config)
        model.set_adapter(lesson.adapter)
        print(f"training {lesson.adapter} on {lesson.data}")
        loss = train(model, tokenizer, lesson, options.device, options.out)
        print(f"trained {lesson.adapter}: loss {loss:.3f}")
    model.save_pretrained(options.out)  # one folder for each adapter

    # Use both adapters, and none, in the rows of the same batch.
    questions = [question for lesson in LESSONS for question in lesson.questions]
    adapters = [BASE, *ADAPTERS]
    rows = [(question, adapter) for question in questions for adapter in adapters]
    texts = answer(model, tokenizer, *(list(column) for column in zip(*rows, strict=True)))
    answers: dict[str, dict[str, str]] = {question: {} for question in questions}
    for (question, adapter), text in zip(rows, texts, strict=True):
        answers[question][adapter] = text
    print_answers(answers)

    problems = [
        *check_answers(answers),
        *check_in_plain_peft(model, untouched, tokenizer, options.out),
    ]
    print(
        f"adapters saved under {options.out}; {time.monotonic() - start:.0f} s, "
        f"{peak_memory(options.device)}"
    )
    if problems:
        sys.exit("quickstart failed:\n  " + "\n  ".join(problems))
    print("all checks passed")


if __name__ == "__main__":
    main()
