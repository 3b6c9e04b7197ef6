"""What a request is told: its prompt, its length, what ends it, and how it is sampled."""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastlora.serving.prompts import PromptEncoder
from fastlora.serving.stops import StopStrings

DEFAULT_NEW_TOKENS = 256
# Divided by less, scores become infinities. Nothing but the most likely token is left long before.
_LEAST_TEMPERATURE = 1e-5
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_OPTIONS = (
    *_SAMPLING,
    *("max_new_tokens", "num_return_sequences", "eos_token_id", "ignore_eos", "stop_strings"),
    "chat_template_kwargs",
)
# Those of them that say how one samples: with any of them one means to.
_OF_SAMPLES = ("temperature", "top_k", "top_p", "min_p")
_TOP_K = 50  # generate's default
# What a generation_config may ask for and the engine does not compute; unless it is this.
_NOT_COMPUTED = {
    "no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "num_beams": 1,
}


@dataclass(frozen=True)
class Options:
    """All that is told of a request but its adapter.

    Attributes:
        tokens: of the prompt.
        max_new_tokens: how long the answer may be.
        has_length: whether somebody asked for that length.
        eos: tokens that end it.
        stop: strings that end it, or ``None``.
        sequences: how many answers there are to be.
        sampling: of ``transformers.GenerationConfig``, what is not its default; empty: greedy.
    """

    tokens: list[int]
    max_new_tokens: int
    has_length: bool
    eos: list[int]
    stop: StopStrings | None
    sequences: int
    sampling: dict[str, Any]


class OptionsReader:
    """Makes ``Options`` of what somebody asks for, or says why it cannot be.

    Args:
        model: whose defaults and sizes count.
        tokenizer: whose end of a sequence counts where the model says none, or ``None``.

    Attributes:
        vocabulary: how many logits the model has.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._defaults = model.generation_config
        text = model.config.get_text_config()
        self._longest: int | None = getattr(text, "max_position_embeddings", None)
        self._encoder = PromptEncoder(model.get_input_embeddings().weight.shape[0])
        head = model.get_output_embeddings()
        self.vocabulary = int(getattr(head, "out_features", None) or text.vocab_size)
        self._model, self._tokenizer = model, tokenizer
        _warn_of(self._defaults)

    def read(self, prompt: Any, given: Mapping[str, Any], tokenizer: Any) -> Options:
        """Return what is told of a request, from what was given and the model's defaults.

        Args:
            prompt: a string, chat messages or token ids.
            given: keywords of ``Engine.generate``.
            tokenizer: for strings and messages, or ``None``.

        Raises:
            ValueError: the prompt or an option cannot be used.
            TypeError: there is no such option.
        """
        unknown = [name for name in given if name not in _OPTIONS]
        if unknown:
            raise TypeError(
                f"{', '.join(unknown)}: no such option here; there are {', '.join(_OPTIONS)}"
            )
        given = {name: value for name, value in given.items() if value is not None}
        template = _template(given.get("chat_template_kwargs", {}))
        tokens = self._encoder.encode(prompt, tokenizer, template)
        asked = given.get("max_new_tokens", getattr(self._defaults, "max_new_tokens", None))
        new_tokens = DEFAULT_NEW_TOKENS if asked is None else _positive("max_new_tokens", asked)
        if self._longest is not None:
            if len(tokens) >= self._longest:
                raise ValueError(
                    f"a prompt has {len(tokens)} tokens, and the model's longest sequence "
                    f"{self._longest}"
                )
            new_tokens = min(new_tokens, self._longest - len(tokens))
        if "eos_token_id" in given:
            ends = _token_ids(given["eos_token_id"])
        else:
            ends = _eos_tokens(self._model, self._tokenizer)
        stop, tokens_of_stop = _stops(given.get("stop_strings", ()), tokenizer)
        return Options(
            tokens=tokens,
            max_new_tokens=new_tokens,
            has_length=asked is not None,
            eos=tokens_of_stop if given.get("ignore_eos") else [*ends, *tokens_of_stop],
            stop=stop,
            sequences=_positive("num_return_sequences", given.get("num_return_sequences", 1)),
            sampling=self._sampling_of(given),
        )

    def _sampling_of(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return how a request is sampled, of what was given or else the model's defaults."""
        named = [name for name in _OF_SAMPLES if name in given]
        options = {name: getattr(self._defaults, name, None) for name in _SAMPLING}
        options |= {"do_sample": True} if named else {}
        options |= {name: given[name] for name in _SAMPLING if name in given}
        return _checked_sampling(options, self.vocabulary)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} is a whole number, not {value!r:.100}")
    return operator.index(value)


def _positive(name: str, value: Any) -> int:
    number = _whole(name, value)
    if number < 1:
        raise ValueError(f"{name} must be positive, got {number}")
    return number


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is a number, not {value!r:.100}") from None


def _token_ids(value: Any) -> list[int]:
    try:
        return [operator.index(value)]
    except TypeError:
        pass
    try:
        return list(map(operator.index, value))
    except TypeError:
        raise ValueError(
            f"eos_token_id is a token id or a list of them, not {value!r:.100}"
        ) from None


def _template(value: Any) -> Mapping[str, Any]:
    """Check what a chat template is told; that tokens come back is the engine's own affair."""
    if not isinstance(value, Mapping) or {"tokenize", "return_dict"} & value.keys():
        raise ValueError(
            "chat_template_kwargs is a mapping of what the template is told, without tokenize and "
            f"return_dict, not {value!r:.100}"
        )
    return value


def _stops(value: Any, tokenizer: Any) -> tuple[StopStrings | None, list[int]]:
    """Return the strings that end an answer, and the tokens: special ones are not in its text."""
    is_one = isinstance(value, str) or not isinstance(value, Iterable)
    strings = (value,) if is_one else tuple(value)
    if not all(isinstance(string, str) and string for string in strings):
        raise ValueError(f"stop_strings is a string or a list of them, not {value!r:.100}")
    if not strings:
        return None, []
    if tokenizer is None:
        raise ValueError("stop_strings are looked for in the text, and the engine has no tokenizer")
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    added = tokenizer.added_tokens_decoder.items()
    special |= {token.content: number for number, token in added if token.special}
    in_text = tuple(string for string in strings if string not in special)
    for string in in_text:
        if found := [token for token in special if token in string]:
            raise ValueError(
                f"{string!r} cannot end an answer: {found[0]} is a token that its text does not "
                "have; give that alone"
            )
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    stop = StopStrings(in_text, decode, frozenset(special.values())) if in_text else None
    return stop, [special[string] for string in strings if string in special]


def _checked_sampling(options: Mapping[str, Any], vocabulary: int) -> dict[str, Any]:
    """Check how a request is sampled, and return it without defaults; nothing if it is greedy.

    ``top_k=0`` is no limit, and 50 the default, as for ``generate``. A temperature of 0, or next to
    it, is greedy.
    """
    given = {name: options[name] for name in _SAMPLING if options.get(name) is not None}
    top_k = _whole("top_k", given.get("top_k", _TOP_K))
    defaults = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    temperature, top_p, min_p, penalty = (
        _number(name, given.get(name, default)) for name, default in defaults.items()
    )
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be 0 or more, got {top_k}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    if not 0.0 <= min_p <= 1.0:
        raise ValueError(f"min_p must lie in [0, 1], got {min_p}")
    if not 0.0 < penalty < float("inf"):
        raise ValueError(f"repetition_penalty must be positive, got {penalty}")
    sampling: dict[str, Any] = {} if penalty == 1.0 else {"repetition_penalty": penalty}
    if given.get("do_sample", False) and temperature >= _LEAST_TEMPERATURE:
        top_k = min(top_k or vocabulary, vocabulary)
        sampling |= {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        sampling |= {"min_p": min_p} if min_p else {}
    return sampling


def _eos_tokens(model: Any, tokenizer: Any) -> list[int]:
    for source in (model.generation_config, model.config, tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    return []


def _warn_of(defaults: Any) -> None:
    """Say what of a generation_config will not be followed."""
    asked = {name: getattr(defaults, name, None) for name in _NOT_COMPUTED}
    ignored = [
        f"{name}={value!r}"
        for name, value in asked.items()
        if value is not None and value != _NOT_COMPUTED[name]
    ]
    if ignored:
        warnings.warn(
            f"the model's generation_config asks for {', '.join(ignored)}, which the engine does "
            "not compute: its answers may be others than those of model.generate",
            stacklevel=4,
        )
