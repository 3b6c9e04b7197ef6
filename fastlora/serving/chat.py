"""``fastlora chat``: talk to a base model and its adapters, in a terminal or through a pipe.

An answer is written as it comes. It is the active adapter's (``engine.adapters.active``): what the
prompt shows, what ``/use`` and ``/base`` change, and what ``/list`` marks. Through a pipe each line
is a question or a command as well, without a prompt: stdout has the answers and what commands show,
stderr what went wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import itertools
import re
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from fastlora.serving.engine import Engine

# Command: what it takes, and what it does. /name calls Chat._name.
COMMANDS: Final = {
    "use": ("NAME", "let an adapter answer from now on"),
    "base": ("", "let the base model answer from now on"),
    "compare": ("[QUESTION]", "ask the base and all adapters, or ask the last question again"),
    "load": ("NAME PATH", "load an adapter from a folder or the hub, or a new version of one"),
    "unload": ("NAME", "forget an adapter"),
    "list": ("", "show the adapters, their size and place"),
    "clear": ("", "forget the conversation"),
    "help": ("", "show this"),
    "quit": ("", "end the chat; so does the end of file"),
}
_BASE = "base"
_USER, _ASSISTANT = "User:", "Assistant:"  # of turns where there is no chat template
_LEAST_COLUMN = (
    24  # of an answer beside others; where they are narrower, answers stand one below another
)


class Chat:
    """A conversation with an engine, and the commands that steer it.

    Args:
        engine: with a tokenizer.
        system: the system message, empty for none.
        **options: of generation, for every answer; see ``Engine.generate``.
    """

    def __init__(self, engine: Engine, system: str = "", **options: Any) -> None:
        self.engine = engine
        self.turns: list[dict[str, str]] = []
        self._start = [{"role": "system", "content": system}] if system else []
        self._options = options
        self._question = ""
        self._has_template = bool(getattr(engine.tokenizer, "chat_template", None))
        if not self._has_template:
            self._options["stop_strings"] = f"\n{_USER}"

    @property
    def prompt(self) -> str:
        """What a terminal shows before a line: who answers it."""
        return f"{self.engine.adapters.active or _BASE}> "

    def talk(self, lines: Iterable[str]) -> None:
        """Answer lines, and do what commands among them say, until ``/quit`` or their end."""
        if not self._has_template:
            _tell(f"the model has no chat template: it reads plain turns, {_USER} and {_ASSISTANT}")
        for line in map(str.strip, lines):
            if line in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/"):
                    self._command(line[1:])
                elif line:
                    self._ask(line)
            except KeyboardInterrupt:
                _tell("(stopped)")
            except BrokenPipeError:
                raise
            except Exception as error:  # of this line alone: a file, the hub, a chat template, ...
                _tell(told(error))

    def _command(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word not in COMMANDS:
            close = difflib.get_close_matches(word, COMMANDS, 1)
            hint = f" (did you mean /{close[0]}?)" if close else ""
            raise ValueError(f"there is no /{word}{hint}; there are /{', /'.join(COMMANDS)}")
        takes = COMMANDS[word][0]
        count = len(takes.split())
        given = rest.split(maxsplit=max(count - 1, 0))
        if len(given) != count and (given or not takes.startswith("[")):
            raise ValueError(f"it is /{word} {takes}".rstrip())
        getattr(self, f"_{word}")(*given)

    def _ask(self, question: str) -> None:
        self._question = question
        turns = [*self.turns, {"role": "user", "content": question}]
        # Without an answer the question is forgotten too: templates want turns to alternate.
        if answer := self._write_answer(turns):
            self.turns = [*turns, {"role": "assistant", "content": answer}]

    def _write_answer(self, turns: list[dict[str, str]]) -> str:
        """Write the active adapter's answer as it comes, and return it."""
        adapter = self.engine.adapters.active
        request = self.engine.submit(self._input(turns), adapter, stream=True, **self._options)
        answer = ""
        try:
            for piece in request if self._has_template else _up_to(f"\n{_USER}", request):
                shown = piece if answer else piece.lstrip()
                print(shown, end="", flush=True)
                answer += shown
        except KeyboardInterrupt:
            print(flush=True)
            _tell("(stopped)")
            return answer
        except RuntimeError:
            print(flush=True)
            raise
        finally:
            request.cancel()  # nothing, if it is over
        print(flush=True)
        result = request.result()
        if result.finish_reason == "length":
            _tell(f"(cut off after {len(result.token_ids)} tokens)")
        return answer

    def _input(self, turns: list[dict[str, str]]) -> Any:
        """Return what the engine takes as a prompt: messages, or the text of plain turns."""
        messages = [*self._start, *turns]
        if self._has_template:
            return messages
        begin = {"system": "", "user": f"{_USER} ", "assistant": f"{_ASSISTANT} "}
        return "\n".join([*(begin[m["role"]] + m["content"] for m in messages), _ASSISTANT])

    # The commands.

    def _use(self, name: str) -> None:
        self.engine.adapters.activate(name)

    def _base(self) -> None:
        self.engine.adapters.deactivate()

    def _compare(self, question: str = "") -> None:
        self._question = question or self._question
        if not self._question:
            raise ValueError("there is no question yet: it is /compare QUESTION")
        prompt = self._input([{"role": "user", "content": self._question}])
        names = [None, *self.engine.adapters]
        results = self.engine.generate(
            [prompt] * len(names), names, progress=False, **self._options
        )
        answers = {}
        for name, result in zip(names, results, strict=True):
            text = result.text if self._has_template else result.text.partition(f"\n{_USER}")[0]
            answers[name or _BASE] = text.strip() if result.error is None else result.error
        # In a pipe, which has no columns, the answers stand one below another.
        width = shutil.get_terminal_size(fallback=(0, 0)).columns
        print(side_by_side(answers, width), flush=True)

    def _load(self, name: str, path: str) -> None:
        info = self.engine.adapters.load(name, path)
        print(f"{name} is loaded: rank {info.rank}, {info.targets}; /use {name}", flush=True)

    def _unload(self, name: str) -> None:
        if name == self.engine.adapters.active:
            raise ValueError(f"{name} answers now: /base first, or /use another")
        self.engine.adapters.unload(name)

    def _list(self) -> None:
        print(self.engine.adapters, flush=True)

    def _clear(self) -> None:
        self.turns = []

    def _help(self) -> None:
        for name, (takes, does) in COMMANDS.items():
            print(f"{f'/{name} {takes}':20}  {does}")
        print("any other line is a question; Ctrl-C stops an answer", flush=True)


def run(options: argparse.Namespace) -> int:
    """Run ``fastlora chat`` with the options of ``cli``, and return its exit status.

    Raises:
        ValueError: an option, the model or an adapter cannot be used; in one line.
        RuntimeError: likewise.
    """
    import torch

    from fastlora.serving import batching
    from fastlora.serving.engine import Engine

    adapters = _named_paths(options.adapter)
    generation = _generation(options)
    if torch.device(options.device or "cpu").type == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device (torch.cuda.is_available() is False)")
    if reason := batching.unsupported_reason():
        raise RuntimeError(f"{reason}: a chat streams, which needs that one")
    try:
        engine = Engine(
            options.model,
            adapters,
            adapter_memory=options.adapter_memory,
            device=options.device,
            dtype=options.dtype and getattr(torch, options.dtype),
        )
    except OSError as error:  # of several lines, and often without a name
        raise ValueError(f"{options.model}: {told(error)}") from error
    with engine:
        if engine.tokenizer is None:
            raise ValueError(f"{options.model} has no tokenizer that transformers can load")
        if reason := batching.unsupported_model(engine.model):
            raise RuntimeError(f"{reason}: a chat streams, which needs that")
        for name in itertools.islice(adapters, 1):
            engine.adapters.activate(name)
        chat = Chat(engine, options.system, **generation)
        try:
            if sys.stdin.isatty() and sys.stdout.isatty():
                print(f"{options.model} on {engine.model.device}; /help says what can be done")
                chat.talk(_typed(chat))
            else:
                chat.talk(sys.stdin)
        except KeyboardInterrupt:  # while it waited for a line from a pipe
            return 130
    return 0


def _named_paths(given: Iterable[str]) -> dict[str, str]:
    paths: dict[str, str] = {}
    for each in given:
        name, equals, path = each.partition("=")
        if not (name and equals and path):
            raise ValueError(f"--adapter takes NAME=PATH, got {each!r}")
        if name in paths:
            raise ValueError(f"--adapter names {name!r} twice")
        paths[name] = path
    return paths


def _generation(options: argparse.Namespace) -> dict[str, Any]:
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be positive, got {options.max_new_tokens}")
    generation = {"max_new_tokens": options.max_new_tokens}
    if (temperature := options.temperature) is not None:
        if not 0.0 <= temperature < float("inf"):
            raise ValueError(f"--temperature must be 0 or more, got {temperature}")
        generation |= {"do_sample": temperature > 0.0, "temperature": temperature}
    return generation


def _typed(chat: Chat) -> Iterator[str]:
    """Yield the lines that are typed at a prompt, with a history where there is readline."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # input() uses it from then on
    while True:
        try:
            line = input(chat.prompt)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/quit ends the chat")
        else:
            yield line


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def told(error: BaseException) -> str:
    """Return an error as one line."""
    said = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(said).split()) or type(error).__name__


def _up_to(end: str, pieces: Iterable[str]) -> Iterator[str]:
    """Yield a text that comes in pieces, up to where ``end`` begins in it."""
    held = ""
    for piece in pieces:
        before, found, _ = (held + piece).partition(end)
        # What may be the beginning of the end waits for the next piece.
        keep = (
            0 if found else next(n for n in range(len(end) - 1, -1, -1) if before.endswith(end[:n]))
        )
        yield before[: len(before) - keep]
        if found:
            return
        held = before[len(before) - keep :]
    yield held


def side_by_side(texts: Mapping[str, str], width: int) -> str:
    """Lay texts out in columns below their names, or one below another where that is too narrow."""
    each = (width - 2 * (len(texts) - 1)) // len(texts)
    if each < _LEAST_COLUMN:
        return "\n".join(f"{name}\n{textwrap.indent(text, '  ')}" for name, text in texts.items())
    columns = [[name, "-" * each, *wrap(text, each)] for name, text in texts.items()]
    return "\n".join(
        "  ".join(cell + " " * (each - columns_of(cell)) for cell in row).rstrip()
        for row in itertools.zip_longest(*columns, fillvalue="")
    )


def wrap(text: str, width: int) -> list[str]:
    """Break a text into lines of so many columns; textwrap would count 你 and 🙂 as one each."""
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for word in re.findall(r"\s*\S+", paragraph.expandtabs(4)):
            if columns_of(line + word) > width and line:
                lines.append(line)
                line, word = "", word.lstrip()
            for character in word:
                if columns_of(line + character) > width:
                    lines.append(line)
                    line = ""
                line += character
        lines.append(line)
    return lines


def columns_of(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    none = sum(unicodedata.category(character) in ("Mn", "Me", "Cf", "Cc") for character in text)
    return len(text) + wide - none
