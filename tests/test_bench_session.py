"""A whole run: its files and rows, and that one failure does not cost the rest."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_session import CPU, TINY, names, options_for

from fastlora import plans
from fastlora.bench import (
    counting,
    environment,
    measuring,
    modules,
    planning,
    providers,
    results,
    session,
    summary,
)
from fastlora.bench.measuring import Timing
from fastlora.bench.planning import LEVELS
from fastlora.bench.providers import PROVIDERS, Provider
from fastlora.bench.session import Session
from fastlora.bench.shapes import Linear


@pytest.fixture(autouse=True)
def poisoned_empty():
    """Override the fixture of all tests: filling what fastlora allocates would be counted."""


@pytest.fixture(autouse=True)
def same_providers():
    """Leave the providers as they were."""
    before = dict(PROVIDERS)
    yield
    PROVIDERS.clear()
    PROVIDERS.update(before)


@pytest.fixture(scope="module")
def fast():
    """Time everything once a round; interpret no kernels; collect no garbage (0.2 s a case)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "turns_for", lambda steps, device, rounds, seconds: 1)
        patch.setattr(session, "gc", SimpleNamespace(collect=lambda: None))
        patch.setattr(plans, "interpreting", lambda: False)
        plans.unsupported_reason.cache_clear()
        yield
    plans.unsupported_reason.cache_clear()


@pytest.fixture
def short(fast, monkeypatch):
    """The same, and do not measure the machine's roofs, which takes a second."""
    roof = Timing(((1.0,),) * 5)
    monkeypatch.setattr(measuring, "copy_and_product", lambda device, dtype: (roof, roof, 1, 1))


@pytest.fixture(scope="module")
def whole(fast, tmp_path_factory) -> tuple[Session, Path, list[tuple[int, str]]]:
    """Every level of a tiny model on this CPU."""
    folder = tmp_path_factory.mktemp("session") / "made"
    made, ticks = Session(options_for(levels=LEVELS), folder), []
    made.run(lambda number, what: ticks.append((number, what)))
    return made, folder, ticks


def test_a_session_writes_a_file_for_every_level_with_every_row(whole):
    session, folder, _ = whole
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{level}.csv" for level in (*LEVELS, "roof")
    )
    assert {row.key for row in results.read_folder(folder)} == {row.key for row in session.rows}
    assert len(results.read_folder(folder)) == len(session.rows)
    assert len({row.key for row in session.rows}) == len(session.rows)
    assert session.notes == []


def test_every_row_says_what_it_was_measured_with(whole):
    facts = environment.facts(CPU)
    for row in whole[0].rows:
        assert {name: getattr(row, name) for name in facts} == facts


def test_every_row_was_checked_timed_in_turn_and_compared(whole):
    timed = [row for row in whole[0].rows if row.level not in ("counts", "roof")]
    ours = {"layer", "linear", "step", "operation"}
    assert {row.level for row in timed if row.provider == "fastlora"} == ours
    for row in timed:
        assert not row.refused
        assert (row.timer, row.rounds) == ("cpu", 5)
        assert 0 < row.p20_us <= row.median_us <= row.p80_us
        assert row.over_fastlora_low <= row.over_fastlora <= row.over_fastlora_high
        if row.provider == "fastlora":
            assert row.over_fastlora == row.over_fastlora_low == row.over_fastlora_high == 1.0
        unchecked = ("frozen", "torch") if row.level == "operation" else ("frozen",)
        assert row.gate is None if row.provider in unchecked else 0 <= row.gate <= 1
        of_step = 1e6 * row.tokens / row.median_us if row.level == "step" else None
        assert row.tokens_per_s == of_step
        if row.level in ("layer", "linear", "step"):
            assert row.over_frozen_low <= row.over_frozen <= row.over_frozen_high
        assert row.launches is row.eager_us is row.host_us is row.peak_mib is None


def test_counted_rows_are_what_the_counter_counts(whole):
    counted = [row for row in whole[0].rows if row.level == "counts"]
    assert [(row.counted_as, row.provider) for row in counted] == [
        (device, one.name)
        for device in ("H200", "cpu")
        for one in options_for().countable(0.1, device)
    ]
    for row in counted:
        as_h200 = row.counted_as == "H200"
        dtype = torch.bfloat16 if as_h200 else torch.float32
        forward, backward = counting.record_layer(
            row.provider, TINY.linears, 16, 4, 0.1, dtype, as_h200=as_h200
        ).counts
        both = forward + backward
        assert (row.launches, row.moved_gib) == (both.launches, both.bytes / 2**30)
        assert (row.saved_mib, row.tflop) == (forward.saved / 2**20, both.flops / 1e12)
        assert row.median_us is None
    counting.clear()


def test_the_roofs_of_the_device_are_measured(whole):
    copy, product = (row for row in whole[0].rows if row.level == "roof")
    assert (copy.case, product.case) == ("copy", "product")
    found = summary.roofs(whole[0].rows)
    # Of this machine; the slowest that runs the tests is within these.
    assert 1e8 < found.bytes_per_s < 1e13
    assert 1e8 < found.flops_per_s < 1e15


def test_progress_names_every_case_and_what_is_checked(whole):
    session, _, ticks = whole
    said = [what for _, what in ticks]
    for title in {item.title for item in planning.plan(session.options)}:
        assert any(what.startswith(title) for what in said)
    assert "layer, tiny layer, 16 tokens, rank 4, dropout 0.1: checking peft" in said
    assert said[-1].endswith(": 5 rounds of 1 turns")


def test_the_ticks_of_a_run_add_up(short, tmp_path):
    session, ticks = Session(options_for(levels=["layer", "linear", "step"]), tmp_path), []
    session.run(lambda number, what: ticks.append(number))
    assert sum(ticks) == session.ticks


def test_a_run_has_one_thread_and_gives_the_others_back(short, tmp_path, monkeypatch):
    before = torch.get_num_threads()
    seen = []
    try:
        torch.set_num_threads(3)
        Session(options_for(), tmp_path).run(lambda *_: seen.append(torch.get_num_threads()))
        assert torch.get_num_threads() == 3
        assert set(seen) == {1}

        def stop(number: int, what: str) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Session(options_for(), tmp_path).run(stop)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_what_is_not_begun_in_time_is_left_out_and_named(short, tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def tick(number: int, what: str) -> None:
        clock.now += 4.5 * what.startswith("counts")
        ticks.append(number)

    ticks = []
    made = Session(
        options_for(levels=["counts", "layer", "linear"], ranks=(4, 8, 2), seconds=25.0), tmp_path
    )
    rows = made.run(tick)
    assert {(row.level, row.rank) for row in rows if row.level != "roof"} == {
        ("counts", 4), ("counts", 8), ("counts", 2),
    }  # fmt: skip
    assert made.notes == [
        "Out of time: layer, tiny layer, 16 tokens, rank 4, dropout 0.1 and 2 more of this level.",
        "Out of time: linear, tiny q_proj, 16 tokens, rank 4, dropout 0.1 and 14 more of this "
        "level.",
    ]
    assert sum(ticks) == made.ticks


def test_every_case_gets_its_share_of_the_time_that_is_left(short, tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: clock.now))
    given = []

    def run(self, item: planning.Item, seconds: float) -> None:
        given.append((item.row.level, seconds))
        clock.now += seconds / 2  # so that the others get more

    monkeypatch.setattr(Session, "_run", run)
    Session(options_for(levels=["layer", "linear"], seconds=100.0), tmp_path).run()
    assert [level for level, _ in given] == ["roof", "layer", *["linear"] * 5]
    seconds = [each for _, each in given]
    # A layer counts 8, a linear 2, the roofs 0.5.
    assert seconds[0] == pytest.approx(100 * 0.5 / 18.5)
    assert seconds[1] == pytest.approx((100 - seconds[0] / 2) * 8 / 18)
    assert seconds[-1] == pytest.approx(100 - sum(seconds[:-1]) / 2)


def test_what_does_not_fit_the_memory_is_named_and_the_rest_goes_on(short, tmp_path, monkeypatch):
    class Large(modules.Case):
        def __init__(self, linears, *args):
            if "gate_proj/up_proj" in linears:
                raise torch.OutOfMemoryError("Tried to allocate 96 GiB.\nMore lines")
            super().__init__(linears, *args)

    monkeypatch.setattr(modules, "Case", Large)
    made = Session(options_for(levels=["layer", "linear"]), tmp_path)
    rows = made.run()
    cases = {row.case for row in rows if row.level == "linear"}
    assert cases == {"q_proj", "k_proj/v_proj", "o_proj", "down_proj"}
    assert any(row.level == "layer" for row in rows)
    assert made.notes == [
        "Too large for the memory: linear, tiny gate_proj/up_proj, 16 tokens, rank 4, dropout 0.1 "
        "(Tried to allocate 96 GiB.)."
    ]


def fails(layer: torch.nn.Module) -> torch.nn.Module:
    raise NotImplementedError("no kernel for float32\nand more")


BROKEN = Provider("broken", "for a test", fails)


@pytest.mark.parametrize("level", ["layer", "linear"])
def test_a_provider_that_does_not_run_is_refused_and_the_rest_is_timed(short, tmp_path, level):
    providers.register(BROKEN)
    made = Session(options_for(levels=[level]), tmp_path)
    rows = [row for row in made.run() if row.level == level]
    for case in {row.case for row in rows}:
        refused = [row for row in rows if row.case == case and row.refused]
        reason = "did not run: NotImplementedError: no kernel for float32"
        assert [(row.provider, row.refused) for row in refused] == [("broken", reason)]
        timed = [row.provider for row in rows if row.case == case and row.median_us]
        assert timed == names(options_for(), level, 0.1)[:-1]
    assert made.notes == []


def test_a_provider_that_cannot_be_counted_does_not_end_the_run(short, tmp_path):
    ours = PROVIDERS.pop("fastlora")
    providers.register(BROKEN)
    providers.register(ours)  # counted after it
    rows = Session(options_for(levels=["counts", "layer"]), tmp_path).run()
    for level in ("counts", "layer"):
        found = {row.provider: row.refused for row in rows if row.level == level}
        reason = "did not run: NotImplementedError: no kernel for float32"
        assert (found["broken"], found["fastlora"]) == (reason, "")


def test_a_provider_that_fails_while_it_is_timed_does_not_end_the_run(short, tmp_path, monkeypatch):
    timed = []
    in_rounds = measuring.in_rounds

    def watched(*args, **kwargs):
        timed.append(True)
        return in_rounds(*args, **kwargs)

    class Flaky(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            if len(timed) == 1:
                raise ConnectionError("lost")
            return self.layer(x)

    monkeypatch.setattr(measuring, "in_rounds", watched)
    providers.register(Provider("flaky", "for a test", Flaky))
    linears = {"a": Linear(8, 8), "b": Linear(8, 8)}
    made = Session(options_for(levels=["linear"], models=[], linears=linears), tmp_path)
    rows = made.run()
    assert {row.provider for row in rows if row.model == "b"} >= {"flaky", "fastlora"}
    case = "linear, a linear, 16 tokens, rank 4, dropout 0.1"
    assert made.notes == [f"Failed while it was timed: {case} (ConnectionError: lost)."]


def test_a_provider_that_needs_too_much_memory_alone_is_left_out(short, tmp_path):
    def large(layer):
        raise torch.OutOfMemoryError("Tried to allocate 96 GiB.")

    providers.register(Provider("large", "for a test", large))
    rows = Session(options_for(), tmp_path).run()
    assert "fastlora" in {row.provider for row in rows if row.level == "layer"}


def test_without_a_terminal_progress_is_a_line_for_each_case(capsys):
    with session.progress(3) as tick:
        tick(1, "layer, a: checking peft")
        tick(1, "layer, a: 5 rounds of 2 turns")
        tick(1, "layer, b: checking peft")
    assert capsys.readouterr().err == "layer, a\nlayer, b\n"
