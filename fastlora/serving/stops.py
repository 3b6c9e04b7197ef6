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
    """

    strings: tuple[str, ...]
    decode: Callable[[list[int]], str]

    def end_of(self, tokens: Sequence[int], known: int = 0) -> int | None:
        """Return how many tokens an answer has when it has come to one; ``None``: it has not yet.

        Args:
            tokens: of the answer.
            known: how many of them are known not to be enough.
        """
        width = max(len(string.encode()) for string in self.strings) + _MORE
        for end in range(known + 1, len(tokens) + 1):
            text = self.decode(list(tokens[max(0, end - width) : end]))
            if any(string in text for string in self.strings):
                return end
        return None
