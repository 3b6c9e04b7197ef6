"""What an engine is asked: prompts, adapters and options, and what is refused of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import small_engines
import torch
from serving_models import NAMES, ask, engine_of, served_model
from small_engines import TOKENIZER, WORDS, make, prompt_of
from transformers import BatchEncoding

import fastlora
from fastlora.serving import engine
from fastlora.serving.requests import Result

judge = small_engines.judge
running = small_engines.running
shared = small_engines.shared


# What a prompt is.


def test_strings_tokens_and_messages_are_prompts(shared, judge):
    text = "état"
    tokens = TOKENIZER(text)["input_ids"]
    assert len(tokens) == 5
    messages = [{"role": "user", "content": "hi"}]
    chat = TOKENIZER("user: hi\nassistant:")["input_ids"]
    expected = [judge.answer(each, "all-4", 6) for each in (tokens, tokens, chat)]
    assert ask(shared, [text, tokens, messages], "all-4", 6) == expected
    for one, answer in ((text, 0), (tokens, 1), (messages, 2)):
        assert ask(shared, one, "all-4", 6) == [expected[answer]]


def test_tensors_and_arrays_are_prompts(shared, judge):
    tokens = prompt_of(6)
    expected = judge.answer(tokens, None, 4)
    for prompts in (
        torch.tensor(tokens),
        torch.tensor([tokens]),
        [torch.tensor(tokens)],
        tuple(tokens),
        iter([tokens]),
        torch.tensor(tokens).numpy(),
        list(torch.tensor(tokens).numpy()),
        list(torch.tensor(tokens)),
    ):
        assert ask(shared, prompts, None, 4) == [expected]
        if not isinstance(prompts, Iterator):  # which has been read
            result = shared.submit(prompts, None, max_new_tokens=4, ignore_eos=True).result()
            assert result.token_ids == expected
    with pytest.raises(ValueError, match="one prompt is needed, not 2"):
        shared.submit([tokens, tokens])


def test_a_result_says_all(shared, judge):
    tokens = prompt_of(6)
    (result,) = shared.generate([tokens], "qv-16", do_sample=False, max_new_tokens=5)
    expected = judge.answer(tokens, "qv-16", 5)
    assert result == Result(
        TOKENIZER.decode(expected, skip_special_tokens=True), expected, "qv-16", "length", None, 6
    )


def test_what_a_tokenizer_returns_is_prompts(shared, judge):
    """Without its padding, on either side."""
    texts = ["hi", "hello there"]
    rows = [TOKENIZER(text)["input_ids"] for text in texts]
    expected = [judge.answer(tokens, "all-4", 4) for tokens in rows]
    pads = [0] * (len(rows[1]) - len(rows[0]))
    for padded, mask in (
        ([*rows[0], *pads], [1] * len(rows[0]) + pads),
        ([*pads, *rows[0]], pads + [1] * len(rows[0])),
    ):
        ids = torch.tensor([padded, rows[1]])
        masks = torch.tensor([mask, [1] * len(rows[1])])
        encoded = BatchEncoding({"input_ids": ids, "attention_mask": masks})
        assert ask(shared, encoded, "all-4", 4) == expected
    for prompts in (
        TOKENIZER(texts),
        [TOKENIZER(text) for text in texts],
        {"input_ids": rows},
    ):
        assert ask(shared, prompts, "all-4", 4) == expected
    assert ask(shared, TOKENIZER(texts[0]), "all-4", 4) == expected[:1]


def test_one_message_is_a_chat(shared):
    message = {"role": "user", "content": "hi"}
    assert ask(shared, message, "all-4", 4) == ask(shared, [message], "all-4", 4)


def test_the_chat_template_is_told_what_is_given_for_it(shared, judge):
    messages = [{"role": "user", "content": "hi"}]
    told = TOKENIZER.apply_chat_template(
        messages, add_generation_prompt=False, tokenize=True, return_dict=True
    )["input_ids"]
    found = ask(shared, messages, "all-4", 4, chat_template_kwargs={"add_generation_prompt": False})
    assert found == [judge.answer(told, "all-4", 4)]


def test_what_others_do_with_the_tokenizer_changes_no_prompt(shared, judge):
    """Fast tokenizers keep truncation and padding of whoever called last, in any thread."""
    text = "a text of some length"
    expected = judge.answer(TOKENIZER(text)["input_ids"], None, 3)
    encode = TOKENIZER._tokenizer.encode_batch
    ask(shared, [text], None, 1)  # the copy is made

    assert shared._reader._encoder._copied[0] is TOKENIZER
    copied = shared._reader._encoder._copied[1]
    assert copied._tokenizer is not TOKENIZER._tokenizer
    TOKENIZER._tokenizer.enable_truncation(3)
    try:
        assert len(encode([text])[0].ids) == 3
        assert len(copied._tokenizer.encode(text).ids) > 3
        assert ask(shared, [text], None, 3) == [expected]
    finally:
        TOKENIZER._tokenizer.no_truncation()


def test_a_chat_template_that_is_changed_is_followed(judge):
    tokenizer = copy.deepcopy(TOKENIZER)
    message = {"role": "user", "content": "hi"}
    with make(judge) as engine:
        engine.tokenizer = tokenizer
        ask(engine, message, None, 1)
        tokenizer.chat_template = "{{ messages[0].content }}!"
        expected = judge.answer(TOKENIZER("hi!")["input_ids"], "all-4", 4)
        assert ask(engine, message, "all-4", 4) == [expected]


def test_the_prompt_that_is_wrong_is_named(shared):
    with pytest.raises(ValueError, match=r"of prompt 2 \(the first is 0\): a prompt has no tokens"):
        shared.generate([prompt_of(3), prompt_of(3), []])


def test_no_prompts_no_results(shared):
    assert shared.generate([]) == []
    assert shared.generate([], []) == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "a prompt has no tokens"),
        ("", "a prompt has no tokens"),
        ([3, 264], "a prompt has the token 264, and the vocabulary 264"),
        ([-1], "a prompt has the token -1"),
        ([1.5, 2.0], "a prompt is a string, a list of token ids or .* not \\[1.5, 2.0\\]"),
        (None, "a prompt is a string, .* not None"),
        ({"role": "user"}, "a prompt is a string, .* not a mapping with 'role'"),
        ({"text": [[1]]}, "a prompt is a string, .* not a mapping with 'text'"),
        (list(range(200)) * 3, "has 600 tokens, and the model's longest sequence 512"),
    ],
)
def test_what_is_no_prompt_is_refused_and_nothing_is_begun(prompt, message, shared):
    begun = next(shared._numbers)
    with pytest.raises(ValueError, match=message):
        shared.generate([prompt_of(4), prompt], max_new_tokens=4)
    assert next(shared._numbers) == begun + 1


def test_without_a_tokenizer_prompts_are_tokens(judge):
    with make(judge) as engine:
        engine.tokenizer = None
        for prompt, what in (("hi", "a string"), ([{"role": "user", "content": "hi"}], "chat")):
            with pytest.raises(ValueError, match=f"a prompt is {what}.*Engine\\(..., tokenizer="):
                engine.generate([prompt])
        (result,) = engine.generate([[1, 2]], max_new_tokens=3, ignore_eos=True)
        assert (result.text, len(result.token_ids)) == ("", 3)


# Adapters.


def test_one_prompt_is_answered_by_several_adapters(shared, judge):
    prompt, names = prompt_of(5), ["all-4", None, "rs-8"]
    assert ask(shared, prompt, names, 6) == judge.answers([prompt] * 3, names, 6)
    with pytest.raises(ValueError, match="0 adapters were named for 1 prompts"):
        shared.generate(prompt, [])


@pytest.mark.parametrize("adapter", [3, {"all-4": 1}, ["all-4", 3]])
def test_what_is_no_name_is_refused(adapter, shared):
    with pytest.raises(TypeError, match="an adapter is a name, None, or one of these for each"):
        shared.generate([prompt_of(3)] * 2, adapter)


def test_one_adapter_for_all_or_one_for_each(shared, judge):
    prompts = [prompt_of(5), prompt_of(9)]
    for name in NAMES:
        assert ask(shared, prompts, name, 4) == judge.answers(prompts, [name, name], 4)
    names = ["rs-8", None]
    assert ask(shared, prompts, names, 4) == judge.answers(prompts, names, 4)
    with pytest.raises(ValueError, match="3 adapters were named for 2 prompts"):
        shared.generate(prompts, [None, None, None])


def test_the_active_adapter_answers_where_none_is_named(judge):
    prompt = prompt_of(5)
    with make(judge) as engine:
        options = {"do_sample": False, "ignore_eos": True, "max_new_tokens": 4}

        def answered(*adapter):
            (result,) = engine.generate([prompt], *adapter, **options)
            assert result.token_ids == judge.answer(prompt, result.adapter, 4)
            return result.adapter

        assert answered() is None
        engine.adapters.activate("qv-16")
        assert answered() == "qv-16"
        assert answered(None) is None
        assert answered("all-4") == "all-4"
        assert engine.submit(prompt, **options).adapter == "qv-16"
        engine.adapters.deactivate()
        assert answered() is None


def test_an_adapter_that_is_not_loaded_is_told_and_nothing_is_begun(shared):
    with pytest.raises(KeyError, match="no adapter is called 'none'"):
        shared.generate([prompt_of(4)] * 3, ["all-4", "none", None])
    with pytest.raises(KeyError, match="no adapter is called 'none'"):
        shared.submit(prompt_of(4), "none")
    with pytest.raises(KeyError, match="no adapter is called 'none'"):
        next(shared.stream(prompt_of(4), "none"))


# Options.


def test_an_answer_ends_with_an_end_of_sequence_token(shared, judge):
    prompt = prompt_of(5)
    answer = judge.answer(prompt, "all-4", 12)
    end = answer[4]
    expected = answer[: answer.index(end) + 1]
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": end}
    for eos in (end, [end], [263, end]):
        (result,) = shared.generate([prompt], "all-4", **{**options, "eos_token_id": eos})
        assert (result.token_ids, result.finish_reason) == (expected, "stop")
    (result,) = shared.generate([prompt], "all-4", **options, ignore_eos=True)
    assert (result.token_ids, result.finish_reason) == (answer, "length")
    # At the very last token.
    options["max_new_tokens"] = len(expected)
    (result,) = shared.generate([prompt], "all-4", **options)
    assert (result.token_ids, result.finish_reason) == (expected, "stop")


def test_defaults_are_those_of_the_model(judge):
    prompt = prompt_of(5)
    answer = judge.answer(prompt, "all-4", 12)
    model = served_model(**WORDS)
    defaults = model.generation_config
    defaults.eos_token_id, defaults.max_new_tokens = [answer[3], 263], 9
    with engine_of(model, judge.folders) as engine:
        (result,) = engine.generate([prompt], "all-4")
        assert result.token_ids == answer[: answer.index(answer[3]) + 1]
        (result,) = engine.generate([prompt], "all-4", ignore_eos=True)
        assert result.token_ids == answer[:9]
        defaults.do_sample, defaults.temperature, defaults.top_k = True, 5.0, 0
        sampled = ask(engine, [prompt] * 4, "all-4", 9, do_sample=None)
        assert len(set(map(tuple, sampled))) == 4


def test_who_says_how_to_sample_samples(shared, judge):
    """As with vLLM's and SGLang's engines; and otherwise with generate's defaults."""
    prompt = prompt_of(5)
    greedy = judge.answer(prompt, "all-4", 9)
    for options in ({"temperature": 5.0}, {"top_k": 40}, {"top_p": 0.999}, {"min_p": 1e-4}):
        found = ask(shared, [prompt] * 4, "all-4", 9, do_sample=None, **options)
        assert len(set(map(tuple, found))) > 1, options
    assert ask(shared, [prompt], "all-4", 9, do_sample=None, temperature=0.0) == [greedy]
    assert ask(shared, [prompt], "all-4", 9, do_sample=False, temperature=5.0) == [greedy]
    options = shared._reader.read(prompt, {"do_sample": True}, None)
    assert options.sampling["top_k"] == 50


def test_how_long_answers_are(judge):
    with make(judge, num_blocks=30) as engine:
        options = {"ignore_eos": True, "do_sample": False}
        # 256 by default, or what the cache has room for: here 30 pages of 8.
        (result,) = engine.generate([prompt_of(5)], **options)
        assert (len(result.token_ids), result.finish_reason) == (235, "length")
        with pytest.raises(
            ValueError, match="5 tokens and 236 new ones do not fit the cache of 240"
        ):
            engine.generate([prompt_of(5), prompt_of(5)], max_new_tokens=236, **options)
    with make(judge) as engine:
        (result,) = engine.generate([prompt_of(500)], max_new_tokens=100, **options)
        assert len(result.token_ids) == 12, "the model's longest sequence has 512 tokens"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be positive, got 0"),
        ({"num_return_sequences": 0}, ValueError, "num_return_sequences must be positive, got 0"),
        ({"max_new_tokens": 2.5}, ValueError, "max_new_tokens is a whole number, not 2.5"),
        ({"max_new_tokens": [2, 3]}, ValueError, r"is a whole number, not \[2, 3\]"),
        ({"max_new_tokens": True}, ValueError, "max_new_tokens is a whole number, not True"),
        ({"eos_token_id": "x"}, ValueError, "eos_token_id is a token id or a list of them"),
        ({"eos_token_id": 1.5}, ValueError, "eos_token_id is a token id or a list of them"),
        ({"top_k": 2.9}, ValueError, "top_k is a whole number, not 2.9"),
        ({"temperature": [1]}, ValueError, r"temperature is a number, not \[1\]"),
        ({"min_p": "x"}, ValueError, "min_p is a number, not 'x'"),
        ({"chat_template_kwargs": "x"}, ValueError, "chat_template_kwargs is a mapping"),
        ({"chat_template_kwargs": {"tokenize": 1}}, ValueError, "without tokenize"),
        ({"temperature": -1.0}, ValueError, "temperature must be 0 or more, got -1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be 0 or more, got nan"),
        ({"temperature": float("inf")}, ValueError, "temperature must be 0 or more, got inf"),
        ({"top_k": -3}, ValueError, "top_k must be 0 or more, got -3"),
        ({"top_p": 0.0}, ValueError, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, ValueError, r"top_p must lie in \(0, 1\], got 1.5"),
        ({"min_p": 1.5}, ValueError, r"min_p must lie in \[0, 1\], got 1.5"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty must be positive, got 0.0"),
        ({"max_tokens": 3}, TypeError, "max_tokens: no such option here; there are do_sample"),
    ],
)
def test_senseless_options_are_refused(options, error, message, shared):
    for begin in (shared.generate, shared.submit):
        with pytest.raises(error, match=message):
            begin(prompt_of(4), do_sample=True, **options) if "top" in message else begin(
                prompt_of(4), **options
            )


def test_settings_that_are_not_computed_are_told(judge):
    model = served_model(**WORDS)
    model.generation_config.no_repeat_ngram_size = 3
    with pytest.warns(UserWarning, match="asks for no_repeat_ngram_size=3, which the engine does"):
        engine_of(model).close()


@pytest.mark.parametrize("adapters", [["a"], "a", 3])
def test_adapters_that_are_no_mapping_are_refused(adapters):
    with pytest.raises(TypeError, match="adapters maps names to folders or hub ids, not"):
        fastlora.Engine("no-such-model", adapters)


def test_what_does_not_generate_is_refused():
    for model in (torch.nn.Linear(2, 2), served_model().model):
        with pytest.raises(ValueError, match="does not generate: a language model of transformers"):
            fastlora.Engine(model)
    for dtype in ("bf16", "nn"):
        with pytest.raises(ValueError, match=f"dtype is one of torch's, .* not '{dtype}'"):
            fastlora.Engine(served_model(), dtype=dtype)


def test_a_second_engine_is_refused_before_anything_is_made(shared, monkeypatch):
    monkeypatch.setattr(engine, "AdapterPool", lambda *args, **named: pytest.fail("it was made"))
    with pytest.raises(ValueError, match="another engine runs on this model"):
        fastlora.Engine(shared.model)
