"""Train a LoRA adapter of a Qwen model, fused, with transformers' Trainer or TRL's SFTTrainer.

    python examples/train_qwen.py                                    a tiny random model, no hub
    python examples/train_qwen.py --trainer sft                      with TRL (pip install trl)
    python examples/train_qwen.py --model Qwen/Qwen2.5-0.5B-Instruct --data my.jsonl --steps 200
    accelerate launch --num_processes 8 examples/train_qwen.py --model Qwen/Qwen3-8B

The data are JSON lines with ``instruction``, ``input`` and ``output``; the loss is on the output
alone. What is written is an ordinary peft adapter.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

import fastlora

DATA = Path(__file__).parent / "data" / "emoji.jsonl"
IGNORED = -100  # a label that the loss leaves out
CHAT_TEMPLATE = (  # Qwen's, without its system message and its tools
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Record = dict[str, list[dict[str, str]]]


def read_chats(path: Path) -> list[Record]:
    """Read the data as pairs of a prompt and its completion, each a list of chat messages."""
    chats = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        question = "\n".join(filter(None, (record["instruction"], record.get("input"))))
        chats.append(
            {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": record["output"]}],
            }
        )
    return chats


def tiny_tokenizer(chats: list[Record]) -> PreTrainedTokenizerBase:
    """Build a tokenizer with one token for each character of the data."""
    special = ["<|unknown|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.WordLevel(unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    texts = [message["content"] for chat in chats for part in chat.values() for message in part]
    trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*texts, "user\nassistant"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=special[0],
        pad_token=special[1],
        eos_token=special[3],
        chat_template=CHAT_TEMPLATE,
    )


def load(name: str | None, chats: list[Record]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a hub id or a folder; without one, make a tiny random Qwen2 that knows the data."""
    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name)
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16), tokenizer
    tokenizer = tiny_tokenizer(chats)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,  # at 0.02 so small a model has nothing that an adapter could steer
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config), tokenizer


def tokenize(chats: list[Record], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """Turn chats into token ids and labels, for transformers' Trainer (TRL does it by itself)."""
    rows = []
    for chat in chats:
        prompt = tokenizer.apply_chat_template(
            chat["prompt"], add_generation_prompt=True, tokenize=False
        )
        whole = tokenizer.apply_chat_template(chat["prompt"] + chat["completion"], tokenize=False)
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        ids = tokenizer(whole, add_special_tokens=False).input_ids
        labels = [IGNORED] * len(prompt_ids) + ids[len(prompt_ids) :]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def make_trainer(options: argparse.Namespace) -> Trainer:
    """Build either trainer around the same model, data and adapter."""
    chats = read_chats(options.data)
    model, tokenizer = load(options.model, chats)
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    settings = {
        "output_dir": str(options.out / "trainer"),
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "logging_steps": max(1, options.steps // 4),
        "save_strategy": "no",
        "report_to": "none",
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,  # or DDP looks for them at each step
        "seed": options.seed,
    }
    if options.trainer == "sft":
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        # TRL builds the peft model itself, so it is patched when training begins.
        return SFTTrainer(
            model=model,
            args=SFTConfig(**settings),
            train_dataset=Dataset.from_list(chats),
            processing_class=tokenizer,
            peft_config=config,
            callbacks=[fastlora.FastLoRACallback(verbose=False)],
        )
    model = get_peft_model(model, config)
    fastlora.patch(model)
    return Trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=tokenize(chats, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--trainer",
        choices=("transformers", "sft"),
        default="transformers",
        help="whose trainer (default: %(default)s)",
    )
    parser.add_argument("--model", help="a hub id or folder (default: a tiny random Qwen2)")
    parser.add_argument("--data", type=Path, default=DATA, help="JSON lines (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/train_qwen"), help="output folder")
    parser.add_argument("--steps", type=int, default=40, help="default: %(default)s")
    parser.add_argument(
        "--batch-size", type=int, default=4, help="of each process (default: %(default)s)"
    )
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args()

    set_seed(options.seed)
    trainer = make_trainer(options)
    trainer.train()
    trainer.save_model(str(options.out))
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(fastlora.explain(trainer.model))
        count = trainer.args.world_size
        print(
            f"loss {losses[0]:.3f} -> {losses[-1]:.3f} on {count} process{'es' * (count > 1)}; "
            f"adapter saved under {options.out}"
        )
    if torch.distributed.is_initialized():
        # Wait for the first process to save. gloo (torch 2.13) can also hang if it is destroyed
        # within milliseconds of its last collective: its thread and this one wait for each other.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
