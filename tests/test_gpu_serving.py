"""What only a GPU proves of serving: bf16, real sizes, graphs told of their adapters afterwards.

Small cases of both kernels, in every dtype, are in ``test_kernels_segmented.py`` and
``test_kernels_paged_attention.py``, which take the GPU when there is one.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from kernel_cases import DTYPES, assert_kernel_as_accurate, doubles, randn
from segment_cases import apply_adapters, make_adapters, store
from served import (
    Captured,
    Rows,
    Served,
    in_turns,
    is_own,
    is_segmented,
    launched,
    path_of,
    runs_of,
)
from test_gpu import CUDA, SMALL
from test_kernels_paged_attention import make_batch

import fastlora
from fastlora import plans, segmented_ops
from fastlora.bench import measuring
from fastlora.bench.shapes import GROUPS, MODELS, Model
from fastlora.kernels.decode_gemm import decode_gemm
from fastlora.segments import Segments
from fastlora.serving import attention, batching

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
LAYERS = 3


@pytest.fixture(autouse=True)
def checked():
    """The check of a device reads results back: it is over before anything is counted.

    And small linears, too, have the products that serving has for large ones.
    """
    with fastlora.backend("fused"):
        if torch.cuda.is_available():
            plans.check_serving(CUDA, BF16)
            assert not any(plans.segmented_reason(CUDA, kernel) for kernel in plans._WITHOUT)
        yield


# The ranks of six adapters in each of three siblings: equal ones, mixed ones, and missing linears.
RANKS = ((0, 0, 0), (16, 16, 16), (8, 64, 5), (0, 32, 0), (64, 64, 64), (16, 0, 1), (1, 8, 24))
# In and out features of linears that share their input.
SHAPES = {
    "q, k, v of 7B": (3584, (3584, 512, 512)),
    "gate, up of 0.5B": (896, (4864, 4864)),
    "down of 0.5B": (4864, (896,)),
    "odd": (1001, (515, 77)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [16, 64, 1000])  # one for each kind of tile
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_are_as_accurate_as_torch(shape, rows, dtype):
    k, ns = shape
    adapters = make_adapters([ranks[: len(ns)] for ranks in RANKS], k, ns, dtype)
    arena, descriptors = store(adapters, dtype)
    slots = torch.randint(len(RANKS), (rows,)).tolist()
    x, ys = randn(rows, k, dtype=dtype), [randn(rows, n, dtype=dtype) for n in ns]
    _, exact = apply_adapters(x.double(), doubles(*ys), adapters, slots)
    _, native = apply_adapters(x, ys, adapters, slots)
    made = Segments.of_slots(slots, table=len(RANKS), device=x.device)
    metadata = (made.slots, made.order, made.tiles, made.block_m)
    segmented_ops.segmented_add(ys, x, arena, descriptors, *metadata, 64)
    for s, results in enumerate(zip(ys, native, exact, strict=True)):
        assert_kernel_as_accurate(*results, name=f"y {s}")


def small(adapters):
    """Return a model of three layers and the slots of some of its adapters, of rank 16 and 64."""
    model = Model("small", SMALL, LAYERS, {"vocab_size": 1000, "hidden_size": 512})
    model = Served(model, CUDA, BF16, [(adapters, 16), (3, 64), (1, 16)])
    slots = model.load("small", adapters, 16) + model.load("large", 3, 64)
    return model, slots


def captured(model, tokens):
    """Capture a step while no row has an adapter."""
    inputs, rows = model.inputs(tokens), Rows(tokens, model.pool)
    step = model.step(inputs, inputs[0], rows, rows)
    return Captured(step, CUDA, torch.cuda.graph_pool_handle()), rows, inputs, step


def batches_of(slots, tokens):
    """Return requests of many kinds for so many tokens."""
    one, *others = slots
    return {
        "one adapter": [(one, tokens)],
        "all in turn": in_turns(slots, tokens),
        "none": [(0, tokens)],
        "long runs": runs_of([*others, 0][:tokens], tokens),
        "one row of many": [(0, tokens - 1), (one, 1)],
        "with rows of the base": in_turns([0, *others, one, 0], tokens),
    }


@pytest.mark.parametrize("tokens", [1, 16, 17, 256, 257, 1024])
def test_a_graph_captured_without_adapters_is_right_for_every_later_batch(tokens):
    model, slots = small(20)
    step, rows, inputs, _ = captured(model, tokens)
    bare = Captured(model.step(inputs, inputs[0], None, None), CUDA, None)
    for title, requests in batches_of(slots, tokens).items():
        rows.tell(requests)
        bare.replay()  # somebody else's work in between
        step.replay()
        torch.cuda.synchronize()
        assert model.check(step.outputs, inputs, requests) <= 1, title


def test_without_adapters_every_bit_is_the_frozen_product_s():
    """Of PyTorch's, or in a step that generates of ``decode_gemm``'s."""
    model, _ = small(2)
    for tokens in (16, 64, 512):
        step, _, inputs, _ = captured(model, tokens)
        bare = Captured(lambda x=inputs: model.module(x, None, model.checked), CUDA, None)
        for each in (step, bare):
            each.replay()
        if tokens > segmented_ops.DECODE_GEMM_ROWS:
            assert all(map(torch.equal, step.outputs, bare.outputs))
            continue
        named = [(number, name) for number in model.checked for name in SMALL]
        by_input = {name: x for names, x in zip(GROUPS, inputs, strict=True) for name in names}
        for (number, name), y in zip(named, step.outputs, strict=True):
            linear = model.module.get_submodule(path_of(number, name))
            (alone,) = decode_gemm(by_input[name], [linear.weight], [linear.bias])
            assert torch.equal(y, alone), name


@pytest.mark.parametrize("tokens", [16, 64, 1024])
def test_a_replayed_graph_has_the_bits_of_an_eager_step(tokens):
    model, slots = small(5)
    step, rows, _, eager = captured(model, tokens)
    rows.tell(in_turns(slots, tokens))
    results = []
    for _ in range(2):
        step.replay()
        results.append([y.clone() for y in step.outputs])
    for outputs in (results[1], eager()):
        assert all(map(torch.equal, outputs, results[0]))


@pytest.mark.parametrize("tokens", [1, 16, 64, 512])
def test_shrinks_beside_the_frozen_products_change_no_bit(tokens, monkeypatch):
    """In a graph and eagerly, many times: nothing is read before it was written.

    Without the fixture that fills memory: a fill between two launches would wait for the first, so
    that nothing ran beside anything.
    """
    monkeypatch.undo()
    plans.forget_measurements()  # what earlier tests prepared goes on filling its results
    model, slots = small(5)
    runs = {}
    for overlaps in (False, True):
        with mock.patch.object(segmented_ops, "OVERLAPS", overlaps):
            step, rows, inputs, eager = captured(model, tokens)
        rows.tell(in_turns(slots, tokens))
        runs[overlaps] = step, inputs, eager
    (plain, x, _), (beside, other_x, eager) = runs.values()
    for _ in range(30):
        for one, other in zip(x, other_x, strict=True):
            one.normal_()
            other.copy_(one)
        plain.replay()
        expected = [y.clone() for y in plain.outputs]
        for outputs in (_replayed(beside), eager()):
            assert all(map(torch.equal, outputs, expected))


def _replayed(step):
    step.replay()
    return step.outputs


def test_an_adapter_that_is_loaded_later_is_served_by_the_same_graph():
    model, slots = small(4)
    step, rows, inputs, _ = captured(model, 64)
    for late in (model.load("late", 1, 16), slots):
        requests = in_turns([*late, slots[0]], 64)
        rows.tell(requests)
        step.replay()
        torch.cuda.synchronize()
        assert model.check(step.outputs, inputs, requests) <= 1


@pytest.mark.parametrize("tokens", [16, 64, 1024])
def test_nothing_waits_for_the_device(tokens):
    model, slots = small(4)
    inputs, rows = model.inputs(tokens), Rows(tokens, model.pool)
    rows.tell(in_turns(slots, tokens))
    step = model.step(inputs, inputs[0], rows, rows)
    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", [16, 64, 1024])
def test_a_layer_takes_eight_launches_and_none_for_metadata(tokens, monkeypatch):
    monkeypatch.undo()  # to poison what is allocated is a launch, too
    plans.forget_measurements()  # what earlier tests prepared goes on poisoning its results
    model, slots = small(4)
    inputs, rows = model.inputs(tokens), Rows(tokens, model.pool)
    rows.tell(in_turns(slots, tokens))
    ours = launched(model.step(inputs, None, rows, rows), CUDA)
    bare = launched(model.step(inputs, None, None, None), CUDA)
    # A step that generates has frozen products of its own, on Hopper's.
    others = [name for name in ours - bare if not is_own(name)]
    assert not others, ours
    assert sum(n for name, n in ours.items() if is_segmented(name)) == 8 * LAYERS, ours
    if tokens <= segmented_ops.DECODE_GEMM_ROWS:
        products = [n for name, n in ours.items() if name.startswith("_decode_gemm_kernel")]
        assert products == [4 * LAYERS], ours


def test_results_do_not_depend_on_the_stream():
    model, slots = small(4)
    inputs, rows = model.inputs(64), Rows(64, model.pool)
    rows.tell(in_turns(slots, 64))
    step = model.step(inputs, inputs[0], rows, rows)
    results = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            results.append(step())
    torch.cuda.synchronize()
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_layers_of_a_real_model_are_right_with_64_adapters():
    qwen = MODELS["Qwen2.5-7B"]
    model = Served(Model(qwen.name, qwen.linears, 2, qwen.config), CUDA, BF16, [(64, 16)])
    slots = model.load("adapter", 64, 16)
    for tokens in (16, 64, 256, 2048):
        step, rows, inputs, _ = captured(model, tokens)
        requests = in_turns(slots, tokens)
        rows.tell(requests)
        step.replay()
        torch.cuda.synchronize()
        assert model.check(step.outputs, inputs, requests) <= 1


# Cached tokens and queries of each sequence.
SEQUENCES = {
    "generation": [(17 * i + 1, 1) for i in range(16)],
    "one-long-sequence": [(6000, 1)],
    "prompts": [(0, 700), (0, 1), (0, 65)],
    "prompts-and-generation": [(0, 300), (1500, 1), (256, 33), (257, 1), (0, 2)],
}
HEADS = [
    pytest.param((14, 2, 64), BF16, id="0.5B"),
    pytest.param((32, 8, 128), BF16, id="8B"),
    *(pytest.param((28, 4, 128), *dtype.values, id=f"7B-{dtype.id}") for dtype in DTYPES),
]


@pytest.mark.parametrize(("heads", "dtype"), HEADS)
@pytest.mark.parametrize("sequences", SEQUENCES.values(), ids=SEQUENCES)
def test_paged_attention_is_as_accurate_as_sdpa(sequences, heads, dtype):
    names = dict(zip(("heads", "kv_heads", "head_dim"), heads, strict=True))
    batch = make_batch(sequences, dtype=dtype, padding=(2, 5), **names)
    assert torch.equal(batch.check("places", config=None), batch.check("pages", config=None))


@pytest.mark.parametrize("window", [64, 1000])
def test_paged_attention_with_a_window_is_as_accurate_as_sdpa(window):
    sequences = [(0, 300), (1500, 1), (256, 33)]
    batch = make_batch(sequences, heads=28, kv_heads=4, head_dim=128, dtype=BF16)
    batch.check(window=window, config=None)


# What is imported below is not there in every transformers that a GPU host may have.


@pytest.fixture
def continuous_batching():
    reason = batching.unsupported_reason()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    from serving_models import Judge

    return Judge(tmp_path_factory.mktemp("adapters"))


@pytest.mark.usefixtures("continuous_batching")
@pytest.mark.parametrize("tables", [0, 64], ids=["places", "pages"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_graphs_and_asynchronous_batches_on_our_attention_say_what_generate_says(family, tables):
    from test_serving_attention import generated, model_of, prompts_of, served

    model, prompts = model_of(family).to(CUDA), prompts_of((1, 5, 23, 9, 40, 17))
    with CUDA:
        expected = generated(model, prompts)
    with attention.installed(model):
        for asynchronous in (False, True):
            got, _ = served(
                model, prompts, tables=tables, use_cuda_graph=True,
                use_async_batching=asynchronous,
            )  # fmt: skip
            assert got == expected


@pytest.mark.usefixtures("continuous_batching")
def test_an_engine_with_graphs_and_asynchronous_batches_says_what_one_without_says(judge):
    """Token for token, in fp32; what peft says on a CPU is what both say."""
    from serving_models import SPECS, ask, engine_of, prompts_of, served_model

    names = [*SPECS, None, *SPECS, None]
    prompts = prompts_of(*(7 * i % 41 + 1 for i in range(len(names))))
    expected = judge.answers(prompts, names, 12)
    for graphs in (False, True):
        settings = {"use_cuda_graph": graphs, "use_async_batching": graphs}
        with engine_of(served_model().to(CUDA), judge.folders, **settings) as engine:
            # Graphs of several sizes, and each of them replayed.
            for count in (len(names), 3, 1, len(names)):
                assert ask(engine, prompts[:count], names[:count], 12) == expected[:count]
            used = engine._manager.continuous_batching_config
            assert (any(used.cuda_graph_booleans), used.use_async_batching) == (graphs, graphs)


@pytest.mark.usefixtures("continuous_batching")
@pytest.mark.parametrize("asynchronous", [False, True], ids=["one-by-one", "asynchronous"])
def test_penalties_are_of_tokens_that_the_host_does_not_know_yet(judge, asynchronous):
    from serving_models import SPECS, engine_of, prompts_of, served_model

    names, penalties = [*SPECS, None], [1.3, 1.0, 0.8, 2.5, 1.2]
    prompts = prompts_of(9, 12, 31, 4, 17)
    asked = list(zip(prompts, names, penalties, strict=True))
    expected = [judge.answer(p, name, 24, repetition_penalty=each) for p, name, each in asked]
    settings = {"use_cuda_graph": True, "use_async_batching": asynchronous}
    # And more requests than there are places for those of two a batch.
    settings["max_requests_per_batch"] = 2
    asked, expected = asked * 2, expected * 2
    with engine_of(served_model().to(CUDA), judge.folders, **settings) as engine:
        for _ in range(2):  # captured, and replayed
            requests = [
                engine.submit(p, name, repetition_penalty=each, max_new_tokens=24, ignore_eos=True)
                for p, name, each in asked
            ]
            assert [request.result(60).token_ids for request in requests] == expected


@pytest.mark.usefixtures("continuous_batching")
@pytest.mark.parametrize("asynchronous", [False, True], ids=["one-by-one", "asynchronous"])
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_batches_wait_for_the_stream_that_fills_their_buffers(
    monkeypatch, judge, graphs, asynchronous
):
    """Where other processes use the device, too, that stream may be behind all the others."""
    from serving_models import SPECS, ask, engine_of, prompts_of, served_model
    from transformers.generation.continuous_batching import input_outputs

    buffers, tensor = input_outputs.ContinuousBatchingIOs, torch.tensor
    reset = buffers._reset_static_tensors

    def reset_late(self, full_reset=False):
        if full_reset and self.device.type == "cuda":
            torch.cuda._sleep(300_000_000)  # cycles: 0.15 s
        reset(self, full_reset)

    def copied_late(*args, **kwargs):
        made = tensor(*args, **kwargs)
        if made.is_cuda:
            torch.cuda._sleep(3_000_000)
        return made

    monkeypatch.setattr(buffers, "_reset_static_tensors", reset_late)
    names, prompts = [*SPECS, None], prompts_of(1, 9, 12, 31, 4)
    expected = judge.answers(prompts, names, 4)
    settings = {"use_cuda_graph": graphs, "use_async_batching": asynchronous}
    for _ in range(2):  # the first time kernels are compiled, which takes longer than that stream
        with engine_of(served_model().to(CUDA), judge.folders, **settings) as engine:
            # By which transformers copies a batch to where it is read.
            monkeypatch.setattr(torch, "tensor", copied_late)
            got = ask(engine, prompts, names, 4)
            monkeypatch.setattr(torch, "tensor", tensor)
        assert got == expected


@pytest.mark.usefixtures("continuous_batching")
def test_an_engine_s_graphs_serve_adapters_that_were_loaded_after_their_capture(judge):
    from serving_models import SPECS, ask, engine_of, prompts_of, served_model

    names, prompts = list(SPECS), prompts_of(9, 12, 31, 4)
    expected = judge.answers(prompts, names, 8)
    alone = judge.answers(prompts, ["qv-16"] * len(prompts), 8)
    settings = {"use_cuda_graph": True, "use_async_batching": True}
    with engine_of(served_model().to(CUDA), None, **settings) as engine:
        ask(engine, prompts, None, 8)  # captured without any adapter
        for name in ("qv-16", *names):
            # At first q, k and v alone have launches for adapters, then more.
            engine.adapters.load(name, judge.folders[name])
            assert ask(engine, prompts, "qv-16", 8) == alone
        assert ask(engine, prompts, names, 8) == expected
        engine.adapters.unload(names[0])
        engine.adapters.load("again", judge.folders[names[1]])
        assert ask(engine, prompts[1:2], ["again"], 8) == expected[1:2]


def test_a_captured_step_has_its_time_measured_in_turn_with_the_base_s():
    """The measuring itself: shares above 1 would mean that something was not run."""
    model, slots = small(4)
    step, rows, inputs, _ = captured(model, 64)
    rows.tell(in_turns(slots, 64))
    bare = Captured(model.step(inputs, inputs[0], None, None), CUDA, None)
    steps = {"frozen": bare.replay, "fastlora": step.replay}
    timings = measuring.in_rounds(steps, CUDA, rounds=5, turns=5)
    assert timings["fastlora"].over(timings["frozen"]).value > 1
