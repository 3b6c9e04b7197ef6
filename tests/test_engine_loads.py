"""Hot loads and unloads under a running load: the short form of ``make soak``."""

from __future__ import annotations

import pytest
import soak

from fastlora.adapters.pool import AdapterPool


def test_every_answer_is_right_while_adapters_come_and_go(monkeypatch):
    evicted: list[str] = []

    def evict(self, version):
        if version.named:
            evicted.append(version.name)
        take_away(self, version)

    take_away = AdapterPool._evict
    monkeypatch.setattr(AdapterPool, "_evict", evict)
    report = soak.soak(50, variants=6)
    assert report.wrong == []
    assert (report.loads, len(report.mib)) == (50, 50)
    assert report.unloads > 10
    assert report.answers > 50
    # Beside those that lost their name: these had to leave for others.
    assert evicted


def test_the_soak_sees_an_adapter_that_is_taken_from_a_request(monkeypatch):
    monkeypatch.setattr(AdapterPool, "_may_leave", lambda self, version: True)
    report = soak.soak(12, variants=4)
    assert report.wrong
    assert report.has_failed
    assert f"{len(report.wrong)} of them wrong" in str(report)


@pytest.mark.parametrize(
    ("loads", "growth", "has_failed"),
    [(1000, 0.011, True), (1000, 0.009, False), (1000, 0.0, False), (50, 1.0, False)],
)
def test_the_soak_sees_memory_that_grows(loads, growth, has_failed):
    """Over the last half: what the first loads take is no growth."""
    mib = [400 + 50 * min(1.0, 4 * i / loads) + growth * i for i in range(loads)]
    report = soak.Report(loads=loads, mib=mib)
    assert report.slope_mib == pytest.approx(100 * growth)
    assert report.has_failed is has_failed


def test_the_command_prints_what_was_seen_and_fails_where_it_has_to(monkeypatch, capsys):
    reports = iter([soak.Report(loads=3, mib=[1.0]), soak.Report(wrong=["red: no"], mib=[1.0])])
    asked: list[tuple] = []

    def run(loads, *, seed, progress):
        asked.append((loads, seed, progress))
        return next(reports)

    monkeypatch.setattr(soak, "soak", run)
    assert soak.main(["--loads", "3"]) == 0
    assert soak.main(["--seed", "5"]) == 1
    assert asked == [(3, 0, True), (1000, 5, True)]
    out = capsys.readouterr().out
    assert out.startswith("3 loads and 0 unloads, 0 answers, 0 of them wrong")
    assert "red: no" in out
