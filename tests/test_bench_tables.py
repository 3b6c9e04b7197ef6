"""The figures in the READMEs are those in the files."""

from __future__ import annotations

import shutil
from dataclasses import replace

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
    shutil.copytree(tables.RESULTS / "cpu", tmp_path / "cpu")
    path = tmp_path / "cpu" / "host.csv"
    results.write_rows(path, [replace(row, over_frozen=77.0) for row in results.read(path)])
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text = tables.READMES[0].read_text(encoding="utf-8")
    assert "77.0 times a bare" in tables.filled(text)


def test_unknown_figures_are_refused():
    with pytest.raises(ValueError, match="there are no figures 'speed'"):
        tables.filled("<!-- figures: speed -->\n<!-- end -->")


def test_every_committed_row_says_what_it_was_made_with():
    # gpu.py's own tables have other columns.
    others = ("sweep.csv", "dram.csv")
    paths = [path for path in sorted(tables.RESULTS.glob("*/*.csv")) if path.name not in others]
    assert paths
    for path in paths:
        for row in results.read(path):
            made = (row.date, row.commit, row.torch, row.triton, row.peft, row.transformers)
            assert all(made), f"{path.name}: {row}"
            assert "dirty" not in row.commit, f"{path.name} was measured on uncommitted code"
