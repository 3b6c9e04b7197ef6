"""transformers' continuous batching on our attention says what ``generate`` says."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import DEVICE
from tiny_models import VOCABULARY, tiny_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager

from fastlora.serving import attention

# Lengths on both sides of a page of 4 tokens, and one prompt of several pages.
LENGTHS = (1, 4, 5, 23)
NEW = 6


def prompts_of(lengths):
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def generated(model, prompts, new=NEW):
    """Return what the model itself goes on with, prompt by prompt."""
    results = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        results.append(out[0, len(prompt) :].tolist())
    return results


def in_order(manager):
    """Let batches wait for what fills their buffers: our engine does, transformers does not."""
    create = manager._create_batch_processor

    def created():
        processor = create()
        inputs = processor.inputs_and_outputs
        if inputs.compute_stream is not None:
            torch.cuda.current_stream().synchronize()
            make_kwargs = inputs.get_model_kwargs

            def waited(*args, **kwargs):
                inputs.compute_stream.wait_stream(torch.cuda.current_stream())
                return make_kwargs(*args, **kwargs)

            inputs.get_model_kwargs = waited
        return processor

    manager._create_batch_processor = created


def served(model, prompts, new=NEW, *, tables=0, padded=False, **config):
    """Return the same by continuous batching, and how its batches were described."""
    settings = {"page_size": 4, "num_blocks": 64, "max_batch_tokens": 64, **attention.SETTINGS}
    manager = ContinuousBatchingManager(
        model,
        GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0),
        ContinuousBatchingConfig(**{**settings, **config}),
    )
    if tables:
        assert attention.read_by_block_tables(manager, tables)
    in_order(manager)
    manager.batch_processor = manager._create_batch_processor()
    manager.batch_processor.model_runner.pad_inputs |= padded
    described = []
    make_kwargs = manager.batch_processor.inputs_and_outputs.get_model_kwargs

    def watched(*args, **kwargs):
        made = make_kwargs(*args, **kwargs)
        real = None if model.device.type == "cuda" else int(made["cu_seq_lens_q"][-1])
        kind = "places" if made["block_table"] is None else "pages"
        described.append((kind, real, made["input_ids"].shape[1]))
        return made

    manager.batch_processor.inputs_and_outputs.get_model_kwargs = watched
    results = {}
    manager.start()
    try:
        ids = [manager.add_request(p, max_new_tokens=new, eos_token_id=-1) for p in prompts]
        while len(results) < len(ids):
            result = manager.get_result(timeout=1)
            assert result is not None or manager.is_running(), "the manager has stopped"
            if result is not None and result.is_finished():
                assert result.error is None, result.error
                results[result.request_id] = result.generated_tokens
    finally:
        manager.stop(block=True)
    return [results[name] for name in ids], described


def model_of(family="qwen2", **overrides):
    # Of weights as small as models begin with, attention changes no token.
    return tiny_model(family, initializer_range=0.3, **overrides).eval()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "qwen3-moe"])
def test_prompts_in_parts_among_generation(family):
    model, prompts = model_of(family), prompts_of(LENGTHS)
    expected = generated(model, prompts)
    with attention.installed(model):
        got, described = served(model, prompts, max_batch_tokens=8)
    assert got == expected
    assert max(tokens for _, tokens, _ in described) == 8


def test_whole_prompts():
    model, prompts = model_of(), prompts_of(LENGTHS)
    expected = generated(model, prompts)
    with attention.installed(model):
        assert served(model, prompts)[0] == expected


def test_shared_prefixes_and_a_cache_that_is_too_small():
    model = model_of()
    # Two of the prompts begin alike, and 12 blocks hold neither all of them nor their answers.
    prompts = prompts_of(LENGTHS)
    prompts += [prompts[3][:12] + prompts[2], prompts[3]]
    expected = generated(model, prompts)
    with attention.installed(model):
        got, _ = served(model, prompts, num_blocks=12, max_batch_tokens=16, safety_margin=0.0)
    assert got == expected


@pytest.mark.parametrize("padded", [False, True])
def test_batches_described_by_their_pages(padded):
    model, prompts = model_of(), prompts_of(LENGTHS)
    expected = generated(model, prompts)
    with attention.installed(model):
        # The longest sequence leaves what is described by pages before it is done.
        got, described = served(model, prompts, tables=24, padded=padded)
    assert got == expected
    assert {kind for kind, *_ in described} == {"places", "pages"}


def test_padded_batches():
    model, prompts = model_of(), prompts_of(LENGTHS)
    expected = generated(model, prompts)
    with attention.installed(model):
        got, described = served(
            model, prompts, padded=True, q_padding_interval_size=16, kv_padding_interval_size=64,
            max_batch_tokens=16,
        )  # fmt: skip
    assert got == expected
    assert any(tokens < size for _, tokens, size in described)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("mistral", {"sliding_window": 6}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    ],
)
def test_sliding_windows(family, overrides):
    model, prompts = model_of(family, **overrides), prompts_of(LENGTHS)
    expected = generated(model, prompts)
    assert expected != generated(model_of(family), prompts)
    with attention.installed(model):
        assert served(model, prompts)[0] == expected
        assert served(model, prompts, max_batch_tokens=8)[0] == expected


@pytest.mark.parametrize(
    ("family", "overrides", "settings"),
    [
        ("qwen2", {}, {"max_batch_tokens": 8}),
        ("qwen3", {}, {"tables": 32}),
        ("qwen2", {}, {"padded": True, "q_padding_interval_size": 8}),
        ("mistral", {"sliding_window": 4}, {"max_batch_tokens": 8}),
    ],
    ids=["parts", "pages", "padded", "window"],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without")
def test_kernel_serves_too(monkeypatch, family, overrides, settings):
    model, prompts = model_of(family, **overrides), prompts_of((1, 9, 4))
    expected = generated(model, prompts, 3)
    launches = []
    kernel = attention._kernel()
    monkeypatch.setattr(attention, "_takes_kernel", lambda query: True)
    monkeypatch.setattr(
        attention, "_kernel", lambda: lambda *a, **k: launches.append(1) or kernel(*a, **k)
    )
    with attention.installed(model):
        assert served(model, prompts, 3, **settings)[0] == expected
    assert launches


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "overrides", "tables"),
    [
        ("qwen2", {}, 0),
        ("qwen2", {}, 32),
        ("qwen3", {"head_dim": 64}, 32),
        ("mistral", {"sliding_window": 6}, 0),
    ],
)
def test_graphs_and_asynchronous_batches(family, overrides, tables):
    model, prompts = model_of(family, **overrides).to(DEVICE), prompts_of((*LENGTHS, 9, 2, 30))
    expected = generated(model, prompts)
    settings = {"use_cuda_graph": True, "use_async_batching": True, "max_requests_per_batch": 8}
    with attention.installed(model):
        for max_batch_tokens in (8, 64):
            got, described = served(
                model, prompts, tables=tables, max_batch_tokens=max_batch_tokens, **settings
            )
            assert got == expected
            assert ("pages" in {kind for kind, *_ in described}) == bool(tables)


def test_definition_is_softmax_of_the_tokens_before():
    torch.manual_seed(2)
    cached, queries, window = 5, 3, 4
    q, k, v = (torch.randn(queries, n, 8).double() for n in (4, 2, 2))
    pages = torch.randn(2, 12, 2, 8).double()
    before = pages.clone()
    # As in a ring, new tokens are written over cached ones, here over such as they still see.
    places = torch.randperm(11)[:cached]
    written = torch.cat((places[2:4], torch.tensor([11])))
    starts = [torch.tensor([0, n], dtype=torch.int32) for n in (queries, cached + queries)]
    out = attention.plain_paged_attention(
        q, k, v, *pages, *starts, scaling=0.3, read_index=places, write_index=written,
        window=window,
    )  # fmt: skip
    for t in range(queries):
        for head in range(4):
            scores, values = [], []
            for j in range(max(0, cached + t - window + 1), cached + t + 1):
                own = j - cached
                key = before[0, places[j], head // 2] if own < 0 else k[own, head // 2]
                values.append(before[1, places[j], head // 2] if own < 0 else v[own, head // 2])
                scores.append(math.exp(0.3 * float(q[t, head] @ key)))
            weights = torch.tensor(scores).double() / sum(scores)
            torch.testing.assert_close(out[t, head], weights @ torch.stack(values))
    assert torch.equal(pages[:, written], torch.stack((k, v)))
    others = [place for place in range(12) if place not in written]
    assert torch.equal(pages[:, others], before[:, others])


def test_definition_of_one_prompt_is_causal_attention():
    torch.manual_seed(2)
    q, k, v = (torch.randn(7, n, 8) for n in (4, 2, 2))
    starts = torch.tensor([0, 7, 7], dtype=torch.int32)
    out = attention.plain_paged_attention(
        q, k, v, torch.zeros(9, 2, 8), torch.zeros(9, 2, 8), starts, starts, scaling=8**-0.5,
        write_index=torch.arange(7),
    )  # fmt: skip
    expected = scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, expected[0].transpose(0, 1))


def test_nothing_of_other_models_is_changed():
    own, other = model_of(), model_of()
    known = dict(AttentionInterface._global_mapping)
    known.pop(attention.NAME, None)
    before, ids = own.config._attn_implementation, torch.tensor([prompts_of((9,))[0]])
    logits = own(ids).logits
    with attention.installed(own):
        assert own.config._attn_implementation == attention.NAME
        assert other.config._attn_implementation == before
        assert torch.equal(other(ids).logits, logits)
        with pytest.raises(RuntimeError, match="send requests to the engine, or close it"):
            own(ids)
        with pytest.raises(RuntimeError, match="close it first"), attention.installed(own):
            pass
    assert own.config._attn_implementation == before
    assert torch.equal(own(ids).logits, logits)
    now = dict(AttentionInterface._global_mapping)
    assert now.pop(attention.NAME) is attention.attention_forward
    assert now == known
    assert "flash_attention_2" in now
    assert all(function.__module__.startswith("transformers.") for function in now.values())


def test_model_goes_back_when_serving_fails():
    model = model_of()
    before = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), attention.installed(model):
        raise ZeroDivisionError
    assert model.config._attn_implementation == before


def test_model_without_exchangeable_attention_is_refused():
    with pytest.raises(ValueError, match="Linear has no attention that can be exchanged"):
        attention.installed(torch.nn.Linear(2, 2)).__enter__()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"attention_mask": torch.ones(1)}, "an attention mask"),
        ({"dropout": 0.1}, "dropout"),
        ({"softcap": 30.0, "s_aux": torch.ones(4)}, "capped scores or attention sinks"),
        ({"is_causal": False}, "attention to later tokens"),
        ({"value": torch.zeros(1, 2, 3, 4)}, "values of another width"),
    ],
)
def test_what_is_not_computed_is_refused(argument, message):
    heads = torch.zeros(1, 2, 3, 8)
    given = {
        "query": heads,
        "key": heads,
        "value": heads,
        "attention_mask": None,
        "cache": object(),
    }
    lengths = {"cu_seq_lens_q": torch.zeros(2), "cu_seq_lens_k": {}, "max_length_k": {}}
    with pytest.raises(ValueError, match=message):
        attention.attention_forward(torch.nn.Module(), **{**given, **lengths, **argument})


def test_cache_in_another_dtype_is_refused():
    with pytest.raises(ValueError, match=r"float32.*the cache torch\.float16"):
        attention._check_dtype(*[torch.zeros(1)] * 3, torch.zeros(1, dtype=torch.float16))


def test_block_tables_are_not_for_sliding_windows():
    model = model_of("mistral", sliding_window=6)
    with attention.installed(model):
        manager = ContinuousBatchingManager(
            model, GenerationConfig(eos_token_id=-1), ContinuousBatchingConfig(**attention.SETTINGS)
        )
        assert not attention.read_by_block_tables(manager, 32)
        assert manager.continuous_batching_config.max_blocks_per_request == 0
