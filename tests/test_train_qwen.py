"""examples/train_qwen.py: its data, and one run in this process and in two that accelerate starts.

Its run with TRL is in ``test_trl.py``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import train_qwen
from peft import PeftModel
from transformers import set_seed

SCRIPT = Path(train_qwen.__file__)
CHATS = train_qwen.read_chats(train_qwen.DATA)


def first_and_last_loss(output: str) -> tuple[float, float]:
    first, last = re.search(r"^loss ([\d.]+) -> ([\d.]+) on", output, re.M).groups()
    return float(first), float(last)


def test_loss_is_on_the_answer_alone() -> None:
    tokenizer = train_qwen.tiny_tokenizer(CHATS)
    rows = train_qwen.tokenize(CHATS, tokenizer)
    assert len(rows) == len(CHATS) == 60
    for chat, row in zip(CHATS, rows, strict=True):
        assert tokenizer.unk_token_id not in row["input_ids"]
        labels = [label for label in row["labels"] if label != train_qwen.IGNORED]
        assert row["input_ids"][-len(labels) :] == labels
        answer = chat["completion"][0]["content"]
        assert tokenizer.decode(labels) == f"{answer}<|im_end|>\n"


def test_script_trains_an_adapter_that_plain_peft_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_qwen.py", "--out", str(tmp_path)])
    train_qwen.main()
    output = capsys.readouterr().out
    assert "fused 14 of 14 LoRA linears in 4 groups; 0 fall back" in output
    first, last = first_and_last_loss(output)
    assert last < 0.8 * first
    set_seed(0)  # the tiny model is random, and the script made it with this seed
    model, _ = train_qwen.load(None, CHATS)
    plain = PeftModel.from_pretrained(model, tmp_path)
    adapters = [p for name, p in plain.named_parameters() if "lora_B" in name]
    assert len(adapters) == 14
    assert all(p.any() for p in adapters)


def test_accelerate_launches_the_script_in_two_processes(tmp_path: Path) -> None:
    # On a CPU `accelerate launch --cpu` starts one process however many are asked for;
    # --multi_gpu starts them all, and the script, finding no GPU, trains on the CPU.
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
    options = "--mixed_precision no --dynamo_backend no --main_process_port 0"
    script = f"{SCRIPT} --steps 4 --out {tmp_path}"
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    result = subprocess.run(
        [sys.executable, *f"{launch} {options} {script}".split()],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    # The first process alone reports.
    assert result.stdout.count("fused 14 of 14 LoRA linears in 4 groups; 0 fall back") == 1
    assert "on 2 processes" in result.stdout
    first, last = first_and_last_loss(result.stdout)
    assert last < first
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert "find_unused_parameters" not in result.stderr


def test_help_names_every_option(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train_qwen.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        train_qwen.main()
    assert stopped.value.code == 0
    output = capsys.readouterr().out
    assert all(
        option in output for option in ("--trainer", "--model", "--data", "accelerate launch")
    )
