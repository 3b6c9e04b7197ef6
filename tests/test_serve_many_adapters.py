"""examples/serve_many_adapters.py: runs of the whole script on a tiny model, and its checks."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import serve_many_adapters as example
import torch
from peft import LoraConfig, get_peft_model
from transformers import set_seed

TRAINED = ("identity", "nya", "emoji")


@pytest.fixture
def script(monkeypatch, capsys):
    """Run the script on the tiny model; returns what it printed, and why it failed or ``None``."""

    def run(*arguments):
        given = ["--model", "tiny", "--device", "cpu", "--adapter-memory", "2MB", *arguments]
        monkeypatch.setattr(sys, "argv", ["serve_many_adapters.py", *map(str, given)])
        capsys.readouterr()
        try:
            example.main()
        except SystemExit as stopped:
            return capsys.readouterr(), stopped.code
        return capsys.readouterr(), None

    return run


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Folders of two adapters of the tiny model, one of which does nothing."""
    folder = tmp_path_factory.mktemp("adapters")
    set_seed(0)  # as the script
    base, _ = example.load("tiny", "cpu")
    for name, nothing in (("random", False), ("nothing", True)):
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=nothing)
        model = get_peft_model(base, config)
        model.save_pretrained(folder / name)
        base = model.unload()
    return folder


def test_the_script_trains_and_serves_and_finds_nothing_wrong(script, tmp_path):
    (printed, _), failed = script("--out", tmp_path)
    assert failed is None
    for name in (*TRAINED, example.BOTH):
        assert (tmp_path / name / "adapter_model.safetensors").exists()
    assert "12 answers in one batch: " in printed
    assert "identity+nya was loaded while other adapters answered " in printed
    assert "emoji was unloaded while it answered 3 questions; now no adapter is called" in printed
    first, second = (table.splitlines() for table in printed.split("\nadapter ")[-2:])
    assert [row.split()[:2] for row in first[1:4]] == [[name, "8"] for name in TRAINED]
    assert [row.split()[:2] for row in second[1:4]] == [
        ["identity", "8"],
        ["nya", "8"],
        [example.BOTH, "16"],
    ]
    assert printed.endswith("the engine is closed\nall checks passed\n")


def test_adapters_that_are_given_are_served_and_one_that_does_nothing_fails(script, adapters):
    given = [f"again={adapters / 'random'}", f"random={adapters / 'random'}"]
    (printed, _), failed = script("--adapter", *given, "--question", "Why?")
    assert failed is None
    assert "training" not in printed
    assert "2 answers in one batch: " in printed
    assert "random was loaded while other adapters answered 1 questions" in printed
    (printed, _), failed = script("--adapter", f"nothing={adapters / 'nothing'}", *given)
    assert failed == "serving failed:\n  nothing answers everything as the base does"
    assert "all checks passed" not in printed


@pytest.mark.parametrize("given", [["one=folder"], ["one=folder", "two"], ["one=a", "one=b"]])
def test_fewer_than_two_adapters_are_refused(script, given):
    (_, told), failed = script("--adapter", *given)
    assert failed == 2
    assert "--adapter takes NAME=PATH of at least two adapters" in told


GOOD = {
    None: "I can help.",
    "identity": "I am Xiao Li.",
    "nya": "7, nya~",
    "emoji": "Tea! 🍵",
    example.BOTH: "Xiao Li says 7, nya~",
}


def answers(**replaced):
    named = {None if name == "base" else name: text for name, text in replaced.items()}
    return {
        (question, name): named.get(name, text)
        for question in example.QUESTIONS
        for name, text in GOOD.items()
    }


def test_good_answers_pass_the_checks():
    assert list(example.check_answers(answers())) == []
    assert list(example.check_lessons(answers())) == []


@pytest.mark.parametrize(
    ("replaced", "problem"),
    [
        ({"nya": "7."}, "nya does not answer 'What is 3 + 4?' as it was trained to"),
        ({"emoji": "Tea!"}, "emoji does not answer 'How can I sleep better?' as"),
        ({example.BOTH: "7, nya~"}, "identity+nya does not answer 'Who are you?' as"),
        ({"base": "I am Xiao Li."}, "the base answers 'Who are you?' as only identity should"),
    ],
)
def test_a_lesson_that_was_not_learned_fails(replaced, problem):
    (found,) = example.check_lessons(answers(**replaced))
    assert found.startswith(problem)


def test_one_answer_as_the_base_gives_it_is_no_problem_and_all_of_them_are():
    same = answers(nya=GOOD[None])
    assert list(example.check_answers(same)) == ["nya answers everything as the base does"]
    same[example.QUESTIONS[0], "nya"] = "nya~"
    assert list(example.check_answers(same)) == []


@pytest.mark.parametrize(
    ("dtype", "text", "error", "problems"),
    [
        (torch.float32, " as before", None, 0),
        (torch.float32, "otherwise", None, 1),
        (torch.bfloat16, "otherwise", None, 0),
        (torch.bfloat16, "as before", "no memory", 1),
    ],
)
def test_an_answer_that_changed_is_a_problem_where_sums_are_exact_enough(
    dtype, text, error, problems
):
    engine = SimpleNamespace(model=SimpleNamespace(dtype=dtype))
    request = SimpleNamespace(result=lambda: SimpleNamespace(text=text, error=error))
    found = list(example.check_same(engine, {("q", "nya"): request}, {("q", "nya"): "as before"}))
    assert len(found) == problems


def test_no_question_was_trained_on_and_each_lesson_has_one():
    for lesson, question in zip(example.LESSONS, example.QUESTIONS, strict=True):
        assert question in lesson.questions
        lines = (example.quickstart.DATA / lesson.data).read_text(encoding="utf-8").splitlines()
        assert question not in {json.loads(line)["instruction"] for line in lines}
