"""The page of a run: complete, self-contained, and honest about what is unstable or missing."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest

from fastlora.bench.report import _looks, _roofline, write_report
from fastlora.bench.results import Row, describe
from fastlora.bench.summary import Roofs, summaries, verdicts

COMMAND = "fastlora bench --models Qwen3-8B 'A & B'"
ROOFS = Roofs(bytes_per_s=4e12, flops_per_s=650e12, name="a device")
# Time over the bare linears, GiB moved, MiB kept.
PROVIDERS = {
    "frozen": (1.0, 3.0, 0.0),
    "peft": (1.9, 9.0, 700.0),
    "peft-bf16": (1.33, 5.0, 450.0),
    "addmm": (1.04, 3.5, 300.0),
    "fastlora": (1.07, 3.3, 231.0),
}


def ratios(column: str, value: float, spread: float) -> dict[str, float]:
    low, high = value * (1 - spread / 2), value * (1 + spread / 2)
    return {column: value, f"{column}_low": low, f"{column}_high": high}


def rows_of(model: str, spread: float = 0.01) -> list[Row]:
    """A decoder layer and a linear, counted and timed, with every ratio of this spread."""
    rows = []
    for provider, (ratio, moved, saved) in PROVIDERS.items():
        row = Row(
            date="2026-01-02",
            commit="abc1234",
            gpu="NVIDIA H100",
            torch="2.13.0",
            model=model,
            tokens=8192,
            rank=16,
            dtype="bfloat16",
            provider=provider,
        )
        to_fastlora = ratio / PROVIDERS["fastlora"][0]
        for case in ("layer", "q_proj"):
            level = "layer" if case == "layer" else "linear"
            counted = replace(row, level="counts", case=case, moved_gib=moved, saved_mib=saved)
            timed = replace(row, level=level, case=case, rounds=5, median_us=900.0 * ratio)
            rows += [
                replace(counted, tflop=0.4),
                replace(
                    timed,
                    **ratios("over_frozen", ratio, spread if provider != "frozen" else 0.0),
                    **ratios("over_fastlora", to_fastlora, spread),
                ),
            ]
    return rows


ROWS = [
    *rows_of("Qwen3-8B"),
    *rows_of("Qwen2.5-7B", spread=0.2),
    Row(level="linear", model="Qwen3-8B", case="o_proj", provider="other", refused="dA is wrong"),
]


def page_of(rows: Iterable[Row], folder: Path, **arguments: object) -> str:
    page, *_ = write_report(list(rows), folder, COMMAND, **arguments)
    return page.read_text(encoding="utf-8")


def of_levels(rows: Iterable[Row], *levels: str) -> list[Row]:
    return [row for row in rows if row.level in levels]


def section(page: str, title: str) -> str:
    return page.partition(f"<h2>{title}</h2>")[2].partition("</section>")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "made"
    write_report(ROWS, folder, COMMAND, ROOFS, ["level step: no time was left"])
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_asks_for_nothing_from_elsewhere(page: str) -> None:
    assert not re.search(r"https?:|<script|<link|<img|<iframe|@import|@font-face", page)
    references = re.findall(r"(?:href|src)\s*=\s*[\"']?(.)", page) + re.findall(r"url\((.)", page)
    assert references
    assert set(references) == {"#"}


def test_the_page_has_its_sections_in_order(page: str) -> None:
    assert re.findall("<h2>(.*?)</h2>", page) == [
        "What fastlora gains, and where it loses",
        "Models",
        "Time of a decoder layer&#x27;s linears",
        "Memory of a decoder layer&#x27;s linears",
        "Roofline",
        "Environment",
        "How to read this",
        "Left out, and why",
        "Every row",
        "Exact command",
    ]
    assert page.count("<svg") == 3
    assert "NVIDIA H100 · 2026-01-02 · abc1234" in page
    assert "level step: no time was left" in section(page, "Left out, and why")


def test_the_page_says_where_fastlora_loses(page: str) -> None:
    lost = [row for verdict, row, _ in verdicts(ROWS) if verdict == "loses"]
    assert lost
    for row in lost:
        assert f"Here fastlora is slower than {row.provider}: {describe(row)}, 0.97" in page


def test_every_figure_of_the_summaries_is_in_the_table(page: str) -> None:
    lines = section(page, "Models").split("<tr>")[2:]
    assert len(lines) == len(summaries(ROWS)) == 2
    for line, summary in zip(lines, summaries(ROWS), strict=True):
        for ratio in (summary.over_frozen, summary.over_peft, summary.over_best):
            assert ratio is not None
            assert f">{ratio.value:.2f}" in line
            assert f"{ratio.low:.2f}–{ratio.high:.2f}" in line
        assert summary.model in line
        assert f"{summary.memory_saved:.0%}" in line
        assert f"{summary.bytes_over_peft:.2f}" in line


def test_every_row_is_there_and_a_refused_one_says_why(page: str) -> None:
    lines = section(page, "Every row").split("<tr>")[2:]
    assert len(lines) == len(ROWS)
    for line, row in zip(lines, ROWS, strict=True):
        assert f">{row.provider}</td>" in line
    assert "dA is wrong" in lines[-1]


def test_columns_in_which_nothing_stands_are_left_out(page: str) -> None:
    headings = re.findall("<th.*?>(.*?)</th>", section(page, "Every row"))
    assert {"provider", "median_us", "moved_gib", "refused"} <= set(headings)
    assert not {"driver", "host_us", "tokens_per_s", "gate"} & set(headings)


def test_what_is_unstable_is_marked_in_tables_and_figure(page: str, tmp_path: Path) -> None:
    steady = page_of(of_levels(rows_of("Qwen3-8B"), "layer"), tmp_path)
    for title, number in (("Models", 4), ("Every row", 18)):
        assert section(page, title).count('class="unstable"') == number
        assert 'class="unstable"' not in section(steady, title)
    figure = section(page, "Time of a decoder layer&#x27;s linears")
    assert figure.count(" ~</text>") == figure.count("fill: url(#") == 4
    assert "<pattern" not in steady
    assert "rounds lie more than 5% apart" in section(page, "Models")
    assert "rounds lie more than 5% apart" not in section(steady, "Models")


def test_a_figure_shows_every_provider_but_the_limit_itself(page: str) -> None:
    speed = section(page, "Time of a decoder layer&#x27;s linears")
    memory = section(page, "Memory of a decoder layer&#x27;s linears")
    for provider in PROVIDERS:
        assert speed.count(f">{provider}</text>") == (0 if provider == "frozen" else 2)
        assert memory.count(f">{provider}</text>") == 2
    assert "a device, measured: 4 TB/s, 650 TFLOP/s" in section(page, "Roofline")


def test_a_point_of_the_roofline_is_counted_work_by_counted_bytes_and_measured_time() -> None:
    rows = [row for row in rows_of("Qwen3-8B") if row.provider in ("frozen", "fastlora")]
    figure = _roofline(rows, _looks(row.provider for row in rows), ROOFS)
    assert figure is not None
    points = {c.get_label(): c.get_offsets().tolist() for c in figure.axes[0].collections}
    assert list(points) == ["frozen", "fastlora"]
    for provider, here in points.items():
        ratio, moved, _ = PROVIDERS[provider]
        expected = (0.4e12 / (moved * 2**30), 0.4 / (900e-6 * ratio))
        assert here == [pytest.approx(expected)] * 2
    (roof,) = figure.axes[0].lines
    ridge = (ROOFS.flops_per_s / ROOFS.bytes_per_s, 650)
    assert roof.get_xydata().tolist()[1] == pytest.approx(ridge)


def test_memory_is_counted_only_where_no_peak_was_measured(page: str, tmp_path: Path) -> None:
    peaks = [
        replace(row, peak_mib=321.0) if row.level == "layer" else replace(row, tflop=None)
        for row in rows_of("Qwen3-8B")
    ]
    assert "peak memory" not in page
    assert ">kept for backward, MiB, counted</text>" in page
    measured = page_of(peaks, tmp_path)
    assert ">peak memory, MiB, measured</text>" in measured
    assert ">321</text>" in measured
    assert "kept for backward, MiB" not in measured
    assert ">moved, GiB, counted</text>" in measured


def test_markup_in_names_is_text(tmp_path: Path) -> None:
    name = "<b>$x$ & y</b>"
    rows = [replace(row, cpu=name, refused=name) for row in rows_of(name) if row.case == "layer"]
    rows = [replace(row, provider=name) if row.provider == "addmm" else row for row in rows]
    page = page_of(rows, tmp_path, notes=[name], roofs=replace(ROOFS, name=name))
    assert "<b>" not in page
    assert "&lt;b&gt;$x$ &amp; y&lt;/b&gt;</td>" in section(page, "Every row")
    # matplotlib would make a formula of what stands between dollar signs.
    figure = section(page, "Time of a decoder layer&#x27;s linears")
    assert ">&lt;b&gt;$x$ &amp; y&lt;/b&gt;</text>" in figure
    assert "<pre>fastlora bench --models Qwen3-8B &#x27;A &amp; B&#x27;</pre>" in page


def test_counts_alone_make_a_page(tmp_path: Path) -> None:
    files = write_report(of_levels(ROWS, "counts"), tmp_path, COMMAND, ROOFS)
    assert [file.name for file in files] == ["report.html", "memory.png"]
    page = files[0].read_text(encoding="utf-8")
    assert "counted, nothing timed" in page
    assert "Nothing was timed against another provider." in page
    assert "67%" in section(page, "Models")
    assert not section(page, "Roofline")


@pytest.mark.parametrize(
    ("levels", "figures"),
    [
        ((), []),
        (("counts",), ["memory.png"]),
        (("linear",), []),
        (("layer",), ["speed.png"]),
        (("counts", "linear"), ["memory.png", "roofline.png"]),
        (("counts", "layer"), ["speed.png", "memory.png", "roofline.png"]),
    ],
)
def test_a_figure_is_made_where_there_are_rows_for_it(
    levels: tuple[str, ...], figures: list[str], tmp_path: Path
) -> None:
    files = write_report(of_levels(rows_of("Qwen3-8B"), *levels), tmp_path, COMMAND)
    assert [file.name for file in files] == ["report.html", *figures]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert files[0].read_text(encoding="utf-8").count("<svg") == len(figures)


def test_the_same_rows_give_the_same_bytes_whatever_matplotlib_is_set_to(
    folder: Path, tmp_path: Path
) -> None:
    with matplotlib.rc_context({"font.size": 20, "axes.edgecolor": "red"}):
        before = dict(matplotlib.rcParams)
        files = write_report(ROWS, tmp_path, COMMAND, ROOFS, ["level step: no time was left"])
        assert dict(matplotlib.rcParams) == before
    assert len(files) == 4
    for file in files:
        assert file.read_bytes() == (folder / file.name).read_bytes(), file.name


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeError) as caught:
        write_report(ROWS, tmp_path / "report", COMMAND)
    assert str(caught.value) == (
        "report.html needs matplotlib: pip install 'fastlora-kernels[bench]', then "
        "`fastlora bench --report FOLDER`"
    )
    assert not list(tmp_path.iterdir())
