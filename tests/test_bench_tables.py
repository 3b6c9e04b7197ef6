"""The figures in the READMEs are those in the files."""

from __future__ import annotations

import re

import pytest
import tables

from fastlora.bench import results


@pytest.mark.parametrize("path", tables.READMES, ids=lambda path: path.parent.name)
def test_a_readme_says_what_the_files_do(path):
    text = path.read_text(encoding="utf-8")
    assert tables.MARKERS.search(text)
    assert tables.filled(text) == text, "make bench-tables"


def test_every_block_of_figures_is_in_a_readme():
    texts = [path.read_text(encoding="utf-8") for path in tables.READMES]
    named = [match[1] for text in texts for match in tables.MARKERS.finditer(text)]
    assert sorted(named) == sorted(tables.BLOCKS)


def test_another_figure_in_a_file_is_noticed(tmp_path, monkeypatch):
    for path in (tables.RESULTS / "cpu").glob("*.csv"):
        text = path.read_text(encoding="utf-8")
        if path.stem == "host":
            text = re.sub(r"(?m)^(.*,forward,.*,fastlora,cpu,\d+),[\d.]+", r"\1,1000", text)
            # Over frozen: the first of the ratios.
            lines = [line.split(",") for line in text.splitlines()]
            place = lines[0].index("over_frozen")
            for cells in lines[1:]:
                cells[place] = "77" if cells[place] else ""
            text = "\n".join(",".join(cells) for cells in lines) + "\n"
        (tmp_path / "cpu").mkdir(exist_ok=True)
        (tmp_path / "cpu" / path.name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text = tables.READMES[0].read_text(encoding="utf-8")
    assert "77.0 times a bare" in tables.filled(text)


def test_unknown_figures_are_refused():
    with pytest.raises(ValueError, match="there are no figures 'speed'"):
        tables.filled("<!-- figures: speed -->\n<!-- end -->")


def test_every_committed_row_says_what_it_was_made_with():
    paths = sorted(tables.RESULTS.glob("*/*.csv"))
    assert paths
    for path in paths:
        for row in results.read(path):
            made = (row.date, row.commit, row.torch, row.triton, row.peft, row.transformers)
            assert all(made), f"{path.name}: {row}"
            assert "dirty" not in row.commit, f"{path.name} was measured on uncommitted code"
