"""``stop_strings``: where an answer has come to one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Tokens that are decoded beyond as many as a stop string has bytes: the first of them may be a part
# of a character, or lose its space.
_MORE = 4


@dataclass(frozen=True)
class StopStrings:
    """Strings that end an answer, which keeps the one that it has come to.

    Attributes:
        strings: not empty, none of them empty.
        decode: returns the text of token ids.
        without_text: special tokens, which are no part of the text.
    """

    strings: tuple[str, ...]
    decode: Callable[[list[int]], str]
    without_text: frozenset[int] = frozenset()

    def end_of(self, tokens: Sequence[int], known: int = 0) -> int | None:
        """Return how many tokens an answer has when it has come to one; ``None``: it has not yet.

        Args:
            tokens: of the answer.
            known: how many of them are known not to be enough.
        """
        width = max(len(string.encode()) for string in self.strings) + _MORE
        window: list[int] = []  # the last tokens with a text: each has a byte at least
        for token in reversed(tokens[:known]):
            if len(window) == width:
                break
            if token not in self.without_text:
                window.insert(0, token)
        for end, token in enumerate(tokens[known:], known + 1):
            if token in self.without_text:
                continue
            window = [*window[-width + 1 :], token]
            text = self.decode(window)
            if any(string in text for string in self.strings):
                return end
        return None
