"""What a run measures: the cases that follow from its options and from the kind of device alone.

So two runs with the same options have the same cases, however fast the machine is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from fastlora.bench import results, steps
from fastlora.bench.environment import facts
from fastlora.bench.measuring import MIN_ROUNDS
from fastlora.bench.operations import OPERATIONS
from fastlora.bench.providers import PROVIDERS, Provider, find
from fastlora.bench.results import Row
from fastlora.bench.shapes import DROPOUT, RANK, Linear, Model

LEVELS = ("counts", "layer", "step", "linear", "operation")

# On a CPU a layer is timed with so many tokens, by the number of its weights; above, not at all.
_CPU_TOKENS = ((60e6, 256), (400e6, 64))
_CPU_STEP = (2, 4096)  # layers and vocabulary of a training step there
# On a CPU these would compute what others do (every plan is the plain one), or compile longer than
# all the rest is timed.
_NOT_ON_A_CPU = ("peft-compiled", "fastlora-fused", "fastlora-hybrid")
_OPERATION_LINEARS = ("q_proj", "gate_proj", "down_proj")
# Of the time that a run has, relative to the other cases.
_SHARES = {"roof": 0.5, "counts": 1.0, "layer": 8.0, "step": 8.0, "linear": 2.0, "operation": 1.0}


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        models: whose shapes are timed.
        counted: whose are counted; by default the same.
        stepped: of which a training step is timed, with the first number of tokens; by default the
            same.
        linears: single linears that are timed as well, by a name for each.
        tokens: rows of the input. On a CPU at most 256, and 64 for a layer of more than 60 million
            weights; from 400 million on nothing is timed there.
        ranks: of the adapters.
        dropouts: ``lora_dropout``.
        levels: of ``LEVELS``.
        providers: names, beside ``frozen`` and ``fastlora``; by default all that make sense on the
            device.
        device: where it is timed.
        dtype: of the frozen weights, while timed. What is counted as on an H200 is bf16; on a CPU
            what is timed is counted as well.
        rounds: at least five (see ``measuring.in_rounds``).
        seconds: what the run may take; what is not begun by then is left out.
        commit: what is measured, if it is not git's HEAD.

    Raises:
        ValueError: an unknown level or provider, a size that is not positive, too few rounds.
    """

    models: Sequence[Model] = ()
    counted: Sequence[Model] | None = None
    stepped: Sequence[Model] | None = None
    linears: Mapping[str, Linear] = field(default_factory=dict)
    tokens: Sequence[int] = (8192,)
    ranks: Sequence[int] = (RANK,)
    dropouts: Sequence[float] = (DROPOUT, 0.0)
    levels: Sequence[str] = LEVELS
    providers: Sequence[str] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    rounds: int = 7
    seconds: float = 480.0
    commit: str | None = None

    def __post_init__(self) -> None:
        if unknown := [level for level in self.levels if level not in LEVELS]:
            raise ValueError(f"there is no level {unknown[0]!r}; there are {', '.join(LEVELS)}")
        if min((*self.tokens, *self.ranks), default=0) < 1 or self.seconds <= 0:
            raise ValueError(
                f"tokens, rank and time must be positive, got tokens {list(self.tokens)}, rank "
                f"{list(self.ranks)} and {self.seconds:g} s"
            )
        if small := [each for each in self.linears.values() if min(each.n, each.k) < 1]:
            raise ValueError(f"out and in features must be positive, got {small[0].n} {small[0].k}")
        if wrong := [p for p in self.dropouts if not 0.0 <= p < 1.0]:
            raise ValueError(f"dropout must lie in [0, 1), got {wrong[0]}")
        if self.rounds < MIN_ROUNDS:
            raise ValueError(
                f"rounds must be at least {MIN_ROUNDS} for a spread, got {self.rounds}"
            )
        for name in self.providers or ():
            find(name)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def providers_for(self, level: str, p: float) -> list[Provider]:
        """Return those that can be timed at a level and a dropout."""
        if self.providers is not None:
            found = self._named()
        else:
            names = [name for name in PROVIDERS if self.on_gpu or name not in _NOT_ON_A_CPU]
            found = [one for one in map(find, names) if level in one.levels]
        return [one for one in found if one.has_dropout or not p]

    def _named(self) -> list[Provider]:
        return [find(n) for n in dict.fromkeys(["frozen", *(self.providers or ()), "fastlora"])]

    def countable(self, p: float, counted_as: str) -> list[Provider]:
        """Return those that can be counted at a dropout: as on an H200 with every plan."""
        if counted_as == "cpu":
            found = self.providers_for("layer", p)
        else:
            found = list(PROVIDERS.values()) if self.providers is None else self._named()
        return [one for one in found if one.countable and (one.has_dropout or not p)]


@dataclass(frozen=True)
class Item:
    """One case: its rows differ in the provider alone.

    Attributes:
        row: what all of its rows say.
        ticks: of the progress bar.
        linears: what is built, at the levels "counts", "layer", "linear" and "operation".
        operation: the operator, at its level.
        model: what is built of a training step.
        variant: of a training step.
    """

    row: Row
    ticks: int
    linears: Mapping[str, Linear] = field(default_factory=dict)
    operation: str = ""
    model: Model | None = None
    variant: steps.Variant = field(default_factory=steps.Variant)

    @property
    def title(self) -> str:
        return f"{self.row.level}, {results.describe(self.row)}"

    @property
    def share(self) -> float:
        """Of the time that a run has, relative to the other items."""
        return _SHARES[self.row.level]


def plan(options: Options) -> list[Item]:
    """Return the cases of a run, in their order."""
    dtype = str(options.dtype).removeprefix("torch.")
    row = Row(**facts(options.device, options.commit), dtype=dtype)
    makers: dict[str, Callable[[Options, Row], Iterator[Item]]] = {
        "counts": _counts,
        "layer": _layers,
        "step": _steps,
        "linear": _linears,
        "operation": _operations,
    }
    items = []
    if set(options.levels) - {"counts"}:
        items.append(Item(replace(row, level="roof", case="copy and product"), 1))
    for level in LEVELS:
        if level in options.levels:
            items += makers[level](options, replace(row, level=level))
    return items


def left_out(options: Options) -> list[str]:
    """Say of which models less is timed than was asked for, because the device is a CPU."""
    notes = []
    for model in options.models if set(options.levels) - {"counts"} else ():
        for m in options.tokens:
            here = _tokens_here(options, model, m)
            if here == 0:
                notes.append(f"{model.name} is not timed on a CPU: its layers are too large.")
            elif here < m:
                notes.append(f"{model.name} is timed with {here} of {m:,} tokens on a CPU.")
    for name, linear in options.linears.items():
        for m in options.tokens:
            here = _cut(options, linear.n * linear.k, m)
            if here == 0:
                notes.append(f"{name} is not timed on a CPU: it is too large.")
            elif here < m:
                notes.append(f"{name} is timed with {here} of {m:,} tokens on a CPU.")
    return list(dict.fromkeys(notes))


def _tokens_here(options: Options, model: Model, m: int) -> int:
    """Return with how many tokens a model is timed on this device; 0: not at all."""
    return _cut(options, sum(linear.n * linear.k for linear in model.linears.values()), m)


def _cut(options: Options, weights: int, m: int) -> int:
    if options.on_gpu:
        return m
    return min(m, next((few for limit, few in _CPU_TOKENS if weights <= limit), 0))


def _with(options: Options, row: Row) -> Iterator[Row]:
    """Yield a row with every rank and dropout."""
    for r in options.ranks:
        for p in options.dropouts:
            yield replace(row, rank=r, dropout=p)


def _timed(options: Options, row: Row) -> Iterator[tuple[Model, Row]]:
    """Yield every model with its tokens, ranks and dropouts, as they are timed here."""
    for model in options.models:
        for m in dict.fromkeys(_tokens_here(options, model, m) for m in options.tokens):
            if m:
                for setting in _with(options, replace(row, model=model.name, tokens=m)):
                    yield model, setting


def _module_ticks(options: Options, row: Row) -> int:
    return len(options.providers_for(row.level, row.dropout)) + options.rounds


def _counts(options: Options, row: Row) -> Iterator[Item]:
    row = replace(row, case="layer")
    timed: Iterable[tuple[Model, Row]] = () if options.on_gpu else _timed(options, row)
    here = {setting.setting: (model, setting) for model, setting in timed}
    for model in options.models if options.counted is None else options.counted:
        for m in options.tokens:
            named = replace(row, model=model.name, tokens=m, dtype="bfloat16", counted_as="H200")
            for setting in _with(options, named):
                if setting.setting not in here:
                    yield Item(setting, 1, model.linears)
    if set(options.levels) - {"counts"}:  # what the times on a CPU are of
        for model, setting in here.values():
            yield Item(replace(setting, counted_as="cpu"), 1, model.linears)


def _layers(options: Options, row: Row) -> Iterator[Item]:
    for model, setting in _timed(options, replace(row, case="layer")):
        yield Item(setting, _module_ticks(options, setting), model.linears)


def _linears(options: Options, row: Row) -> Iterator[Item]:
    for model, setting in _timed(options, row):
        same: dict[Linear, list[str]] = {}
        for name, linear in model.linears.items():
            same.setdefault(linear, []).append(name)
        for linear, names in same.items():
            named = replace(setting, case="/".join(names), count=len(names))
            yield _linear(options, named, linear)
    for name, linear in options.linears.items():
        for m in dict.fromkeys(_cut(options, linear.n * linear.k, m) for m in options.tokens):
            if not m:
                continue
            for setting in _with(options, replace(row, model=name, case="linear", tokens=m)):
                yield _linear(options, setting, linear)


def _linear(options: Options, row: Row, linear: Linear) -> Item:
    ticks = _module_ticks(options, row)
    return Item(replace(row, n=linear.n, k=linear.k), ticks, {row.case: linear})


def _operations(options: Options, row: Row) -> Iterator[Item]:
    for model, setting in _timed(options, row):
        # Of linears of one size the first.
        chosen = {model.linears[name]: name for name in reversed(_OPERATION_LINEARS)}
        for linear, name in reversed(chosen.items()):
            for operation in OPERATIONS:
                # Dropout is in the h that the GEMM is given; in itself it has none.
                if operation == "low_rank_gemm" and setting.dropout and 0.0 in options.dropouts:
                    continue
                named = replace(setting, case=f"{operation} of {name}", n=linear.n, k=linear.k)
                ticks = options.rounds + (5 if options.on_gpu else 3)
                yield Item(named, ticks, {name: linear}, operation)


def _steps(options: Options, row: Row) -> Iterator[Item]:
    models = options.models if options.stepped is None else options.stepped
    first = replace(options, models=models, tokens=options.tokens[:1])
    settings = list(_timed(first, row))
    # With dropout alone, where there is any: a step takes long, and that is how one trains.
    if any(setting.dropout for _, setting in settings):
        settings = [(model, setting) for model, setting in settings if setting.dropout]
    # Liger's last: it replaces functions for the rest of the process.
    for variant in steps.variants(options.device):
        for model, setting in settings:
            built = model if options.on_gpu else steps.cut(model, *_CPU_STEP)
            named = replace(setting, model=built.name, case=str(variant))
            ticks = len(steps.providers(options.providers_for("step", 0.0))) + options.rounds
            yield Item(named, ticks, model=built, variant=variant)
