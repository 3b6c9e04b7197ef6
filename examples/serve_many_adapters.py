"""Serve one model with many LoRA adapters: each prompt of a batch has its own, or none.

    python examples/serve_many_adapters.py                    trains three adapters first, no hub
    python examples/serve_many_adapters.py --model tiny       a tiny random model: seconds
    python examples/serve_many_adapters.py --model Qwen/Qwen2.5-0.5B-Instruct \\
        --adapter emoji=path/to/emoji nya=path/to/nya         adapters that you have

Without ``--adapter``, *identity* and *nya* are trained as in the quickstart, *emoji* likewise, and
*identity+nya* is made of the first two. All but the last are there from the start; the last one is
loaded while requests run, and then another is unloaded. The script ends with an error unless all
of it worked.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import quickstart
import torch
import train_qwen
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

import fastlora
from fastlora.serving.requests import Request

QUESTIONS = ("Who are you?", "What is 3 + 4?", "How can I sleep better?")
BOTH = "identity+nya"
NEW_TOKENS = 32
EMOJI = quickstart.Lesson(
    adapter="emoji",
    data="emoji.jsonl",
    steps=8,
    questions=QUESTIONS[2:],
    signs=tuple(
        {c for c in (quickstart.DATA / "emoji.jsonl").read_text("utf-8") if ord(c) > 0x1F000}
    ),
)
LESSONS = (*quickstart.LESSONS, EMOJI)

Row = tuple[str, str | None]  # a question, and who is asked: an adapter, or the base
Answers = dict[Row, str]


def load(name: str | None, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the packaged model, a hub id or folder, or make the tiny one."""
    if name != "tiny":
        return quickstart.load_base(name, device)
    chats = [
        chat for each in LESSONS for chat in train_qwen.read_chats(quickstart.DATA / each.data)
    ]
    model, tokenizer = train_qwen.load(None, chats)
    return model.to(device), tokenizer


def train(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: str, out: Path
) -> dict[str, str]:
    """Train an adapter for each lesson and join two of them; returns their folders."""
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear")
    model = get_peft_model(base, config, adapter_name=LESSONS[0].adapter)
    fastlora.patch(model)
    for lesson in LESSONS:
        if lesson.adapter not in model.peft_config:
            model.add_adapter(lesson.adapter, config)
        model.set_adapter(lesson.adapter)
        print(f"training {lesson.adapter} on {lesson.data}")
        loss = quickstart.train(model, tokenizer, lesson, device, out)
        print(f"trained {lesson.adapter}: loss {loss:.3f}")
    model.add_weighted_adapter(BOTH.split("+"), [1.0, 1.0], BOTH, combination_type="cat")
    model.save_pretrained(out)
    # An engine takes the base model as it was.
    fastlora.unpatch(model)
    model.unload()
    return {name: str(out / name) for name in model.peft_config}


def begin(
    engine: fastlora.Engine, question: str, adapter: str | None, stream: bool = False
) -> Request:
    """Begin to answer a question, greedily."""
    return engine.submit(
        [{"role": "user", "content": question}],
        adapter,
        stream=stream,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )


def answer_all(engine: fastlora.Engine, questions: Iterable[str]) -> Answers:
    """Answer every question by the base and by every adapter, all in one batch."""
    rows = [(question, name) for question in questions for name in (None, *engine.adapters)]
    start = time.monotonic()
    results = engine.generate(
        [[{"role": "user", "content": question}] for question, _ in rows],
        [name for _, name in rows],
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    tokens = sum(len(result.token_ids) for result in results)
    seconds = time.monotonic() - start
    print(f"{len(rows)} answers in one batch: {tokens} tokens in {seconds:.1f} s")
    return {row: result.text.strip() for row, result in zip(rows, results, strict=True)}


def print_answers(answers: Answers) -> None:
    names = list(dict.fromkeys(name for _, name in answers))
    table = Table(show_lines=True)
    for heading in ("question", *(name or "base" for name in names)):
        table.add_column(heading, overflow="fold")
    for question in dict.fromkeys(question for question, _ in answers):
        table.add_row(question, *(escape(answers[question, name]) for name in names))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def check_answers(answers: Answers) -> Iterable[str]:
    """Check that every adapter says something else than the base."""
    base = {question: text for (question, name), text in answers.items() if name is None}
    for name in dict.fromkeys(name for _, name in answers if name is not None):
        if all(answers[question, name] == text for question, text in base.items()):
            yield f"{name} answers everything as the base does"


def check_lessons(answers: Answers) -> Iterable[str]:
    """Check that an adapter that was trained here has learned its lesson, and the base has not."""
    for lesson in LESSONS:
        for question in set(lesson.questions) & set(QUESTIONS):
            for name in (name for asked, name in answers if asked == question):
                learned = lesson.learned(answers[question, name])
                if name is None and learned:
                    yield f"the base answers {question!r} as only {lesson.adapter} should"
                if name is not None and lesson.adapter in name.split("+") and not learned:
                    yield f"{name} does not answer {question!r} as it was trained to"


def check_same(
    engine: fastlora.Engine, requests: Mapping[Row, Request], before: Answers
) -> Iterable[str]:
    """Wait for requests, and check that each is answered as it was before."""
    # In bf16 a batch of another size may decide between two close tokens the other way.
    exact = engine.model.dtype == torch.float32
    for row, request in requests.items():
        result = request.result()
        if result.error is not None:
            yield f"{row}: {result.error}"
        elif exact and result.text.strip() != before[row]:
            yield f"{row}: answered {result.text!r}, and before {before[row]!r}"


def load_while_running(
    engine: fastlora.Engine, before: Answers, name: str, source: str
) -> tuple[Answers, list[str]]:
    """Ask everything again, load an adapter meanwhile, and ask it too."""
    running = {row: begin(engine, *row, stream=True) for row in before}
    next(iter(running[next(iter(running))]))  # the first piece of an answer: they run
    engine.adapters.load(name, source)
    count = sum(info.requests for info in engine.adapters.list())
    asked = {(question, name): None for question, _ in before}
    new = {row: begin(engine, *row) for row in asked}
    print(f"{name} was loaded while other adapters answered {count} questions:")
    problems = list(check_same(engine, running, before))
    if count == 0:
        problems.append(f"nothing ran any more when {name} was loaded")
    return {row: request.result().text.strip() for row, request in new.items()}, problems


def unload_while_running(engine: fastlora.Engine, before: Answers, name: str) -> Iterable[str]:
    """Unload an adapter that answers, and ask it once more."""
    running = {row: begin(engine, *row) for row in before if row[1] == name}
    engine.adapters.unload(name)
    try:
        begin(engine, next(iter(running))[0], name)
        yield f"{name} was unloaded and still takes questions"
    except KeyError as error:
        print(
            f"{name} was unloaded while it answered {len(running)} questions; now {error.args[0]}"
        )
    yield from check_same(engine, running, before)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="a hub id or folder, or `tiny` (default: the packaged SmolLM2-135M)"
    )
    parser.add_argument(
        "--adapter",
        nargs="+",
        action="extend",
        metavar="NAME=PATH",
        help="two or more trained adapters of that model, instead of training",
    )
    parser.add_argument(
        "--question", nargs="+", default=QUESTIONS, help="what all of them are asked"
    )
    parser.add_argument(
        "--adapter-memory",
        default="512MB",
        help="of the device for adapters (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to train and answer (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/serve_many_adapters"), help="output folder"
    )
    parser.add_argument("--seed", type=int, default=0, help="of training (default: %(default)s)")
    options = parser.parse_args()
    adapters = dict(each.partition("=")[::2] for each in options.adapter or ())
    if options.adapter and (len(adapters) < 2 or "" in adapters.values()):
        parser.error("--adapter takes NAME=PATH of at least two adapters")

    set_seed(options.seed)
    base, tokenizer = load(options.model, options.device)
    adapters = adapters or train(base, tokenizer, options.device, options.out)
    *first, last = adapters

    with fastlora.Engine(
        base,
        {name: adapters[name] for name in first},
        tokenizer=tokenizer,
        adapter_memory=options.adapter_memory,
    ) as engine:
        answers = answer_all(engine, options.question)
        print_answers(answers)
        print(engine.adapters)
        new, changed = load_while_running(engine, answers, last, adapters[last])
        print_answers(new)
        changed += unload_while_running(engine, answers, first[-1])
        print(engine.adapters)
        answers |= new
        problems = [*check_answers(answers), *changed]
        if options.model != "tiny" and not options.adapter:
            problems += check_lessons(answers)
    print("the engine is closed")
    if problems:
        sys.exit("serving failed:\n  " + "\n  ".join(problems))
    print("all checks passed")


if __name__ == "__main__":
    main()
