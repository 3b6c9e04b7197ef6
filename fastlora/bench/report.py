"""The page of a run: figures, tables and how to read them, from rows alone.

``report.html`` holds all of it, its figures as inline SVG, and asks for nothing from elsewhere; the
figures lie beside it as PNGs. The same rows give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.bench import results, summary
from fastlora.bench.results import STABLE, Ratio, Row, is_ours
from fastlora.bench.summary import Roofs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNSTABLE = f"~ marks a ratio whose rounds lie more than {STABLE:.0%} apart: it says nothing."
SPEED = (
    "Forward and backward, in turn with the bare frozen linears; shorter is better. Whiskers: the "
    "smallest and the largest round. Hatched and ~: the rounds lie too far apart."
)
MEMORY = (
    "Peak: the most memory allocated while the linears ran, beyond what lay there before. Where it "
    "was not measured: what autograd keeps for the backward pass. Moved: every operand of every "
    "launch once. Each setting has a scale of its own."
)
ROOFLINE = (
    "FLOP of the matrix products over bytes, both counted, and over the time measured. Large: the "
    "linears of a decoder layer. Small: one linear."
)
HOW_TO_READ = (
    "The limit is the bare frozen linears without adapters, forward and backward. With adapters "
    "there is more to do, so nothing should be below 1.00.",
    "A ratio is the median over rounds in which the providers had their turns; its range is from "
    "the smallest to the largest round.",
    UNSTABLE,
    "Counted means read off the launches, not measured: each moves every operand once. That is a "
    "lower bound.",
    "Refused means not timed, for the reason in its row: wrong results, a failure, or something "
    "that the provider cannot do.",
)
MEMORIES = {"peak": "of the peak", "counted": "of what backward needs"}
ENVIRONMENT = (
    *("gpu", "driver", "cpu", "python", "torch", "triton", "peft", "transformers"),
    *("commit", "date"),
)

OURS = ("#0b57d0", "#4c8bf5", "#8ab4f8", "#123a7a")
OTHERS = ("#5f6368", "#80868b", "#9aa0a6", "#b4b9be")
LIMIT = "#c5221f"
MARKERS = "osD^vPX<>p"
# On top of matplotlib's own defaults, so that nobody's matplotlibrc changes the page.
STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "scatter.edgecolors": "none",
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "grid.color": "#e3e6ea",
    "text.parse_math": False,  # a name may have dollar signs
    "svg.fonttype": "none",
    "svg.hashsalt": "fastlora",  # else the ids are random
}
CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0;
  --page: #fff; --head: #f6f8fa; --mark: #8a4600; --tint: #fff4e0 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa4af; --line: #3d444d;
  --page: #14181d; --head: #1d232a; --mark: #f0b062; --tint: #38290f } }
body { margin: 0 auto; max-width: 70rem; padding: 2rem 1.25rem 4rem; background: var(--page);
  color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2 }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.25rem; line-height: 1.3 }
.soft, figcaption { color: var(--soft); font-size: .9rem }
ul, figcaption { max-width: 56rem; margin: .6rem 0 0 } ul { padding-left: 1.25rem }
li { margin: .35rem 0 } dd, figure { margin: 0; min-width: 0 } dt { color: var(--soft) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.25rem; margin: 0 }
.box, pre { overflow: auto; border: 1px solid var(--line); border-radius: 8px }
.figure { background: #fff; max-width: 56rem; padding: .5rem }
svg { display: block; width: 100%; height: auto; min-width: 35rem }
svg text { font-family: system-ui, sans-serif !important }
.rows { max-height: 40rem; font-size: .8rem } @media print { .rows { max-height: none } }
table { border-collapse: collapse; width: 100%; font-size: .9em; text-align: right;
  font-variant-numeric: tabular-nums }
th, td { padding: .45em .8em; white-space: nowrap; vertical-align: top }
th { position: sticky; top: 0; background: var(--head); vertical-align: bottom }
td { border-top: 1px solid var(--line) } td small { display: block; color: var(--soft) }
.models th { white-space: normal; min-width: 5em } .text { text-align: left }
.refused { text-align: left; white-space: normal; min-width: 24em }
.unstable { background: var(--tint); color: var(--mark); font-style: italic }
pre { padding: .9rem 1rem; background: var(--head); font-size: .85rem }
"""


@dataclass(frozen=True)
class _Bar:
    """A bar, what stands behind it and, for a ratio, its whiskers."""

    length: float
    text: str
    ratio: Ratio | None = None


_Setting = tuple[Any, ...]
_Place = tuple[_Setting, str]  # of a bar: its setting and its provider
_Looks = dict[str, tuple[str, str]]  # of a provider: its colour and its marker


def write_report(
    rows: Sequence[Row],
    folder: Path,
    command: str,
    roofs: Roofs | None = None,
    notes: Sequence[str] = (),
) -> list[Path]:
    """Write ``report.html`` and, as PNGs, those of its figures for which there are rows.

    Args:
        rows: of a run.
        folder: is made if need be.
        command: that ran it.
        roofs: of the device, drawn into the roofline.
        notes: what was left out and why, a sentence each.

    Returns:
        The files, the page first.

    Raises:
        RuntimeError: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    try:
        import matplotlib.style
    except ImportError as error:
        raise RuntimeError(
            "report.html needs matplotlib: pip install 'fastlora-kernels[bench]', then "
            "`fastlora bench --report FOLDER`"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    files, figures = [folder / "report.html"], ""
    looks = _looks(row.provider for row in rows)
    with matplotlib.style.context(["default", STYLE]):
        for name, title, figure, caption in (
            ("speed", "Time of a decoder layer's linears", _speed(rows, looks), SPEED),
            ("memory", "Memory of a decoder layer's linears", _memory(rows, looks), MEMORY),
            ("roofline", "Roofline", _roofline(rows, looks, roofs), ROOFLINE),
        ):
            if figure is not None:
                files.append(folder / f"{name}.png")
                figure.savefig(files[-1], dpi=160, metadata={"Software": None})
                figures += _section(title, _inline(figure, title, caption))
    files[0].write_text(_page(rows, command, notes, figures), encoding="utf-8")
    return files


def _looks(providers: Iterable[str]) -> _Looks:
    """Give fastlora shades of blue, the others of grey, and fastlora the first place."""
    looks: _Looks = {}
    numbers = {True: 0, False: 0}
    for name in sorted(dict.fromkeys(providers), key=lambda name: not is_ours(name)):
        palette, number = OURS if is_ours(name) else OTHERS, numbers[is_ours(name)]
        looks[name] = (palette[number % len(palette)], MARKERS[len(looks) % len(MARKERS)])
        numbers[is_ours(name)] += 1
    return looks


def _speed(rows: Sequence[Row], looks: _Looks) -> Figure | None:
    bars = {}
    for row in rows:
        ratio = row.to_frozen
        if row.level == row.case == "layer" and ratio is not None and row.provider != "frozen":
            text = f"{ratio.value:.2f}" + ("" if ratio.is_stable else " ~")
            bars[row.setting, row.provider] = _Bar(ratio.value, text, ratio)
    if not bars:
        return None
    figure, (axes,), heights = _grouped(bars, 1, looks)
    _draw(axes, bars, heights, looks)
    for setting in dict.fromkeys(setting for setting, _ in bars):
        here = [y for (owner, _), y in heights.items() if owner == setting]
        axes.vlines(1, min(here) - 0.5, max(here) + 0.5, LIMIT, linewidth=1.4, zorder=4)
    axes.set_xlim(0, 1.1 * max(bar.ratio.high for bar in bars.values() if bar.ratio))
    axes.set_xlabel("time over that of the bare frozen linears, the limit (red)")
    axes.grid(axis="x")
    return figure


def _memory(rows: Sequence[Row], looks: _Looks) -> Figure | None:
    layers = [row for row in rows if row.case == "layer" and row.level in ("counts", "layer")]
    measured = {row.setting for row in layers if row.peak_mib is not None}
    panels = []
    for title, column, text in (
        ("peak memory, MiB, measured", "peak_mib", "{:,.0f}"),
        ("kept for backward, MiB, counted", "saved_mib", "{:,.0f}"),
        ("moved, GiB, counted", "moved_gib", "{:,.2f}"),
    ):
        values: dict[_Place, float] = {
            (row.setting, row.provider): value
            for row in layers
            if (value := getattr(row, column)) is not None
            and not (column == "saved_mib" and row.setting in measured)
        }
        if values:
            panels.append((title, text, values))
    if not panels:
        return None
    places = [place for *_, values in panels for place in values]
    figure, all_axes, heights = _grouped(places, len(panels), looks)
    for axes, (title, text, values) in zip(all_axes, panels, strict=True):
        largest = {setting: 1e-9 for setting, _ in values}
        for (setting, _), value in values.items():
            largest[setting] = max(value, largest[setting])
        bars = {at: _Bar(v / largest[at[0]], text.format(v)) for at, v in values.items()}
        _draw(axes, bars, heights, looks)
        axes.set(xlim=(0, 1.3), xticks=[])
        axes.spines["bottom"].set_visible(False)
        axes.set_title(title, loc="left", fontsize=9)
    return figure


def _grouped(
    places: Iterable[_Place], columns: int, looks: _Looks
) -> tuple[Figure, Sequence[Axes], dict[_Place, float]]:
    """Return a figure with a line for every place, its axes, and at which height each place is."""
    from matplotlib.figure import Figure

    places = dict.fromkeys(places)  # each once
    heights: dict[_Place, float] = {}
    titles: dict[str, float] = {}
    y = 0.0
    for setting in dict.fromkeys(setting for setting, _ in places):
        model, tokens, rank, dropout, dtype = setting
        titles[f"{model}, {tokens:,} tokens, rank {rank}, dropout {dropout:g}, {dtype}"] = y
        for provider in looks:
            if (setting, provider) in places:
                y += 1
                heights[setting, provider] = y
        y += 1.6
    figure = Figure(figsize=(8, 0.22 * y + 0.7), layout="constrained")
    all_axes = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    all_axes[0].set_ylim(y - 0.8, -0.7)
    all_axes[0].set_yticks(list(heights.values()), [provider for _, provider in heights])
    for axes in all_axes:
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    for title, height in titles.items():
        text = all_axes[0].annotate(title, (0, height), (4, 0), textcoords="offset points")
        text.set(va="center", weight="bold", backgroundcolor="white", in_layout=False)
    return figure, all_axes, heights


def _draw(
    axes: Axes, bars: dict[_Place, _Bar], heights: dict[_Place, float], looks: _Looks
) -> None:
    for place, bar in bars.items():
        y, (colour, _), end = heights[place], looks[place[1]], bar.length
        (body,) = axes.barh(y, bar.length, 0.78, color=colour)
        if bar.ratio is not None:
            if not bar.ratio.is_stable:  # SVG has no hatch on a transparent face
                body.set(facecolor="white", edgecolor=colour, hatch="////")
            end = bar.ratio.high
            axes.plot([bar.ratio.low, end], [y, y], "|-", color="#202124", lw=1, ms=5, zorder=5)
        axes.annotate(bar.text, (end, y), (5, 0), textcoords="offset points", va="center")


def _roofline(rows: Sequence[Row], looks: _Looks, roofs: Roofs | None) -> Figure | None:
    from matplotlib.figure import Figure

    counted = {(r.setting, r.case, r.provider): r for r in rows if r.level == "counts"}
    points: dict[str, list[tuple[float, float, int]]] = {}
    for row in rows:
        if row.level in ("linear", "layer") and row.median_us:
            count = counted.get((row.setting, row.case, row.provider))
            if count is not None and count.tflop and count.moved_gib:
                intensity = count.tflop * 1e12 / (count.moved_gib * 2**30)
                size = 70 if row.level == "layer" else 18
                point = (intensity, count.tflop * 1e6 / row.median_us, size)
                points.setdefault(row.provider, []).append(point)
    if not points:
        return None
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.subplots()
    for provider, (colour, marker) in reversed(looks.items()):  # fastlora on top
        if provider in points:
            x, y, sizes = zip(*points[provider], strict=True)
            axes.scatter(x, y, sizes, color=colour, marker=marker, alpha=0.75, label=provider)
    _scale(axes, roofs)
    axes.set(xlabel="FLOP per byte, counted", ylabel="TFLOP/s")
    figure.legend(loc="outside lower center", ncols=4, reverse=True)
    return figure


def _scale(axes: Axes, roofs: Roofs | None) -> None:
    """Make both axes logarithmic, with numbers that can be read, and draw the roofs."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(xscale="log", yscale="log")
    if roofs:
        top, slope = roofs.flops_per_s / 1e12, roofs.bytes_per_s / 1e12
        left, right = axes.get_xlim()
        low, _ = axes.get_ylim()
        x = [min(left, top / slope / 2), top / slope, max(right, top / slope * 2)]
        axes.plot(x, [x[0] * slope, top, top], color=LIMIT, linewidth=1.4, zorder=1)
        axes.set(xlim=(x[0], x[-1]), ylim=(low, None))
        label = f"{roofs.name}, measured: {slope:.3g} TB/s, {top:.4g} TFLOP/s"
        axes.set_title(label, loc="left", fontsize=9, color=LIMIT)
    for axis, steps in ((axes.xaxis, (1, 2, 5)), (axes.yaxis, (1, 2, 3, 5, 7))):
        axis.set_major_locator(LogLocator(subs=steps))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid()


def _inline(figure: Figure, title: str, caption: str) -> str:
    """Return a figure as SVG inside HTML, which needs neither a prologue nor namespaces."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=nothing)
    svg = file.getvalue()
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    figcaption = f"<figcaption>{escape(caption)}</figcaption>"
    return f'<figure><div class="box figure">{svg}</div>{figcaption}</figure>'


def _page(rows: Sequence[Row], command: str, notes: Sequence[str], figures: str) -> str:
    timed = [row for row in rows if row.level != "counts" and not row.refused]
    device = _distinct(row.gpu or row.cpu for row in timed) or "counted, nothing timed"
    facts = (device, _distinct(row.date for row in rows), _distinct(row.commit for row in rows))
    gains = [_sentence(line) for line in summary.headline(rows).splitlines()]
    environment = [
        f"<dt>{name}</dt><dd>{escape(values)}</dd>"
        for name in ENVIRONMENT
        if (values := _distinct(getattr(row, name) for row in rows))
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>fastlora bench</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"<h1>fastlora bench</h1>\n<p class=soft>{escape(' · '.join(filter(None, facts)))}</p>\n"
        + _section("What fastlora gains, and where it loses", _bullets(gains))
        + _section("Models", _models(rows))
        + figures
        + _section("Environment", f"<dl>{''.join(environment)}</dl>")
        + _section("How to read this", _bullets(HOW_TO_READ))
        + _section("Left out, and why", _bullets(notes))
        + _section("Every row", _every_row(rows))
        + _section("Exact command", f"<pre>{escape(command)}</pre>")
        + "</body>\n</html>\n"
    )


def _distinct(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(value for value in values if value))


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>\n" if content else ""


def _sentence(line: str) -> str:
    line = re.sub(r"\(([\d.]+)-([\d.]+)\)", "(\\1\u2013\u2060\\2)", line)  # a range is not broken
    if line.startswith(("slower", "neither")):
        line = f"Here fastlora is {line}"
    return line[0].upper() + line[1:].rstrip(".") + "."


def _bullets(lines: Iterable[str]) -> str:
    items = "\n".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>\n{items}\n</ul>" if items else ""


def _models(rows: Sequence[Row]) -> str:
    lines = summary.summaries(rows)
    cells = [
        [
            _cell(line.model, "text"),
            _cell(f"{line.tokens:,}"),
            _cell(str(line.rank)),
            _cell(f"{line.dropout:g}"),
            _ratio(line.over_frozen),
            _ratio(line.over_peft),
            _ratio(line.over_peft_bf16),
            _ratio(line.over_best, line.best),
            _cell(_shown(line.memory_saved, ".0%"), small=MEMORIES.get(line.memory, "")),
            _cell(_shown(line.bytes_over_peft, ".2f")),
        ]
        for line in lines
    ]
    legend = "" if all(line.is_stable for line in lines) else f"<p class=soft>{UNSTABLE}</p>"
    return _table("models", summary.HEADINGS, cells) + legend


def _every_row(rows: Sequence[Row]) -> str:
    same = [name for name in ENVIRONMENT if len({getattr(row, name) for row in rows}) == 1]
    names = [name for name in results.COLUMNS if name not in same]
    return _table("rows", names, [[_value(row, name) for name in names] for row in rows])


def _value(row: Row, name: str) -> str:
    value = getattr(row, name)
    if isinstance(value, str):
        return _cell(value, "refused" if name == "refused" else "text")
    text = _shown(value, ".0f" if value is not None and value >= 1e6 else ".6g")
    ratio = {"over_frozen": row.to_frozen, "over_fastlora": row.to_fastlora}.get(name)
    if ratio is not None and not ratio.is_stable:
        return _cell(f"{text} ~", "unstable")
    return _cell(text)


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _ratio(ratio: Ratio | None, provider: str = "") -> str:
    if ratio is None:
        return _cell("")
    kind, mark = ("", "") if ratio.is_stable else ("unstable", " ~")
    small = f"{ratio.low:.2f}–{ratio.high:.2f} {provider}".rstrip()
    return _cell(f"{ratio.value:.2f}{mark}", kind, small)


def _cell(text: str, kind: str = "", small: str = "") -> str:
    if not text:
        return "<td></td>"
    below = f"<small>{escape(small)}</small>" if small else ""
    return f'<td class="{kind}">{escape(text)}{below}</td>'.replace(' class=""', "")


def _table(kind: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table without the columns in which nothing stands."""
    lines = []
    for i, heading in enumerate(headings):
        column = [row[i] for row in rows]
        if any(cell != "<td></td>" for cell in column):
            text = ' class="text"' if any('"text"' in cell[:20] for cell in column) else ""
            lines.append([f"<th{text}>{escape(heading)}</th>", *column])
    body = "\n".join(f"<tr>{''.join(line)}</tr>" for line in zip(*lines, strict=True))
    return f'<div class="box {kind}"><table>\n{body}\n</table></div>\n' if lines else ""
