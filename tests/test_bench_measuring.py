"""Times are taken in turn and compared within a round, whatever the machine's clock does."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from fastlora import timing
from fastlora.bench import measuring
from fastlora.bench.measuring import Timing
from fastlora.bench.results import Ratio

CPU = torch.device("cpu")


class Machine:
    """A machine whose time passes only while a step runs, and whose speed drifts."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slowness = 1.0
        self.ran: list[str] = []

    def step(self, name: str, us: float):
        def run() -> None:
            self.ran.append(name)
            self.now += self.slowness * us / 1e6

        return run

    def clock(self) -> float:
        return self.now


@pytest.fixture
def machine(monkeypatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(timing, "time", SimpleNamespace(process_time=machine.clock))
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=machine.clock))
    return machine


def test_a_drift_between_rounds_changes_times_and_no_ratio(machine):
    def twice_as_slow() -> None:
        machine.slowness *= 2

    steps = {"ours": machine.step("ours", 30), "theirs": machine.step("theirs", 40)}
    timings = measuring.in_rounds(steps, CPU, rounds=5, turns=3, before_round=twice_as_slow)
    assert timings["ours"].medians_us == pytest.approx([60, 120, 240, 480, 960])
    ratio = timings["theirs"].over(timings["ours"])
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((4 / 3, 4 / 3, 4 / 3))
    assert ratio.is_stable


def test_a_ratio_is_the_median_of_the_rounds_with_the_smallest_and_largest():
    ours = Timing(((2.0,), (20.0,), (6.0,), (4.0,), (9.0,)))
    theirs = Timing(((1.0,), (10.0,), (1.0,), (1.0,), (6.0,)))
    # In rounds 2, 2, 6, 4, 1.5; of the medians over all rounds 6, of the sums 41 / 19.
    assert ours.over(theirs) == Ratio(2.0, 1.5, 6.0)


def test_the_figure_of_a_round_is_the_median_of_its_turns():
    ours = Timing(((1.0, 2.0, 900.0), (6.0, 4.0)))
    assert ours.medians_us == [2.0, 5.0]
    assert ours.over(Timing(((1.0,), (1.0,)))) == Ratio(3.5, 2.0, 5.0)


def test_times_of_other_rounds_are_no_ratio():
    with pytest.raises(ValueError, match="shorter"):
        Timing(((1.0,), (1.0,))).over(Timing(((1.0,),)))


@pytest.mark.parametrize(
    ("share", "us"), [(0.0, 1.0), (0.2, 1.8), (0.5, 3.0), (0.8, 24.0), (1.0, 100.0)]
)
def test_quantiles_are_of_all_turns_and_interpolated(share, us):
    assert Timing(((100.0, 2.0, 1.0), (3.0, 5.0))).quantile_us(share) == pytest.approx(us)


def test_quantiles_of_a_single_turn_are_that_turn():
    assert {Timing(((7.0,),)).quantile_us(share) for share in (0.0, 0.2, 0.5, 1.0)} == {7.0}


@pytest.mark.parametrize(("rounds", "turns"), [(4, 3), (0, 1), (5, 0)])
def test_too_few_rounds_or_turns_are_refused_before_anything_runs(machine, rounds, turns):
    with pytest.raises(ValueError, match=f"at least 5 rounds .* got {rounds} of {turns}"):
        measuring.in_rounds({"": machine.step("", 1)}, CPU, rounds=rounds, turns=turns)
    assert machine.ran == []


def test_steps_take_turns_in_alternating_order_after_one_run_each(machine):
    steps = {name: machine.step(name, 1) for name in "abc"}
    taken = timing.measure_us(steps, CPU, rounds=4)
    assert "".join(machine.ran) == "abc" + "abc" + "cba" + "abc" + "cba"
    assert {name: len(turns) for name, turns in taken.items()} == {"a": 4, "b": 4, "c": 4}


def test_every_round_has_every_turn_of_every_step(machine):
    steps = {name: machine.step(name, us) for name, us in (("a", 3), ("b", 5))}
    begun = []
    timings = measuring.in_rounds(
        steps, CPU, rounds=6, turns=2, before_round=lambda: begun.append(len(machine.ran))
    )
    assert list(timings) == ["a", "b"]
    for name, us in (("a", 3), ("b", 5)):
        assert [len(turns) for turns in timings[name].rounds_us] == [2] * 6
        assert timings[name].medians_us == pytest.approx([us] * 6)
    # Two turns of both in each round; in the first of them a run before that is not timed.
    assert begun == [0, 6, 10, 14, 18, 22]


def test_a_steady_drift_within_a_round_cancels_as_the_order_alternates(machine):
    def tiring(name: str):
        run = machine.step(name, 10)

        def step() -> None:
            run()
            machine.slowness += 0.1

        return step

    steps = {name: tiring(name) for name in ("first", "second")}
    timings = measuring.in_rounds(steps, CPU, rounds=5, turns=4)
    ratio = timings["second"].over(timings["first"])
    assert (ratio.low, ratio.high) == pytest.approx((1.0, 1.0))


def test_the_order_alternates_between_rounds_of_one_turn(machine):
    steps = {name: machine.step(name, 1) for name in "abc"}
    measuring.in_rounds(steps, CPU, rounds=5, turns=1)
    timed = [machine.ran[first : first + 3] for first in range(3, 18, 3)]
    assert {turn[0] for turn in timed} == {"a", "c"}


def test_the_first_run_is_not_timed(machine):
    costs = iter([5000.0] + [10.0] * 3)

    def step() -> None:
        machine.now += next(costs) / 1e6

    assert timing.measure_us({"": step}, CPU, rounds=3)[""] == pytest.approx([10.0] * 3)


def test_an_exception_before_a_round_ends_the_measurement(machine):
    def out_of_time() -> None:
        if len(machine.ran) >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measuring.in_rounds(
            {"": machine.step("", 1)}, CPU, rounds=9, turns=1, before_round=out_of_time
        )
    assert len(machine.ran) == 4


@pytest.mark.parametrize(
    ("seconds", "turns"),
    [
        pytest.param(0.001, 1, id="too-little-for-one"),
        pytest.param(8.0, 1, id="one"),
        pytest.param(25.0, 4, id="some"),
        pytest.param(85.0, 14, id="many"),
        pytest.param(1e6, 15, id="never-more"),
    ],
)
def test_turns_fill_the_time_that_all_rounds_have(machine, seconds, turns):
    steps = {"a": machine.step("a", 0.4e6), "b": machine.step("b", 0.8e6)}
    assert measuring.turns_for(steps, CPU, rounds=5, seconds=seconds) == turns
    assert machine.ran == ["a", "b"]
    if 1 < turns < 15:
        machine.now = 0.0
        measuring.in_rounds(steps, CPU, rounds=5, turns=turns)
        # Beside the first run, which is not timed.
        assert seconds - 6.0 <= machine.now - 1.2 <= seconds


class FakeCuda:
    """Stands in for torch in ``timing``: a device whose queue is a list of what it did."""

    uint8 = torch.uint8

    def __init__(self) -> None:
        self.queue: list[str] = []
        self.cuda = SimpleNamespace(Event=self._event, synchronize=self._synchronize)

    def _event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace(place=math.nan)

        def record() -> None:
            event.place = len(self.queue)
            self.queue.append("event")

        def elapsed_time(other: SimpleNamespace) -> float:
            assert self.queue[-1] == "synchronized"
            return float(other.place - event.place)

        event.record, event.elapsed_time = record, elapsed_time
        return event

    def _synchronize(self, device: torch.device) -> None:
        self.queue.append("synchronized")

    def empty(self, size: int, dtype: torch.dtype, device: torch.device) -> SimpleNamespace:
        assert size >= 126 << 20  # the largest L2 cache, a B200's
        return SimpleNamespace(zero_=lambda: self.queue.append("flush"))


def test_on_a_gpu_the_cache_is_flushed_before_each_turn_and_outside_of_its_time(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(timing, "torch", fake)
    steps = {name: (lambda name=name: fake.queue.append(name)) for name in "ab"}
    taken = timing.measure_us(steps, torch.device("cuda", 0), rounds=2)
    turn = "flush event {} event"
    turns = [turn.format(name) for name in "abba"]
    assert " ".join(fake.queue) == f"a b {' '.join(turns)} synchronized"
    # Two places in the queue are 2 "milliseconds".
    assert taken == {"a": [2000.0, 2000.0], "b": [2000.0, 2000.0]}


def test_the_roofs_are_a_copy_and_a_product_of_the_size_that_is_told(monkeypatch):
    seen = {}

    def once(steps, device, *, rounds, turns):
        for name, step in steps.items():
            seen[name] = step()
        return {name: Timing(((1.0,) * turns,) * rounds) for name in steps}

    monkeypatch.setattr(measuring, "in_rounds", once)
    copy, product, moved_bytes, flops = measuring.copy_and_product(CPU, torch.bfloat16)
    assert len(copy.rounds_us) == len(product.rounds_us) == measuring.MIN_ROUNDS
    assert moved_bytes == 2 * seen["copy"].nbytes
    rows, columns = seen["product"].shape
    assert flops == 2 * rows * columns * 1024
    assert seen["product"].dtype == torch.float32
