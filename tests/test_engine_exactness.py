"""Every mixed batch says, token for token, what peft's ``generate`` says for each adapter alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from serving_models import (
    LINEARS,
    NAMES,
    SPECS,
    Judge,
    ask,
    changed,
    engine_of,
    prompts_of,
    served_model,
)

from fastlora.serving import linears, manager

NEW = 10
LENGTHS = (5, 37, 3, 61, 20, 9, 44)
ADAPTERS = ["all-4", "qv-16", None, "rs-8", "all-4", "one-layer-5", "qv-16"]
SETUPS = {
    "one-shot": {},
    "chunked-prefill": {"max_batch_tokens": 24},
    "starved-cache": {"num_blocks": 17, "max_batch_tokens": 32, "safety_margin": 0.0},
    "prefill-first": {"max_batch_tokens": 48, "scheduler_type": "prefill_first"},
}


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return Judge(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """Collect of every batch the slot and the number of tokens of each request."""
    seen: list[list[tuple[int, int]]] = []

    def filled(requests, *args):
        requests = list(requests)
        seen.append([(slot, rows) for slot, rows in requests if rows])
        return fill(requests, *args)

    fill = manager.fill
    monkeypatch.setattr(manager, "fill", filled)
    return seen


def of_tokens(batches):
    """Leave out what is filled in for the rows of logits, every second time."""
    return batches[::2]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("setup", SETUPS)
def test_a_mixed_batch_says_what_peft_says(setup, attention, judge, batches, monkeypatch):
    begun_again = 0

    def create_equivalent_initial_request(self):
        nonlocal begun_again
        begun_again += 1
        return create(self)

    from transformers.generation.continuous_batching.requests import RequestState

    create = RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        RequestState, "create_equivalent_initial_request", create_equivalent_initial_request
    )
    prompts = prompts_of(*LENGTHS)
    expected = judge.answers(prompts, ADAPTERS, NEW)
    assert len(set(map(tuple, expected))) == len(expected)
    with engine_of(served_model(attention=attention), judge.folders, **SETUPS[setup]) as engine:
        assert ask(engine, prompts, ADAPTERS, NEW) == expected
        if setup == "starved-cache":
            assert begun_again
        # Three adapters and the base in one step, of one token each and of prompts.
        assert max(len({slot for slot, _ in batch}) for batch in of_tokens(batches)) >= 3


@pytest.mark.parametrize("setup", ["one-shot", "starved-cache"])
def test_a_shared_prompt_is_never_shared_across_adapters(setup, judge, batches):
    (prompt,) = prompts_of(70)
    expected = judge.answers([prompt] * len(NAMES), NAMES, NEW)
    assert len(set(map(tuple, expected))) == len(expected)
    with engine_of(served_model(), judge.folders, **SETUPS[setup]) as engine:
        for _ in range(2):
            assert ask(engine, [prompt] * len(NAMES), NAMES, NEW) == expected
        if setup == "one-shot":
            # The second time all but the last page of the prompt came from the cache.
            computed = sum(rows for batch in of_tokens(batches) for _, rows in batch)
            each = len(prompt) + 2 * NEW + len(prompt) % 8
            assert computed < len(NAMES) * (each + 8)


def test_a_name_that_is_loaded_again_shares_nothing_with_its_past(judge, tmp_path):
    (prompt,) = prompts_of(70)
    with engine_of(served_model(), {"it": judge.folders["all-4"]}) as engine:
        for name in ("all-4", "rs-8", "all-4"):
            engine.adapters.load("it", judge.folders[name])
            assert ask(engine, [prompt], "it", NEW) == [judge.answer(prompt, name, NEW)]
        # The same folder with other weights in it.
        rest = changed(judge.folders["all-4"], tmp_path / "it")
        engine.adapters.load("it", rest)
        assert ask(engine, [prompt], "it", NEW) == [judge.answer(prompt, "all-4", NEW)]
        shutil.rmtree(rest)
        engine.adapters.load("it", shutil.copytree(judge.folders["one-layer-5"], rest))
        assert ask(engine, [prompt], "it", NEW) == [judge.answer(prompt, "one-layer-5", NEW)]


def test_prefixes_are_shared_with_the_same_adapter_alone(judge, batches):
    long, short = prompts_of(70, 5)
    with engine_of(served_model(), judge.folders) as engine:
        for name in ("all-4", "qv-16", "all-4"):
            batches.clear()
            ask(engine, [[*long, *short]], name, 2)
            computed = sum(rows for batch in of_tokens(batches) for _, rows in batch)
            if name == "qv-16":
                assert computed == 76
        assert computed < 16


@pytest.mark.parametrize("setup", ["one-shot", "starved-cache"])
def test_several_answers_to_a_prompt(setup, judge):
    # One token, one page and a token (of which the cache leaves one), and several pages.
    prompts = prompts_of(1, 9, 37)
    adapters = ["all-4", "qv-16", "rs-8"]
    expected = [each for each in judge.answers(prompts, adapters, NEW) for _ in range(3)]
    with engine_of(served_model(), judge.folders, **SETUPS[setup]) as engine:
        for _ in range(2):
            found = ask(engine, prompts, adapters, NEW, num_return_sequences=3)
            assert found == expected
        # Alone: a batch without tokens would be the end of the engine.
        for i, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
            found = ask(engine, [prompt], adapter, NEW, num_return_sequences=3)
            assert found == expected[3 * i : 3 * i + 3]


def test_several_sampled_answers_differ(judge):
    (prompt,) = prompts_of(20)
    with engine_of(served_model(), judge.folders) as engine:
        options = {"do_sample": True, "num_return_sequences": 4, "temperature": 3.0}
        found = ask(engine, [prompt], "all-4", NEW, **options)
        assert len(set(map(tuple, found))) == 4


FAMILIES = [
    pytest.param("qwen2", {}, id="qwen2-with-biases"),
    pytest.param("qwen2-tied", {}, id="qwen2-tied"),
    pytest.param("qwen3", {}, id="qwen3"),
    pytest.param("llama", {}, id="llama"),
    pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, id="llama-with-biases"),
]


@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings:UserWarning"
)  # peft's, of merging
@pytest.mark.parametrize(("family", "overrides"), FAMILIES)
def test_families_and_adapters_of_the_head(family, overrides, tmp_path):
    specs = {
        "all-4": SPECS["all-4"],
        "head-6": {"r": 6, "lora_alpha": 12, "target_modules": ["lm_head"]},
        "both-8": {"r": 8, "target_modules": [*LINEARS, "lm_head"], "use_rslora": True},
    }
    judge = Judge(tmp_path, specs, family, **overrides)
    names = [None, *specs]
    prompts = prompts_of(5, 21, 21, 12)
    expected = judge.answers(prompts, names, NEW)
    assert len(set(map(tuple, expected))) == len(expected)
    model = served_model(family, **overrides)
    embedding = model.get_input_embeddings().weight.clone()
    with engine_of(model, judge.folders, max_batch_tokens=32) as engine:
        assert ask(engine, prompts, names, NEW) == expected
    assert torch.equal(model.get_input_embeddings().weight, embedding)


def test_a_head_that_is_called_with_all_tokens(tmp_path, monkeypatch):
    # As in models whose forward does not select logits by itself.
    monkeypatch.setattr(
        "transformers.generation.continuous_batching.model_runner.ModelRunner"
        ".supports_logits_to_keep",
        lambda self, model: False,
    )
    specs = {
        "head-6": {"r": 6, "target_modules": ["lm_head"]},
        "both-3": {"r": 3, "target_modules": ["q_proj", "lm_head"]},
    }
    judge = Judge(tmp_path, specs)
    prompts = prompts_of(5, 21, 9)
    names = ["head-6", None, "both-3"]
    with engine_of(served_model(), judge.folders) as engine:
        assert ask(engine, prompts, names, NEW) == judge.answers(prompts, names, NEW)


def test_padded_batches(judge):
    """Padding, as CUDA graphs need it: its rows have no adapter, whatever lay there before."""
    prompts = prompts_of(*LENGTHS)
    with engine_of(served_model(), judge.folders) as engine:
        engine._running().batch_processor.model_runner.pad_inputs = True
        assert ask(engine, prompts, ADAPTERS, NEW) == judge.answers(prompts, ADAPTERS, NEW)
        # Fewer, and others, in the buffers of those; and none but padding that has no adapter.
        for names in ([None, "rs-8"], ["qv-16", "rs-8"], ["all-4", "all-4"]):
            found = ask(engine, prompts[:2], names, NEW)
            assert found == judge.answers(prompts[:2], names, NEW)


def test_the_head_where_prompts_go_on(tmp_path):
    """A request whose prompt is not over yet has a row of logits, which nobody asks for."""
    specs = {
        name: {"r": rank, "target_modules": ["lm_head", "up_proj"]}
        for name, rank in (("two", 2), ("three", 3))
    }
    judge = Judge(tmp_path, specs)
    prompts = prompts_of(4, 5, 90)
    for names in (["two", "three", "two"], ["two", "three", None], ["two", "two", "three"]):
        with engine_of(served_model(), judge.folders, max_batch_tokens=16) as engine:
            assert ask(engine, prompts, names, 14) == judge.answers(prompts, names, 14)


def test_all_slots_may_be_full(judge):
    """The base has no slot of its own that an adapter could be given."""
    prompts = prompts_of(9, 9, 9, 9, 9)
    with engine_of(served_model(), judge.folders) as engine:
        # Everything that the table holds is in use.
        engine.adapters._free_slots = []
        assert ask(engine, prompts, NAMES, NEW) == judge.answers(prompts, NAMES, NEW)


def test_kernels_say_what_peft_says(tmp_path, monkeypatch):
    """The kernels, interpreted, from the arena by its descriptors."""
    specs = {name: SPECS[name] for name in ("all-4", "rs-8")}
    small = {"num_hidden_layers": 1}
    judge = Judge(tmp_path, specs, **small)
    names = ["rs-8", None, "all-4"]
    prompts = prompts_of(4, 3, 5)
    monkeypatch.setenv("FASTLORA_BACKEND", "fused")
    launched: list[int] = []

    def launch(ys, *rest):
        launched.append(len(ys))
        launch_segmented(ys, *rest)

    launch_segmented = linears.segmented_ops._launch
    monkeypatch.setattr(linears.segmented_ops, "_launch", launch)
    with engine_of(served_model(**small), judge.folders) as engine:
        assert ask(engine, prompts, names, 3) == judge.answers(prompts, names, 3)
    # q, k and v in one launch, gate and up in one, in each of three steps; the head has no adapter.
    assert launched == [3, 1, 2, 1] * 3


def test_16_bit_models_have_their_adapters_in_16_bits(judge: Judge, tmp_path: Path):
    """Rounded once, when they are loaded; sums in the outputs' precision or better."""
    prompts = prompts_of(20, 20)
    for dtype in (torch.float16, torch.bfloat16):
        with engine_of(served_model().to(dtype), judge.folders) as engine:
            pool = engine.adapters
            lease = pool.lease("all-4")
            layer = pool.names.index("model.layers.0.self_attn.q_proj")
            held = pool.in_slots(layer, (lease.slot,)).factors[0]
            weight = judge.model.base_model.model.get_submodule(pool.names[layer])
            assert torch.equal(held.lora_a, weight.lora_A["all-4"].weight.to(dtype))
            assert torch.equal(held.lora_b.t(), weight.lora_B["all-4"].weight.to(dtype))
            pool.give_back(lease)
            found = ask(engine, prompts, ["all-4", None], 2)
            # The first tokens are those of fp32, whose lead over the others is large.
            assert [each[0] for each in found] == [
                each[0] for each in judge.answers(prompts, ["all-4", None], 2)
            ]


def test_graphs_with_and_without_adapters_are_others(judge):
    """A batch without adapters launches none of their kernels, so its graph is its own."""
    prompts, keys, case = prompts_of(5, 9), {}, ""
    with engine_of(served_model(), judge.folders) as engine:
        manager = engine._running()
        io = manager.batch_processor.inputs_and_outputs
        get_model_kwargs = io.get_model_kwargs

        def watched(use_padding=False):
            kwargs = get_model_kwargs(use_padding=use_padding)
            keys.setdefault(case, set()).add(io._get_graph_key())
            return kwargs

        io.get_model_kwargs = watched
        for case, names in (
            ("base", [None, None]),
            ("one", [None, "all-4"]),
            ("two", ["rs-8", "all-4"]),
            ("sampled", ["rs-8", "all-4"]),
            ("penalized", ["rs-8", "all-4"]),
        ):
            # So that batches are as large every time.
            manager.batch_processor.cache.evict_cached_blocks()
            penalty = 1.5 if case == "penalized" else 1.0
            sampled = case == "sampled"
            ask(engine, prompts, names, 2, do_sample=sampled, repetition_penalty=penalty)
    assert keys["one"] == keys["two"]
    assert not keys["base"] & keys["one"]
    assert not keys["sampled"] & (keys["one"] | keys["base"])
    assert not keys["penalized"] & (keys["one"] | keys["base"] | keys["sampled"])
