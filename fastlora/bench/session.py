"""A whole run: every case checked, timed and written down, until the time is up.

Everything is checked before it is timed, and written as soon as it is known, so that a run that is
cut short leaves what it has. What does not fit is left out and named: too large for the device, or
out of time.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from fastlora.bench import counting, measuring, modules, operations, planning, results, steps
from fastlora.bench.checking import WrongResult
from fastlora.bench.measuring import Step
from fastlora.bench.planning import Item, Options
from fastlora.bench.results import Row
from fastlora.timing import measure_us

GIB, MIB = 2**30, 2**20

Tick = Callable[[int, str], None]
# A provider's step, and its largest error as a share of what is allowed.
Checked = dict[str, tuple[Step, "float | None"]]


class Session:
    """One run.

    Args:
        options: what to measure.
        folder: where the rows go, a CSV file for each level, in place of those of an earlier run.

    Attributes:
        rows: what was found so far.
        notes: what was left out, in sentences.
        failed: whether something failed while it was timed (a note says what).
        ticks: of a progress bar for the whole run.
    """

    def __init__(self, options: Options, folder: Path) -> None:
        self.options = options
        self.rows: list[Row] = []
        self.notes = planning.left_out(options)
        self.failed = False
        self._folder = folder
        self._writers: dict[str, Callable[[Row], None]] = {}
        self._items = planning.plan(options)
        self._tick: Tick = lambda number, what: None
        self.ticks = sum(item.ticks for item in self._items)

    def run(self, tick: Tick | None = None) -> list[Row]:
        """Measure; returns the rows, which are also in the folder.

        Args:
            tick: called with a number of ticks and what they were for, as the run goes on.
        """
        self._tick = tick or self._tick
        self._folder.mkdir(parents=True, exist_ok=True)
        for level in ("roof", *planning.LEVELS):  # a folder holds one run
            (self._folder / f"{level}.csv").unlink(missing_ok=True)
        end = time.monotonic() + self.options.seconds
        left = sum(item.share for item in self._items)
        late: list[Item] = []
        threads = torch.get_num_threads()
        if not self.options.on_gpu:
            torch.set_num_threads(1)  # the clock adds up the time of all threads
        try:
            for item in self._items:
                remaining = end - time.monotonic()
                if remaining <= 0:
                    late.append(item)
                    self._tick(item.ticks, "out of time")
                else:
                    self._run(item, remaining * item.share / left)
                left -= item.share
        finally:
            torch.set_num_threads(threads)
        for level in dict.fromkeys(item.row.level for item in late):
            titles = [item.title for item in late if item.row.level == level]
            more = f" and {len(titles) - 1} more of this level" if len(titles) > 1 else ""
            self.notes.append(f"Out of time: {titles[0]}{more}.")
        return self.rows

    def _run(self, item: Item, seconds: float) -> None:
        ways: dict[str, Callable[[Item, float], None]] = {
            "roof": self._roofs,
            "counts": self._count,
            "layer": self._time_modules,
            "linear": self._time_modules,
            "operation": self._time_operation,
            "step": self._time_step,
        }
        try:
            with warnings.catch_warnings():
                # Deprecations of other packages, which a reader can do nothing about.
                warnings.simplefilter("ignore", FutureWarning)
                ways[item.row.level](item, seconds)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition("\n")[0]
            self.notes.append(f"Too large for the memory: {item.title} ({reason}).")
        except Exception as error:  # the rest of a long run must not be lost with one case
            self.failed = True
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            self.notes.append(f"Failed while it was timed: {item.title} ({reason}).")
        gc.collect()  # graphs and models hold on to each other
        if self.options.on_gpu:
            torch.cuda.empty_cache()

    def _write(self, row: Row) -> None:
        if row.level not in self._writers:
            self._writers[row.level] = results.writer(self._folder / f"{row.level}.csv")
        self._writers[row.level](row)
        self.rows.append(row)

    def _roofs(self, item: Item, seconds: float) -> None:
        """Measure what the device reaches where nothing else is in the way."""
        options = self.options
        copy, product, size, flops = measuring.copy_and_product(options.device, options.dtype)
        timer = "eager" if options.on_gpu else "cpu"
        row = replace(item.row, provider="torch", timer=timer)
        self._write(replace(row, case="copy", moved_gib=size / GIB, **measuring.columns(copy)))
        self._write(replace(row, case="product", tflop=flops / 1e12, **measuring.columns(product)))
        self._tick(item.ticks, item.title)

    def _count(self, item: Item, seconds: float) -> None:
        row, as_h200 = item.row, item.row.counted_as == "H200"
        dtype = torch.bfloat16 if as_h200 else self.options.dtype
        for provider in self.options.countable(row.dropout, row.counted_as):
            try:
                forward, backward = counting.record_layer(
                    provider.name, item.linears, row.tokens, row.rank, row.dropout, dtype,
                    as_h200=as_h200,
                ).counts  # fmt: skip
            except Exception as error:  # it may not run on tensors that have no data
                self._refuse(row, provider.name, error)
                continue
            both = forward + backward
            counted = replace(row, provider=provider.name, launches=both.launches)
            self._write(
                replace(
                    counted,
                    moved_gib=both.bytes / GIB,
                    saved_mib=forward.saved / MIB,
                    tflop=both.flops / 1e12,
                )
            )
        counting.clear()
        self._tick(item.ticks, item.title)

    def _time_modules(self, item: Item, seconds: float) -> None:
        row, options = item.row, self.options
        case = modules.Case(
            item.linears, row.tokens, row.rank, row.dropout, options.device, options.dtype
        )
        providers = options.providers_for(row.level, row.dropout)
        checked = self._checked(item, {p.name: partial(case.checked_step, p) for p in providers})
        case.forget_reference()
        self._time(item, checked, seconds)

    def _time_operation(self, item: Item, seconds: float) -> None:
        row, options = item.row, self.options
        (shape,) = item.linears.values()
        built = operations.build(
            item.operation, shape, row.tokens, row.rank, row.dropout, options.device, options.dtype
        )

        def checked_run(name: str) -> tuple[Step, float | None]:
            return built.runs[name], built.check(name)

        checked = self._checked(item, {name: partial(checked_run, name) for name in built.runs})
        self._time(item, checked, seconds)

    def _time_step(self, item: Item, seconds: float) -> None:
        row, options = item.row, self.options
        assert item.model is not None
        needed = steps.needed_bytes(item.model, row.tokens, options.dtype)
        if options.on_gpu and needed > torch.cuda.mem_get_info(options.device)[0]:
            raise torch.OutOfMemoryError(f"about {needed / GIB:.0f} GiB")
        built = steps.TrainingStep(
            item.model, row.tokens, row.rank, row.dropout, options.device, options.dtype,
            item.variant,
        )  # fmt: skip
        providers = steps.providers(options.providers_for("step", row.dropout))
        checked = self._checked(item, {p.name: partial(built.checked_step, p) for p in providers})
        self._time(item, checked, seconds, with_graphs=False)

    def _checked(
        self, item: Item, builds: Mapping[str, Callable[[], tuple[Step, float | None]]]
    ) -> Checked:
        """Build and check every provider; one that is wrong, or does not run, is refused."""
        checked: Checked = {}
        for name, build in builds.items():
            self._tick(1, f"{item.title}: checking {name}")
            try:
                step, gate = build()
                step()
            except Exception as error:  # another library's failure is a result
                self._refuse(item.row, name, error)
                gc.collect()
            else:
                checked[name] = step, gate
        return checked

    def _refuse(self, row: Row, provider: str, error: Exception) -> None:
        """Write down why a provider has no figures here."""
        reason = str(error)
        if not isinstance(error, WrongResult):
            reason = f"did not run: {type(error).__name__}: {error}".partition("\n")[0]
        self._write(replace(row, provider=provider, refused=reason))

    def _time(self, item: Item, checked: Checked, seconds: float, with_graphs: bool = True) -> None:
        device, rounds = self.options.device, self.options.rounds
        eager = {name: step for name, (step, _) in checked.items()}
        turns = measuring.turns_for(eager, device, rounds, seconds)

        def before_round() -> None:
            self._tick(1, f"{item.title}: {rounds} rounds of {turns} turns")

        graphs = self._captured(item, eager) if self.options.on_gpu and with_graphs else {}
        timer = ("graph" if graphs else "eager") if self.options.on_gpu else "cpu"
        timings = measuring.in_rounds(
            graphs or eager, device, rounds=rounds, turns=turns, before_round=before_round
        )
        graphs.clear()  # their memory is needed for what follows
        for name, timing in timings.items():
            others = timings.get("frozen"), timings.get("fastlora")
            row = replace(
                item.row,
                provider=name,
                timer=timer,
                gate=checked[name][1],
                **measuring.columns(timing, *others),
            )
            if row.level == "step":
                row = replace(row, tokens_per_s=1e6 * row.tokens / timing.quantile_us(0.5))
            if self.options.on_gpu:
                row = self._with_gpu_columns(row, eager[name])
            self._write(row)

    def _captured(self, item: Item, eager: Mapping[str, Step]) -> dict[str, Step]:
        """Capture every step in a CUDA graph; none, if one of them cannot be."""
        pool = torch.cuda.graph_pool_handle()
        try:
            return {name: measuring.captured(step, pool) for name, step in eager.items()}
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self.notes.append(f"Without CUDA graphs: {item.title} ({reason}).")
            return {}

    def _with_gpu_columns(self, row: Row, step: Step) -> Row:
        device = self.options.device
        eager_us = row.median_us
        if row.timer == "graph":
            eager_us = statistics.median(measure_us({"": step}, device, 5)[""])
        return replace(
            row, eager_us=eager_us, host_us=measuring.host_us(step, device),
            peak_mib=measuring.peak_mib(step, device),
            launches=steps.launches(step) if row.level == "step" else None,
        )  # fmt: skip


@contextlib.contextmanager
def progress(ticks: int) -> Iterator[Tick]:
    """Show how far a run is and what it does: a bar on a terminal, else a line for each case."""
    from tqdm import tqdm

    with tqdm(total=ticks, unit="", leave=False, dynamic_ncols=True, disable=None) as bar:

        def tick(number: int, what: str) -> None:
            case, _, doing = what.partition(": ")
            bar.set_description_str(case)
            bar.set_postfix_str(doing)
            bar.update(number)

        yield by_case(partial(print, file=sys.stderr, flush=True)) if bar.disable else tick


def by_case(say: Callable[[str], None]) -> Tick:
    """Return a tick that says each case once, as it begins."""
    said = ""

    def tick(number: int, what: str) -> None:
        nonlocal said
        case = what.partition(": ")[0]
        if case != said:
            say(case)
        said = case

    return tick
