"""``stop_strings``: an answer ends with the token that completes one of them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import small_engines
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_models import PATIENCE
from small_engines import LONG, TOKENIZER, make, prompt_of

from fastlora.serving import batching
from fastlora.serving.stops import StopStrings

judge = small_engines.judge
running = small_engines.running
shared = small_engines.shared

SPECIAL, WITHOUT_TEXT = "<end>", 256  # of the tokenizer
NEW = 40
PROMPTS = [prompt_of(n, seed=n) for n in (5, 14, 9)]
NAMES = ["all-4", None, "rs-8"]
OPTIONS: dict[str, Any] = {"do_sample": False, "ignore_eos": True, "max_new_tokens": NEW}


def text_of(tokens: list[int]) -> str:
    text: str = TOKENIZER.decode(tokens, skip_special_tokens=True)
    return text


def stops_of(judge: Any) -> list[str]:
    """Return for each prompt two neighbouring characters far into its answer."""
    texts = [text_of(answer[15:]) for answer in judge.answers(PROMPTS, NAMES, NEW)]
    pairs = [[a + b for a, b in itertools.pairwise(text) if (a + b).isascii()] for text in texts]
    return [found[0] for found in pairs]


def up_to(tokens: list[int], *strings: str) -> list[int]:
    """Return as few of some tokens as have one of the strings in their text."""
    for end in range(1, len(tokens) + 1):
        if any(string in text_of(tokens[:end]) for string in strings):
            return tokens[:end]
    return tokens


@pytest.fixture(params=["continuous", "in-rows"])
def engine(request, judge, monkeypatch):
    if request.param == "in-rows":
        monkeypatch.setattr(batching, "unsupported_reason", lambda: "this one is not known")
    with make(judge) as made:
        yield made


@pytest.mark.filterwarnings("ignore:this one is not known")
def test_an_answer_ends_with_the_string_that_it_came_to(engine, judge):
    stops, answers = stops_of(judge), judge.answers(PROMPTS, NAMES, NEW)
    for asked in (stops, stops[0], [stops[1], "never", SPECIAL]):
        strings = [asked] if isinstance(asked, str) else asked
        results = engine.generate(PROMPTS, NAMES, stop_strings=asked, **OPTIONS)
        expected = [up_to(answer, *strings) for answer in answers]
        assert [result.token_ids for result in results] == expected
        assert [result.finish_reason for result in results] == [
            "length" if len(tokens) == NEW else "stop" for tokens in expected
        ]
        assert [result.text for result in results] == list(map(text_of, expected))
    assert any(len(tokens) < NEW for tokens in expected)


def test_each_of_several_answers_ends_by_itself(shared):
    """And a string that came with the last token counts."""
    sampled = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 12, "ignore_eos": True}
    request = shared.submit(
        PROMPTS[0], "all-4", num_return_sequences=8, stop_strings=list("aeiou"), **sampled
    )
    results = request.results(PATIENCE)
    for result in results:
        assert up_to(result.token_ids, *"aeiou") == result.token_ids
        is_there = any(vowel in result.text for vowel in "aeiou")
        assert result.finish_reason == ("stop" if is_there else "length")
    assert len({len(result.token_ids) for result in results}) > 1


def test_a_stream_ends_there_and_the_engine_goes_on_with_others(shared, judge):
    stops, answers = stops_of(judge), judge.answers(PROMPTS, NAMES, NEW)
    other = shared.submit(PROMPTS[1], NAMES[1], **OPTIONS)
    pieces = list(shared.stream(PROMPTS[0], NAMES[0], stop_strings=stops[:1], **LONG))
    assert "".join(pieces) == text_of(up_to(answers[0], stops[0]))
    assert other.result(PATIENCE).token_ids == answers[1]


def test_a_special_token_ends_an_answer_as_a_token(shared):
    """Its text is not in the answer's; so text around one cannot be looked for."""
    options = {"stop_strings": ["a", SPECIAL], "ignore_eos": True}
    found = shared._reader.read(PROMPTS[0], options, TOKENIZER)
    assert (found.eos, found.stop.strings) == ([WITHOUT_TEXT], ("a",))
    found = shared._reader.read(PROMPTS[0], {"stop_strings": SPECIAL, "eos_token_id": 3}, TOKENIZER)
    assert (found.eos, found.stop) == ([3, WITHOUT_TEXT], None)
    with pytest.raises(ValueError, match=f"cannot end an answer: {SPECIAL} is a token .* alone"):
        shared.generate([PROMPTS[0]], stop_strings=f"{SPECIAL}\n")


@pytest.mark.parametrize("strings", [[""], ["a", 3], 5, [None]])
def test_what_is_no_string_is_refused(strings, shared):
    with pytest.raises(ValueError, match="stop_strings is a string or a list of them"):
        shared.generate([PROMPTS[0]], stop_strings=strings)


def test_without_a_tokenizer_there_is_no_text_to_look_at(judge):
    with make(judge) as engine:
        engine.tokenizer = None
        with pytest.raises(ValueError, match="the engine has no tokenizer"):
            engine.generate([PROMPTS[0]], stop_strings="a")


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(st.one_of(st.text("ab\u00e9\u4f60 ", max_size=4), st.none()), max_size=12),
    strings=st.lists(st.text("ab\u00e9\u4f60 ", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 40), max_size=4).map(sorted),
)
def test_whatever_comes_at_once_the_end_is_the_same(parts, strings, cuts):
    """Also with tokens between that have no text: as many as there are."""
    tokens: list[int] = []
    for part in parts:
        tokens += [WITHOUT_TEXT] * 9 if part is None else TOKENIZER(part)["input_ids"]
    stops, known = StopStrings(tuple(strings), text_of, frozenset([WITHOUT_TEXT])), 0
    whole = up_to(tokens, *strings)
    expected = len(whole) if any(string in text_of(whole) for string in strings) else None
    found = None
    for cut in [*cuts, len(tokens)]:
        if found is None:
            found = stops.end_of(tokens[:cut], known)
            known = len(tokens[:cut])
    assert found == expected
