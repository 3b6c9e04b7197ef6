"""Models that are served, and what becomes of their linears."""

from __future__ import annotations

import pytest
import small_engines
import torch
import transformers
from serving_models import (
    SPECS,
    Judge,
    ask,
    engine_of,
    prompts_of,
    served_model,
    state_of,
    with_adapters,
)
from small_engines import TOKENIZER, WORDS
from torch import nn
from torch.nn import functional

import fastlora
from fastlora.adapters.pool import AdapterPool
from fastlora.segments import Segments
from fastlora.serving import linears

judge = small_engines.judge


def test_a_folder_is_a_model(judge, tmp_path):
    served_model(**WORDS).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with fastlora.Engine(
        tmp_path, judge.folders, adapter_memory="1MB", dtype=torch.float32, device="cpu"
    ) as engine:
        prompt = TOKENIZER("hi")["input_ids"]
        assert ask(engine, ["hi"], "rs-8", 5) == [judge.answer(prompt, "rs-8", 5)]
        assert str(tmp_path) in repr(engine)
    for dtype in (torch.bfloat16, "bfloat16"):
        model = served_model(**WORDS)
        with fastlora.Engine(model, adapter_memory="1MB", dtype=dtype) as engine:
            assert engine.adapters.dtype == torch.bfloat16


def test_copies_in_host_memory_have_the_room_that_is_given():
    with fastlora.Engine(served_model(), adapter_memory="1MB", host_memory="3MB") as engine:
        assert engine.adapters.memory_total <= 1_000_000 < engine.adapters._host_room == 3_000_000


def test_on_a_cpu_the_cache_is_bounded():
    """transformers would take more than half of what is free."""
    for asked in (None, transformers.ContinuousBatchingConfig(page_size=64)):
        with fastlora.Engine(served_model(), adapter_memory="1MB", batching=asked) as engine:
            manager = engine._running()
            assert manager.room == 32768
            assert manager.batch_processor.cache.cache_tensor.nbytes < 2**25
        assert asked is None or asked.num_blocks is None


class _Scaled(nn.Linear):
    """Stands for a linear of another library, such as a quantized one."""

    def forward(self, input):
        return functional.linear(input, self.weight * 0.5, self.bias)


@pytest.mark.parametrize("kind", ["subclass", "replaced forward"])
def test_linears_that_others_made_keep_what_they_do(kind, tmp_path):
    def model():
        made = served_model()
        layer = made.model.layers[1].self_attn
        for linear in (layer.k_proj, layer.o_proj):
            if kind == "subclass":
                linear.__class__ = _Scaled
            else:
                linear.forward = lambda x, own=linear: functional.linear(
                    x, own.weight * 0.5, own.bias
                )
        return made

    judge = Judge(tmp_path, {"all-4": SPECS["all-4"]})
    base = model()
    state = state_of(base)
    prompt = prompts_of(9)[0]
    before = base(torch.tensor([prompt])).logits
    with engine_of(base, judge.folders) as engine:
        plain = ask(engine, [prompt], None, 6)
        (found,) = ask(engine, [prompt], "all-4", 6)
    assert state_of(base) == state
    assert torch.equal(base(torch.tensor([prompt])).logits, before)
    # The weights halved, and then plain linears: the same.
    halved = served_model()
    with torch.no_grad():
        for linear in (
            halved.model.layers[1].self_attn.k_proj,
            halved.model.layers[1].self_attn.o_proj,
        ):
            linear.weight *= 0.5
    with engine_of(halved, judge.folders) as engine:
        assert [found] == ask(engine, [prompt], "all-4", 6)
        assert plain == ask(engine, [prompt], None, 6)
    assert plain != [found]


def test_linears_that_are_called_with_other_rows(judge, tmp_path):
    """As experts are: allowed as long as no adapter changes them."""

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            y = self.first(x)
            return torch.cat([self.second(y[:1]), y[1:]])

    model = Half()
    x = torch.randn(4, 8)
    before = model(x)
    pool = AdapterPool(model, memory="64KiB")
    for name in ("first", "second"):
        spec = {"r": 2, "target_modules": [name], "init_lora_weights": False}
        with_adapters(Half(), {name: spec}).save_pretrained(tmp_path)
        pool.load(name, tmp_path / name)
    routing = linears.attach(model, pool)
    lease = pool.lease("first")
    assert pool.hold(lease)
    batch = linears.RowsOfSequences([lease.slot, 0], pool)
    with routing.batch(batch), torch.no_grad():
        with pytest.raises(linears.OtherRows, match="1 rows in a batch of 2 sequences"):
            model(x)
        pool.unload("second")
        found = model(x)
    assert not torch.equal(found[1], before[1])
    assert torch.equal(found[2:], before[2:])
    linears.detach(model)
    assert torch.equal(model(x), before)


def test_siblings_are_computed_once_unless_their_input_has_changed(judge):
    """q, k and v are computed together, and again where somebody changed x in between."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.q(x), self.k(x)

    model = Attention()
    pool = AdapterPool(model, memory="64KiB")
    spec = {"r": 2, "target_modules": ["q", "k"], "init_lora_weights": False}
    pool.load("it", with_adapters(Attention(), {"it": spec}))
    assert [group.names for group in pool.groups] == [("q", "k")]
    routing = linears.attach(model, pool)
    lease = pool.lease("it")
    assert pool.hold(lease)
    batch = linears.RowsOfSequences([lease.slot], pool)
    x, other = torch.randn(3, 8), torch.randn(3, 8)
    with torch.no_grad(), routing.batch(batch):
        expected = model.k(other.clone())
        model.q(x)
        assert len(batch.pending) == 1
        x.copy_(other)
        assert torch.equal(model.k(x), expected)
        model(x)
        with torch.inference_mode():
            assert torch.equal(model(other.clone())[1], expected)
    assert not batch.pending
    linears.detach(model)


def test_a_compiled_model_asks_every_batch(tmp_path):
    """Which adapters a batch has is no constant of what was compiled for another one."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.q(x) + self.k(x)

    model = Attention()
    pool = AdapterPool(model, memory="64KiB")
    for name, rank in (("one", 2), ("two", 3)):
        spec = {"r": rank, "target_modules": ["q", "k"], "init_lora_weights": False}
        pool.load(name, with_adapters(Attention(), {name: spec}))
    leases = [pool.lease(name) for name in ("one", "two")]
    assert all(map(pool.hold, leases))
    one, two = (lease.slot for lease in leases)
    routing = linears.attach(model, pool)
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(4, 8)
    with torch.no_grad():
        for slots in ([one, 0], [two, one], [0, two], [0, 0]):
            tokens = [slot for slot in slots for _ in range(2)]
            segments = Segments.of_slots(tokens, table=pool.slots)
            with routing.batch(linears.RowsOfTokens(segments, segments, pool.reach)):
                found = compiled(x)
            expected = model(x)
            for row, slot in enumerate(tokens):
                for linear in range(2) if slot else ():
                    (factors,) = pool.in_slots(linear, (slot,)).factors
                    h = factors.lora_a @ x[row]
                    expected[row] += factors.scaling * (factors.lora_b.t() @ h)
            torch.testing.assert_close(found, expected)
    linears.detach(model)
