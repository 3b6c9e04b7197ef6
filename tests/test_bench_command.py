"""``fastlora bench``: what it takes, prints and writes, and how it refuses."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from fastlora import cli
from fastlora.bench import command, measuring, report, results, session
from fastlora.bench.measuring import Timing
from fastlora.bench.planning import LEVELS, Options
from fastlora.bench.providers import PROVIDERS, Provider
from fastlora.bench.session import Session
from fastlora.bench.shapes import MAIN_MODELS, MODELS, Linear
from fastlora.bench.summary import HEADINGS

# Microseconds of every provider, where no real time is measured; peft's default is twice as slow.
US = {"frozen": 100.0, "peft": 214.0, "peft-bf16": 160.5, "fastlora": 107.0, "fastlora-bf16": 105.0}
ON_A_GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def poisoned_empty():
    """Override the fixture of all tests: filling what fastlora allocates would be counted."""


@pytest.fixture(autouse=True)
def same_providers() -> Iterator[None]:
    """Leave the providers as they were."""
    before = dict(PROVIDERS)
    yield
    PROVIDERS.clear()
    PROVIDERS.update(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the configuration of a tiny model."""
    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=64,
    )
    path = tmp_path_factory.mktemp("models") / "tiny"
    config.save_pretrained(path)
    return path


def told(us: dict[str, float]):
    """Return what stands in for ``in_rounds``: it runs nothing, and knows the times."""

    def in_rounds(steps, device, *, rounds, turns, before_round=lambda: None):
        timings = {}
        for number, name in enumerate(steps):
            # Every provider drifts a little in its own way, around its time.
            drift = [1 + 0.0005 * number * (i - rounds // 2) for i in range(rounds)]
            timings[name] = Timing(tuple((us.get(name, 100.0) * each,) * turns for each in drift))
        return timings

    return in_rounds


@pytest.fixture
def no_page(monkeypatch):
    """Do not draw the figures, which takes half a second."""
    monkeypatch.setattr(report, "write_report", lambda *args: [])


@contextlib.contextmanager
def without_timing(us: dict[str, float]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "in_rounds", told(us))
        patch.setattr(measuring, "turns_for", lambda steps, device, rounds, seconds: 1)
        patch.setattr(session, "gc", SimpleNamespace(collect=lambda: None))
        yield


def bench(*arguments: object) -> tuple[int, str, str]:
    """Run ``fastlora bench``; returns its exit status, and what it said on both streams."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        status = cli.main(["bench", *map(str, arguments)])
    return status, out.getvalue(), err.getvalue()


@dataclass(frozen=True)
class Run:
    """A run that was made, and what was said."""

    arguments: list[object]
    status: int
    out: str
    err: str
    folder: Path


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory) -> Run:
    """A run on the tiny model whose times are known."""
    out = tmp_path_factory.mktemp("runs") / "first"
    arguments = [
        *("--model", folder, "--tokens", 16, "--rank", 4, "--dropout", 0.1, "--device", "cpu"),
        *("--dtype", "bfloat16", "--levels", "counts", "layer"),
    ]
    with without_timing(US):
        return Run(arguments, *bench(*arguments, "--out", out), out)


def table_of(printed: str) -> list[list[str]]:
    """Return the cells of the first table that was printed."""
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# A run.


def test_the_table_of_the_model_is_printed_with_every_column(made, folder):
    heading, line = table_of(made.out)
    assert heading == list(HEADINGS)
    assert line[:4] == [str(folder), "16", "4", "0.1"]
    assert [cell.partition(" ")[0] for cell in line[4:8]] == ["1.07", "2.00", "1.50", "1.50"]
    assert line[7].endswith(") peft-bf16")
    assert "~" not in "".join(line)
    assert line[8].endswith("% (counted)")
    assert float(line[9]) > 0
    assert made.status == 0


def test_the_headline_the_folder_and_the_progress_are_said(made):
    gain = "1.50 to 1.50 times as fast as the fastest other provider; faster in 1 of 1 cases"
    assert f"layer: {gain}\n" in made.out
    assert f"written to {made.folder}: report.html, " in made.out
    assert made.out.rstrip().endswith(", and the rows")
    assert f"layer, {made.arguments[1]} layer, 16 tokens, rank 4, dropout 0.1\n" in made.err


def test_rows_page_and_command_are_written(made):
    files = {path.name for path in made.folder.iterdir()}
    assert {"roof.csv", "counts.csv", "layer.csv", "report.html"} <= files
    assert not {f"{level}.csv" for level in ("step", "linear", "operation")} & files
    rows = results.read_folder(made.folder)
    assert {row.level for row in rows} == {"roof", "counts", "layer"}
    timed = {row.provider: row.median_us for row in rows if row.level == "layer"}
    assert timed == pytest.approx(US, rel=1e-5)
    exact = shlex.join(["fastlora", "bench", *map(str, made.arguments), "--out", str(made.folder)])
    assert exact in (made.folder / "report.html").read_text(encoding="utf-8")


def test_a_report_is_shown_again_and_nothing_is_measured(made, monkeypatch):
    page = (made.folder / "report.html").read_text(encoding="utf-8")
    (made.folder / "report.html").unlink()
    monkeypatch.setattr(command, "Session", None)
    status, out, err = bench("--report", made.folder)
    assert (status, err) == (0, "")
    assert out == made.out
    again = (made.folder / "report.html").read_text(encoding="utf-8")
    assert shlex.join(["--model", str(made.arguments[1]), "--tokens"]) in again
    assert "--report" not in again
    assert len(again) == pytest.approx(len(page), rel=0.01)


LEFT_OUT = "Qwen3-0.6B is timed with 256 of 512 tokens on a CPU.\n"


def bench_without_time(out: Path) -> str:
    """Run where there is no time for anything; returns what was printed."""
    arguments = ["--tokens", 512, "--levels", "layer", "--minutes", 1e-9, "--device", "cpu"]
    return bench(*arguments, "--model", "Qwen3-0.6B", "--out", out)[1]


def test_what_was_left_out_is_said(tmp_path, no_page):
    out = bench_without_time(tmp_path)
    assert LEFT_OUT in out
    assert "Out of time: layer, Qwen3-0.6B layer, 256 tokens, rank 16, dropout 0.1 and 1 mor" in out


def test_what_was_left_out_is_said_again_with_the_report(tmp_path, no_page):
    bench_without_time(tmp_path)
    results.write_rows(tmp_path / "layer.csv", [results.Row(level="layer", provider="peft")])
    assert LEFT_OUT in bench("--report", tmp_path)[1]


def test_a_run_agrees_with_one_of_the_same_times(made, tmp_path, no_page):
    with without_timing(US):
        status, out, _ = bench(*made.arguments, "--out", tmp_path, "--against", made.folder)
    assert status == 0
    # Five ratios to the bare linears and five to fastlora, without those of each to itself.
    assert f"8 ratios stand in {made.folder} too; 0 disagree" in out


def test_a_run_says_where_it_disagrees_with_an_earlier_one(made, tmp_path, no_page):
    with without_timing(US | {"peft": 150.0}):
        status, out, _ = bench(*made.arguments, "--out", tmp_path, "--against", made.folder)
    assert status == 0
    said = out.partition(f"8 ratios stand in {made.folder} too; 2 disagree\n")[2].splitlines()
    case = f"  layer: {made.arguments[1]} layer, 16 tokens, rank 4, dropout 0.1, peft, "
    number = r"\d\.\d\d"
    for line, column, before, now in (
        (said[0], "over_frozen", "2.14", "1.50"),
        (said[1], "over_fastlora", "2.00", "1.40"),
    ):
        ratios = rf"{before} \({number}-{number}\) before, {now} \({number}-{number}\) now"
        assert re.fullmatch(f"{re.escape(case)}{column}: {ratios}", line)
    assert said[2] == ""


def test_a_report_is_compared_as_a_run_is(made, no_page):
    _, out, _ = bench("--report", made.folder, "--against", made.folder)
    assert f"8 ratios stand in {made.folder} too; 0 disagree" in out


def test_a_run_is_compared_with_the_one_that_it_replaces(made, tmp_path, no_page):
    results.write_rows(tmp_path / "layer.csv", results.read(made.folder / "layer.csv"))
    with without_timing(US | {"peft": 150.0}):
        _, out, _ = bench(*made.arguments, "--out", tmp_path, "--against", tmp_path)
    assert f"8 ratios stand in {tmp_path} too; 2 disagree" in out


def test_a_folder_holds_the_rows_of_its_last_run_alone(made, tmp_path, no_page):
    results.write_rows(tmp_path / "step.csv", [results.Row(level="step", provider="old")])
    with without_timing(US):
        bench(*made.arguments, "--out", tmp_path)
    assert "old" not in {row.provider for row in results.read_folder(tmp_path)}


def test_single_linears_are_timed_and_shown_one_by_one(tmp_path):
    arguments = ["--shape", 24, 16, "--shape", 8, 16, "--tokens", 16, "--rank", 4]
    with without_timing(US):
        status, out, _ = bench(
            *arguments, "--dropout", 0, "--provider", "peft", "--device", "cpu", "--out", tmp_path
        )
    assert status == 0
    heading, *lines = table_of(out)
    assert heading[:2] == ["model", "case"]
    assert [(line[0], line[4]) for line in lines] == [
        (shape, name) for shape in ("24 x 16", "8 x 16") for name in ("frozen", "peft", "fastlora")
    ]
    assert [line[5] for line in lines] == ["0.10", "0.21", "0.11"] * 2
    rows = results.read(tmp_path / "linear.csv")
    assert {(row.model, row.n, row.k) for row in rows} == {("24 x 16", 24, 16), ("8 x 16", 8, 16)}


def test_another_library_joins_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "their_linear.py").write_text(
        "from fastlora.bench.providers import Provider\n"
        "right = Provider('theirs', 'for a test', has_dropout=False)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with without_timing(US | {"theirs": 53.5}):
        _, out, _ = bench(
            "--shape", 24, 16, "--tokens", 16, "--rank", 4, "--dropout", 0, "--device", "cpu",
            "--provider", "their_linear:right", "--out", tmp_path / "out",
        )  # fmt: skip
    gain = "0.50 to 0.50 times as fast as the fastest other provider; faster in 0 of 1 cases"
    assert f"linear: {gain}\n" in out
    assert "slower than theirs: 24 x 16 linear, 16 tokens, rank 4, dropout 0, 0.50" in out


def fails(layer: torch.nn.Module) -> torch.nn.Module:
    raise NotImplementedError("not for this device")


def test_a_provider_that_does_not_run_is_named_and_the_status_is_1(made, tmp_path):
    PROVIDERS["broken"] = Provider("broken", "for a test", fails, countable=False)
    with without_timing(US):
        status, out, _ = bench(*made.arguments, "--out", tmp_path)
    assert status == 1
    assert (
        f"REFUSED broken, layer, {made.arguments[1]} layer, 16 tokens, rank 4, dropout 0.1: "
        "did not run: NotImplementedError: not for this device\n"
    ) in out
    assert table_of(out) == table_of(made.out)
    assert "written to " in out
    # Shown again it is the same.
    status, again, _ = bench("--report", tmp_path)
    assert status == 1
    assert again == out


def test_an_interrupted_run_shows_what_it_has(made, tmp_path, monkeypatch):
    run = Session._time_modules

    def interrupted(self, item, seconds):
        if item.row.level == "linear":
            raise KeyboardInterrupt
        run(self, item, seconds)

    monkeypatch.setattr(Session, "_time_modules", interrupted)
    with without_timing(US):
        _, out, _ = bench(*made.arguments, "linear", "--out", tmp_path)
    assert "Interrupted: what is missing was not measured." in out
    assert table_of(out) == table_of(made.out)
    assert (tmp_path / "report.html").exists()


def test_without_matplotlib_the_rows_and_the_table_are_there(made, monkeypatch):
    def missing(*args: object) -> None:
        raise RuntimeError("figures need matplotlib")

    monkeypatch.setattr(report, "write_report", missing)
    status, out, err = bench("--report", made.folder)
    assert status == 0
    assert table_of(out) == table_of(made.out)
    assert err == f"the rows are in {made.folder}; figures need matplotlib\n"


# Arguments.


@pytest.fixture
def wanted(monkeypatch, tmp_path):
    """Return what a command line asks a session for, without running it."""
    monkeypatch.chdir(tmp_path)

    def asked(*arguments: object) -> tuple[Options, Path]:
        seen = []

        def record(self, tick=None):
            seen.append((self.options, self._folder))
            return []

        monkeypatch.setattr(Session, "run", record)
        assert bench(*arguments)[0] == 0
        return seen[0]

    return asked


def test_by_default_a_cpu_times_the_smallest_model_and_counts_all(wanted):
    options, folder = wanted("--device", "cpu")
    assert [model.name for model in options.models] == [MAIN_MODELS[0]]
    assert list(options.counted) == list(MODELS.values())
    assert (options.device.type, options.dtype) == ("cpu", torch.float32)
    assert (options.tokens, options.ranks, options.dropouts) == ([8192], [16], [0.1, 0.0])
    assert (options.levels, options.providers, options.rounds) == (LEVELS, None, 7)
    assert (options.seconds, folder) == (480.0, Path("runs/bench/cpu"))


def test_every_argument_is_taken(wanted, tmp_path):
    options, folder = wanted(
        "--model", "Qwen3-8B", "--model", "Qwen/Qwen2.5-7B-Instruct", "--tokens", 64, 32,
        "--rank", 8, 16, "--dropout", 0, 0.05, "--levels", "layer", "counts", "--provider", "peft",
        "--provider", "addmm", "--device", "cpu", "--dtype", "float16", "--rounds", 9,
        "--minutes", 0.25, "--commit", "abc1234", "--out", tmp_path / "there",
    )  # fmt: skip
    assert options == Options(
        models=[MODELS["Qwen3-8B"], MODELS["Qwen2.5-7B"]],
        tokens=[64, 32],
        ranks=[8, 16],
        dropouts=[0.0, 0.05],
        levels=["layer", "counts"],
        providers=["peft", "addmm"],
        device=torch.device("cpu"),
        dtype=torch.float16,
        rounds=9,
        seconds=15.0,
        commit="abc1234",
    )
    assert folder == tmp_path / "there"


def test_shapes_alone_ask_for_no_model_and_beside_one_for_both(wanted):
    options, _ = wanted("--shape", 24, 16, "--shape", 8, 4, "--device", "cpu")
    assert options.linears == {"24 x 16": Linear(24, 16), "8 x 4": Linear(8, 4)}
    assert (list(options.models), options.counted) == ([], None)
    options, _ = wanted("--shape", 24, 16, "--model", "Qwen3-8B", "--levels", "layer")
    assert list(options.models) == [MODELS["Qwen3-8B"]]
    assert options.levels == ["layer", "linear"]


def test_quick_is_counts_and_layers_in_half_a_minute(wanted):
    options, _ = wanted("--quick", "--tokens", 64, 32, "--device", "cpu")
    assert tuple(options.levels) == ("counts", "layer")
    assert (options.tokens, options.rounds, options.seconds) == ([64], 5, 30.0)
    options, _ = wanted("--quick", "--levels", "linear", "--minutes", 2, "--device", "cpu")
    assert (options.levels, options.seconds) == (["linear"], 120.0)


def test_rounds_that_were_asked_for_are_taken_with_quick_too(wanted):
    assert wanted("--quick", "--rounds", 9, "--device", "cpu")[0].rounds == 9


def refused(out: Path, *arguments: object) -> str:
    """Return what a bad command line is told, in one line, before anything was measured."""
    status, printed, said = bench(*arguments, "--out", out)
    assert (status, printed) == (1, "")
    assert said.startswith("fastlora bench: ")
    assert said.count("\n") == 1, said
    assert not out.exists()
    return said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", 4], "rounds must be at least 5 for a spread, got 4"),
        (["--tokens", 0], "tokens, rank and time must be positive, got tokens [0]"),
        (["--rank", -1], "rank [-1]"),
        (["--dropout", 1], "dropout must lie in [0, 1), got 1.0"),
        (["--minutes", 0], "tokens, rank and time must be positive"),
        (["--minutes", -1], "and -60 s"),
        (["--levels", "layer", "kernel"], "there is no level 'kernel'; there are counts, layer"),
        (["--provider", "best"], "there is no provider 'best'; there are frozen, peft"),
        (["--provider", "no_such_module:lora"], "'no_such_module:lora' cannot be imported"),
        (["--report", "no-such-folder"], "no-such-folder holds no results of `fastlora bench`"),
        pytest.param(
            ["--device", "cuda"], "there is no CUDA device",
            marks=pytest.mark.skipif(ON_A_GPU, reason="there is one"),
        ),
        (["--device", "gpu0"], "gpu0"),
        pytest.param(
            ["--model", "nobody/no-such-model"], "no-such-model",
        ),
        pytest.param(
            ["--against", "no-such-folder", "--levels", "counts"], "no-such-folder",
        ),
        pytest.param(
            ["--shape", 0, 16], "0",
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_bad_argument_is_told_in_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    # Small, should it be run all the same.
    small = ["--shape", 8, 8] if "--shape" not in arguments and "--model" not in arguments else []
    usual = {"--device": ["cpu"], "--tokens": [16], "--rank": [4]}
    rest = [
        part for name, value in usual.items() if name not in arguments for part in (name, *value)
    ]
    with without_timing(US):
        assert message in refused(tmp_path / "out", *arguments, *small, *rest)


@pytest.mark.parametrize(
    "arguments", [["--dtype", "int8"], ["--shape", "3"], ["--rounds", "many"], ["--levels"]]
)
def test_what_cannot_be_parsed_is_told_by_argparse(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", *arguments])
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_help_imports_little_and_names_levels_and_providers():
    script = (
        "import sys\n"
        "from fastlora import cli\n"
        "try:\n    cli.main(['bench', '--help'])\n"
        "finally:\n    print('IMPORTED', *sys.modules)\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    text, _, imported = found.stdout.partition("IMPORTED")
    assert found.returncode == 0
    assert not {"torch", "peft", "transformers", "triton", "matplotlib"} & set(imported.split())
    words = set(text.replace(",", " ").replace("(", " ").split())
    assert set(LEVELS) <= words | {"operation"}
    assert "operation" in text
    assert set(PROVIDERS) <= words
    for argument in ("--model", "--shape", "--quick", "--report", "--against", "--out"):
        assert argument in words
