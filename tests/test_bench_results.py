"""Rows survive their files, and what is said of them is stable, complete and plain about losses."""

from __future__ import annotations

import csv
from dataclasses import fields, replace
from typing import get_type_hints

import pytest

from fastlora.bench import results, summary
from fastlora.bench.results import COLUMNS, LEVELS, Ratio, Row
from fastlora.bench.summary import HEADINGS, Roofs

HINTS = get_type_hints(Row)
LAYER = Row(
    level="layer", model="Qwen3-8B", case="layer", tokens=8192, rank=16, dropout=0.1,
    dtype="bfloat16", rounds=5,
)  # fmt: skip


def filled() -> Row:
    """A row in which every column has a value of its own."""
    values = {}
    for number, one in enumerate(fields(Row), start=3):
        kinds = {str: f"{one.name} {number}", int: number, float: number + 0.125}
        kind = HINTS[one.name]
        values[one.name] = kinds[next(k for k in kinds if kind in (k, k | None))]
    return Row(**values)


def measured(
    provider: str,
    us: float = 100.0,
    over_frozen: Ratio | None = None,
    over_fastlora: Ratio | None = None,
    row: Row = LAYER,
    **columns: object,
) -> Row:
    """A row that was timed."""
    for name, ratio in (("over_frozen", over_frozen), ("over_fastlora", over_fastlora)):
        if ratio is not None:
            low_and_high = {f"{name}_low": ratio.low, f"{name}_high": ratio.high}
            columns |= {name: ratio.value, **low_and_high}
    return replace(row, provider=provider, median_us=us, **columns)


def around(value: float, spread: float = 0.02) -> Ratio:
    return Ratio(value, value * (1 - spread / 2), value * (1 + spread / 2))


SAME = Ratio(1.0, 1.0, 1.0)


def timed_layer(row: Row = LAYER, **over_fastlora: float | Ratio) -> list[Row]:
    """What every provider took over fastlora; ``_`` in a name stands for ``-``."""
    rows = [
        measured("frozen", 100.0, SAME, around(1 / 1.07), row),
        measured("fastlora", 107.0, around(1.07), SAME, row),
    ]
    for name, ratio in over_fastlora.items():
        ratio = ratio if isinstance(ratio, Ratio) else around(ratio)
        us, provider = 107.0 * ratio.value, name.replace("_", "-")
        rows.append(measured(provider, us, around(1.07 * ratio.value), ratio, row))
    return rows


def counted_layer(row: Row = LAYER, **gib_and_mib: tuple[float, float]) -> list[Row]:
    row = replace(row, level="counts")
    return [
        replace(row, provider=name, moved_gib=gib, saved_mib=mib, counted_as="H200")
        for name, (gib, mib) in gib_and_mib.items()
    ]


# Files.


def test_every_column_survives_the_file(tmp_path):
    rows = [filled(), Row(), LAYER, replace(filled(), median_us=None, n=None, refused="")]
    assert len({getattr(rows[0], name) for name in COLUMNS}) == len(COLUMNS)
    results.write_rows(tmp_path / "layer.csv", rows)
    found = results.read(tmp_path / "layer.csv")
    assert found == rows
    for row in found:
        for name in COLUMNS:
            value = getattr(row, name)
            assert value is None or HINTS[name] in (type(value), type(value) | None)


@pytest.mark.parametrize("text", ['a, "b"', "two\nlines", "Größe ≤ 1", " , "])
def test_any_text_survives_the_file(tmp_path, text):
    results.write_rows(tmp_path / "linear.csv", [replace(LAYER, refused=text, model=text)])
    assert results.read(tmp_path / "linear.csv") == [replace(LAYER, refused=text, model=text)]


@pytest.mark.parametrize("value", [0.0, 1e-9, 12345.678901, 987654321.0, 2 / 3])
def test_six_digits_of_a_number_survive_the_file(tmp_path, value):
    results.write_rows(tmp_path / "step.csv", [replace(LAYER, median_us=value)])
    (row,) = results.read(tmp_path / "step.csv")
    assert row.median_us == pytest.approx(value, rel=5e-6, abs=0)


def test_whole_numbers_survive_the_file_to_the_last_digit(tmp_path):
    row = replace(LAYER, tokens=123_456_789, launches=987_654_321, n=2**40)
    results.write_rows(tmp_path / "counts.csv", [row])
    assert results.read(tmp_path / "counts.csv") == [row]


def test_the_file_is_plain_csv(tmp_path):
    results.write_rows(tmp_path / "layer.csv", [filled(), LAYER])
    with (tmp_path / "layer.csv").open(newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert list(first) == COLUMNS
    assert (second["provider"], second["dropout"], second["median_us"]) == ("", "0.1", "")


def test_columns_say_their_units():
    floats = [name for name in COLUMNS if HINTS[name] in (float, float | None)]
    units = ("_us", "_mib", "_gib", "tflop", "_per_s")
    without = {name for name in floats if not name.endswith(units)}
    ratios = {
        f"over_{name}{end}" for name in ("frozen", "fastlora") for end in ("", "_low", "_high")
    }
    assert without == {"dropout", "gate", *ratios}  # shares and ratios, which have none


def test_a_run_that_is_cut_short_keeps_what_it_has_written(tmp_path):
    path = tmp_path / "deep" / "layer.csv"
    write = results.writer(path)
    assert path.read_text().splitlines() == [",".join(COLUMNS)]
    for number in (1, 2):
        write(LAYER)
        assert results.read(path) == [LAYER] * number


def test_a_new_run_replaces_the_rows_of_an_earlier_one(tmp_path):
    for provider in ("peft", "fastlora"):
        results.write_rows(tmp_path / "layer.csv", [replace(LAYER, provider=provider)])
    assert [row.provider for row in results.read(tmp_path / "layer.csv")] == ["fastlora"]


def test_a_file_that_lacks_later_columns_is_read(tmp_path):
    (tmp_path / "layer.csv").write_text("level,provider,median_us\nlayer,peft,12.5\n")
    (row,) = results.read(tmp_path / "layer.csv")
    assert row == Row(level="layer", provider="peft", median_us=12.5)


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", "", "level,model\nlayer,x\n", ",".join([*COLUMNS, "speed"]) + "\n"]
)
def test_a_file_of_something_else_is_refused_by_its_name(tmp_path, text):
    path = tmp_path / "layer.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"layer\.csv is not a file of `fastlora bench`: columns"):
        results.read(path)


def test_a_folder_is_read_level_by_level_and_nothing_else_in_it(tmp_path):
    for level in ("step", "layer", "counts", "roof"):
        results.write_rows(tmp_path / f"{level}.csv", [Row(level=level)])
    (tmp_path / "dram.csv").write_text("device,case\n")
    found = [row.level for row in results.read_folder(tmp_path)]
    assert found == [level for level in LEVELS if level in found]
    assert sorted(found) == ["counts", "layer", "roof", "step"]


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_a_folder_without_results_is_refused_by_its_name(tmp_path, make):
    make(tmp_path / "nothing")
    with pytest.raises(ValueError, match="nothing holds no results of `fastlora bench`"):
        results.read_folder(tmp_path / "nothing")


# Ratios.


@pytest.mark.parametrize(
    ("low", "high", "is_stable", "text"),
    [
        (1.95, 2.05, True, "2.00 (1.95-2.05)"),
        (1.95, 2.06, False, "2.00 (1.95-2.06) ~"),
        (2.0, 2.0, True, "2.00 (2.00-2.00)"),
    ],
)
def test_a_ratio_is_unstable_beyond_five_percent_and_marked(low, high, is_stable, text):
    ratio = Ratio(2.0, low, high)
    assert ratio.is_stable is is_stable
    assert str(ratio) == text


def test_a_row_is_stable_if_all_of_its_ratios_are():
    assert measured("peft", 1.0, around(2.0, 0.04), around(1.5, 0.04)).is_stable
    assert not measured("peft", 1.0, around(2.0, 0.04), around(1.5, 0.06)).is_stable
    assert not measured("peft", 1.0, around(2.0, 0.06), around(1.5, 0.04)).is_stable
    assert measured("peft").is_stable


# The table of models.


def test_the_table_has_the_promised_columns_in_the_promised_order():
    assert HEADINGS[4:] == (
        "time / bare frozen linears",
        "speed-up over peft",
        "over peft bf16",
        "over the best other",
        "memory saved",
        "bytes moved / peft's",
    )
    rows = [
        *timed_layer(peft=2.5, peft_bf16=1.6, peft_compiled=1.25),
        *counted_layer(peft=(8.0, 400.0), fastlora=(2.0, 100.0)),
    ]
    heading, line, *cells = summary.table(summary.summaries(rows)).splitlines()
    assert [cell.strip() for cell in heading.strip("|").split("|")] == list(HEADINGS)
    assert set(line) == {"|", "-"}
    (only,) = cells
    assert [cell.strip() for cell in only.strip("|").split("|")] == [
        "Qwen3-8B",
        "8,192",
        "16",
        "0.1",
        "1.07 (1.06-1.08)",
        "2.50 (2.48-2.52)",
        "1.60 (1.58-1.62)",
        "1.25 (1.24-1.26) peft-compiled",
        "75% (counted)",
        "0.25",
    ]


def test_the_best_other_is_the_fastest_and_neither_bare_nor_ours():
    rows = timed_layer(
        peft=2.0, addmm=1.1, peft_bf16=1.2, fastlora_fused=0.5, fastlora_bf16=0.6, theirs=1.3
    )
    (line,) = summary.summaries(rows)
    assert (line.best, line.over_best) == ("addmm", around(1.1))
    assert (line.over_peft, line.over_peft_bf16) == (around(2.0), around(1.2))
    assert line.over_frozen == around(1.07)
    (line,) = summary.summaries(timed_layer(fastlora_fused=0.5))
    assert (line.best, line.over_best) == ("", None)


def test_a_refused_provider_is_not_the_best_other():
    refused = replace(LAYER, provider="broken", refused="dA is wrong")
    (line,) = summary.summaries([*timed_layer(peft=2.0), refused])
    assert line.best == "peft"


def test_every_setting_has_a_line_of_its_own_and_shares_nothing():
    other = {"model": "b", "tokens": 1, "rank": 1, "dropout": 0.0, "dtype": "float32"}
    settings = [LAYER, *(replace(LAYER, **{name: value}) for name, value in other.items())]
    rows = []
    for number, setting in enumerate(settings, start=1):
        rows += timed_layer(setting, peft=float(number))
    lines = summary.summaries(rows)
    assert [line.over_peft.value for line in lines] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert [getattr(lines[i], name) for i, name in enumerate(other, start=1)] == [*other.values()]


def test_linears_and_steps_are_not_in_the_table_of_models():
    rows = timed_layer(replace(LAYER, level="linear", case="q_proj"), peft=2.0)
    assert summary.summaries([*rows, *timed_layer(replace(LAYER, level="step", case="step"))]) == []


def test_an_unstable_ratio_is_marked_in_the_table():
    (line,) = summary.summaries(timed_layer(peft=around(2.0, 0.2), addmm=1.1))
    assert not line.is_stable
    assert "2.00 (1.80-2.20) ~ " in summary.table([line])
    assert summary.table([line]).count("~") == 1
    (line,) = summary.summaries(timed_layer(peft=around(2.0, 0.04), addmm=1.1))
    assert line.is_stable
    assert "~" not in summary.table([line])


def test_measured_memory_goes_before_counted_and_says_which_it_is():
    counted = counted_layer(peft=(4.0, 400.0), fastlora=(3.0, 300.0), addmm=(1.0, 1.0))
    (line,) = summary.summaries(counted)
    assert (line.memory_saved, line.memory, line.bytes_over_peft) == (0.25, "counted", 0.75)
    timed = [replace(row, peak_mib=10.0) for row in timed_layer(peft=2.0)]
    timed[1] = replace(timed[1], peak_mib=4.0)
    (line,) = summary.summaries([*counted, *timed])
    assert (line.memory_saved, line.memory, line.bytes_over_peft) == (0.6, "peak", 0.75)
    assert " 60% (peak) " in summary.table([line])


def test_what_was_not_measured_stays_empty():
    line = summary.table(summary.summaries(counted_layer(fastlora=(3.0, 300.0)))).splitlines()[2]
    assert [cell.strip() for cell in line.strip("|").split("|")][4:] == [""] * 6


def test_more_memory_than_peft_is_shown_as_that():
    rows = counted_layer(peft=(4.0, 400.0), fastlora=(6.0, 500.0))
    line = summary.table(summary.summaries(rows)).splitlines()[2]
    assert [cell.strip() for cell in line.strip("|").split("|")][8:] == ["-25% (counted)", "1.50"]


def test_the_columns_of_a_table_line_up():
    text = summary.markdown(("a", "long heading"), [("wide cell", "b"), ("", "c")])
    assert text.splitlines() == [
        "| a         | long heading |",
        "|-----------|--------------|",
        "| wide cell | b            |",
        "|           | c            |",
    ]


def test_without_a_layer_every_timed_and_refused_row_is_shown():
    linear = replace(LAYER, level="linear", case="q_proj")
    rows = [
        *timed_layer(linear, peft=2.0),
        replace(linear, provider="broken", refused="dA is wrong"),
        *counted_layer(fastlora=(3.0, 300.0)),
        Row(level="roof", case="copy", provider="torch", median_us=3.0),
    ]
    lines = summary.times(rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[4:6] for row in cells] == [
        ["frozen", "0.10"],
        ["fastlora", "0.11"],
        ["peft", "0.21"],
        ["broken", "refused"],
    ]
    assert cells[2][-2:] == ["2.14 (2.12-2.16)", "2.00 (1.98-2.02)"]


# What is said in words.


def cases(*ratios: Ratio, level: str = "linear") -> list[Row]:
    """A case for each ratio of peft, its only other provider."""
    rows = []
    for number, ratio in enumerate(ratios):
        rows += timed_layer(replace(LAYER, level=level, case=f"case {number}"), peft=ratio)
    return rows


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (Ratio(1.02, 1.01, 1.03), "wins"),
        (Ratio(1.01, 1.0, 1.02), "even"),
        (Ratio(1.0, 0.99, 1.01), "even"),
        (Ratio(0.98, 0.97, 1.0), "even"),
        (Ratio(0.98, 0.97, 0.99), "loses"),
        (Ratio(2.0, 1.9, 2.1), "unstable"),
        (Ratio(0.5, 0.4, 0.6), "unstable"),
    ],
)
def test_a_verdict_is_what_all_rounds_say(ratio, verdict):
    ((found, row, against),) = summary.verdicts(cases(ratio))
    assert (found, row.provider, against) == (verdict, "peft", ratio)


def test_verdicts_are_against_the_fastest_other_of_the_same_case():
    rows = [
        *timed_layer(peft=2.0, addmm=0.9, fastlora_fused=0.5),
        *timed_layer(replace(LAYER, dropout=0.0), peft=2.0),
        *timed_layer(replace(LAYER, level="linear", case="q_proj")),
        *counted_layer(peft=(1.0, 1.0), fastlora=(9.0, 9.0)),
    ]
    found = [(verdict, row.provider, row.dropout) for verdict, row, _ in summary.verdicts(rows)]
    assert found == [("loses", "addmm", 0.1), ("wins", "peft", 0.0)]


def test_the_headline_counts_wins_and_gives_the_range_of_each_level():
    rows = [
        *cases(around(1.5), around(3.0), around(2.0), around(0.8)),
        *cases(around(1.25), level="layer"),
    ]
    linear, layer, *_ = summary.headline(rows).splitlines()
    assert linear.startswith("linear: 0.80 to 3.00 times as fast as the fastest other provider; ")
    assert linear.endswith("faster in 3 of 4 cases")
    assert layer.startswith("layer: 1.25 to 1.25 times")
    assert layer.endswith("faster in 1 of 1 cases")


def test_the_headline_names_every_case_that_loses_or_is_even():
    text = summary.headline(cases(around(0.8), around(2.0), around(1.0), around(0.9)))
    setting = "8,192 tokens, rank 16, dropout 0.1"
    lines = text.splitlines()
    assert lines[1:] == [
        f"slower than peft: Qwen3-8B case 0, {setting}, 0.80 (0.79-0.81)",
        f"slower than peft: Qwen3-8B case 3, {setting}, 0.90 (0.89-0.91)",
        f"neither faster nor slower than peft: Qwen3-8B case 2, {setting}, 1.00 (0.99-1.01)",
    ]
    assert "case 1" not in text  # the wins are in the first line


def test_what_is_unstable_is_in_no_line_but_the_one_that_says_so():
    text = summary.headline(cases(around(9.0, 0.06), around(0.1, 0.06), around(2.0, 0.05)))
    assert text.splitlines() == [
        "linear: 2.00 to 2.00 times as fast as the fastest other provider; faster in 1 of 1 cases",
        "2 of 3 comparisons are unstable (rounds more than 5% apart) and are not in these lines",
    ]
    alone = summary.headline(cases(around(9.0, 0.06)))
    assert "times as fast" not in alone
    assert alone.startswith("1 of 1 comparisons are unstable")


def test_the_headline_begins_with_what_was_counted():
    rows = counted_layer(peft=(10.0, 100.0), fastlora=(3.0, 5.0))
    other = counted_layer(peft=(10.0, 100.0), fastlora=(2.0, 4.0))
    here = [replace(row, model="here", moved_gib=9.0, counted_as="cpu") for row in rows]
    text = summary.headline([*rows, *(replace(row, model="another") for row in other), *here])
    assert text.splitlines()[0] == (
        "counts: a layer moves 0.20 to 0.30 of peft's bytes and keeps 95% to 96% less for its "
        "backward pass, with the plans of an H200"
    )


def test_the_headline_says_if_there_is_nothing_to_compare():
    for rows in ([], timed_layer(), counted_layer(peft=(1.0, 1.0), fastlora=(1.0, 1.0))):
        text = summary.headline(rows)
        assert text.endswith("Nothing was timed against another provider.")


# Two runs.


def test_two_runs_agree_where_their_rounds_overlap():
    before = timed_layer(peft=Ratio(2.0, 1.95, 2.05))
    for other, agrees in (
        (Ratio(2.08, 2.04, 2.1), True),
        (Ratio(2.08, 2.05, 2.1), True),
        (Ratio(2.08, 2.06, 2.1), False),
        (Ratio(1.9, 1.85, 1.94), False),
        (Ratio(1.9, 1.0, 3.0), True),
    ):
        after = timed_layer(peft=other)
        assert Ratio(2.0, 1.95, 2.05).agrees_with(other) is agrees
        differences = summary.compare(before, after)[1]
        seen = {(each.row.provider, each.column) for each in differences}
        assert (("peft", "over_fastlora") in seen) is not agrees


def test_a_disagreement_names_the_case_and_both_ratios():
    before = timed_layer(peft=Ratio(2.0, 1.98, 2.02))
    after = timed_layer(peft=Ratio(1.5, 1.49, 1.51))
    number, differences = summary.compare(before, after)
    # To the bare linears for fastlora and peft, to fastlora for frozen and peft.
    assert number == 4
    assert [str(difference) for difference in differences] == [
        "layer: Qwen3-8B layer, 8,192 tokens, rank 16, dropout 0.1, peft, over_frozen: "
        "2.14 (2.12-2.16) before, 1.60 (1.59-1.62) now",
        "layer: Qwen3-8B layer, 8,192 tokens, rank 16, dropout 0.1, peft, over_fastlora: "
        "2.00 (1.98-2.02) before, 1.50 (1.49-1.51) now",
    ]


def test_a_run_agrees_with_itself_and_with_its_file(tmp_path):
    rows = timed_layer(peft=2 / 3, addmm=1.1)
    results.write_rows(tmp_path / "layer.csv", rows)
    assert summary.compare(rows, rows) == (6, [])
    assert summary.compare(results.read_folder(tmp_path), rows) == (6, [])


@pytest.mark.parametrize(
    "change",
    [
        {"level": "linear"}, {"model": "other"}, {"tokens": 1}, {"rank": 8}, {"dropout": 0.0},
        {"dtype": "float16"}, {"case": "q_proj"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_what_stands_in_one_run_alone_is_not_compared(change):
    before = timed_layer(peft=2.0)
    assert summary.compare(before, timed_layer(replace(LAYER, **change), peft=9.0)) == (0, [])


# The device.


def test_roofs_are_bytes_and_flops_a_second():
    roof = Row(level="roof", provider="torch", gpu="a GPU")
    copy = replace(roof, case="copy", moved_gib=2.0, median_us=1000.0)
    product = replace(roof, case="product", tflop=0.5, median_us=2000.0)
    assert summary.roofs([product, LAYER, copy]) == Roofs("a GPU", 2.0 * 2**30 / 1e-3, 250e12)
    assert summary.roofs([copy, LAYER]) is None
    on_cpu = [replace(row, gpu="", cpu="a CPU") for row in (copy, product)]
    assert summary.roofs(on_cpu).name == "a CPU"


@pytest.mark.parametrize("cells", ["one,two,three", "2026-11-26,a,,,,,,,,,layer,m,c,many,,,"])
def test_a_broken_row_is_named_by_its_file_and_line(tmp_path, cells):
    path = tmp_path / "layer.csv"
    results.write_rows(path, [LAYER])
    extra = cells + "," * (len(COLUMNS) + 3) + "x" if cells.startswith("one") else cells
    path.write_text(path.read_text(encoding="utf-8") + extra + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"layer\.csv, line 3"):
        results.read(path)
