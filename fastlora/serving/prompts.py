"""What a prompt may be, and its token ids."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class PromptEncoder:
    """Makes token ids of prompts.

    Args:
        tokens: that the model knows.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        # A tokenizer, and the copy of it that is used: the fast ones keep truncation and padding
        # of the last call, which may be anybody's, in another thread. Copied anew when tokens were
        # added.
        self._copied: tuple[Any, Any] = (None, None)

    def encode(self, prompt: Any, tokenizer: Any, template: Mapping[str, Any]) -> list[int]:
        """Return a prompt's token ids.

        Args:
            prompt: a string, chat messages or token ids.
            tokenizer: for strings and messages, or ``None``.
            template: what ``apply_chat_template`` is told besides.

        Raises:
            ValueError: it is none of these, has no tokens, or some that the model does not know.
        """
        if isinstance(prompt, str):
            found = self._encoder(tokenizer, "a string")(prompt)["input_ids"]
        elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            settings = {"add_generation_prompt": True, **template}
            found = self._encoder(tokenizer, "chat messages").apply_chat_template(
                list(prompt), tokenize=True, return_dict=True, **settings
            )["input_ids"]
        else:
            found = prompt
        try:
            tokens = list(map(operator.index, found))
        except TypeError:
            raise ValueError(
                "a prompt is a string, a list of token ids or a list of chat messages, not "
                f"{prompt!r:.100}"
            ) from None
        if not tokens:
            raise ValueError("a prompt has no tokens")
        if min(tokens) < 0 or max(tokens) >= self._tokens:
            wrong = next(token for token in tokens if not 0 <= token < self._tokens)
            raise ValueError(f"a prompt has the token {wrong}, and the vocabulary {self._tokens}")
        return tokens

    def _encoder(self, tokenizer: Any, what: str) -> Any:
        if tokenizer is None:
            raise ValueError(
                f"a prompt is {what}, and the engine has no tokenizer: give token ids, or "
                "Engine(..., tokenizer=...)"
            )
        original, copied = self._copied
        if original is not tokenizer or len(copied) != len(tokenizer):
            copied = copy.deepcopy(tokenizer)
            self._copied = (tokenizer, copied)
        copied.chat_template = tokenizer.chat_template
        return copied


def as_prompts(prompts: Any) -> list[Any]:
    """Return a list of prompts, also of one alone, and of what a tokenizer has returned.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping):
        return [[prompts]] if "role" in prompts else _encoded(prompts)
    if hasattr(prompts, "tolist"):  # a tensor or an array
        prompts = prompts.tolist()
    if not isinstance(prompts, Iterable):
        raise ValueError(f"a prompt, or a list of them, is needed, not {prompts!r:.100}")
    prompts = list(prompts)
    if prompts and (_is_token(prompts[0]) or _is_message(prompts[0])):
        return [prompts]
    found: list[Any] = []
    for prompt in prompts:
        found += _encoded(prompt) if isinstance(prompt, Mapping) else [prompt]
    return found


def _is_token(value: Any) -> bool:
    """Return whether something is a number, also numpy's or torch's, and no list of them."""
    return hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value


def _encoded(encoding: Mapping[str, Any]) -> list[list[int]]:
    """Return the prompts of a ``BatchEncoding``, without what they were padded with."""
    if "input_ids" not in encoding:
        raise ValueError(
            "a prompt is a string, a list of token ids or a list of chat messages, not a mapping "
            f"with {', '.join(map(repr, list(encoding)[:5])) or 'nothing'}"
        )
    rows, masks = (_as_lists(encoding.get(name)) for name in ("input_ids", "attention_mask"))
    if not masks:
        return rows
    return [
        [token for token, is_there in zip(row, mask, strict=True) if is_there]
        for row, mask in zip(rows, masks, strict=True)
    ]


def _as_lists(values: Any) -> list[list[int]]:
    """Return rows of numbers, also of one row or none."""
    found = values.tolist() if hasattr(values, "tolist") else list(values or ())
    return [found] if found and isinstance(found[0], int) else found
