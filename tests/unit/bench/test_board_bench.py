"""How the board's benchmark turns what it saw into figures; and one whole run of it, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import board
from bench.board_case import (
    BoardCase,
    BoardCaseResult,
    BoardFigures,
    BoardMethodResult,
    figures,
)
from bench.board_methods import BoardSaved
from bench.board_table import case_table, targets_text
from bench.board_vm import View
from bench.figures import Spread
from tests.support.probes import has_uffd_wp

CASE = BoardCase(ram_mib=256, rate_mib_per_s=20, whole=False)


def _saved(**own: object) -> BoardSaved:
    return BoardSaved(
        began_s=10.0,
        touched_s=10.5,
        durable_s=12.0,
        downtime_ms=1.25,
        file_bytes=3 << 20,
        written_bytes=4 << 20,
        grew_bytes=1 << 20,
        peak_bytes=5 << 20,
        own=own,
    )


def _view(pages_per_s: float, gap_max_ms: float = 1.0, cpu_wait: float = 0.0) -> View:
    return View(pages_per_s=pages_per_s, gap_max_ms=gap_max_ms, cpu_wait=cpu_wait)


def _figures(downtime_ms: float = 1.0, progress: float = 1.0) -> BoardFigures:
    parts = {"stop_ms": 0.5, "devices_ms": 0.25, "protect_ms": 0.125, "cont_ms": 0.125}
    saved = _saved(downtime=parts, downtime_ms=downtime_ms, faults=7)
    return figures(saved, _view(1000 * progress), _view(1000), _view(1000))


def test_figures_of_a_snapshot() -> None:
    parts = {"stop_ms": 0.5, "devices_ms": 0.25, "protect_ms": 0.125, "cont_ms": 0.0625}
    found = figures(
        _saved(downtime=parts, downtime_ms=0.9375, faults=7),
        _view(900, gap_max_ms=6.0, cpu_wait=0.25),
        _view(1100, gap_max_ms=2.0, cpu_wait=0.5),
        _view(900, gap_max_ms=3.0),
    )
    assert found.progress == pytest.approx(0.9)
    assert found.durable_s == pytest.approx(2.0)
    assert (found.gap_max_ms, found.free_gap_max_ms) == (6.0, 3.0)
    assert (found.cpu_wait, found.free_cpu_wait) == (0.25, 0.25)
    assert (found.file_mib, found.written_mib, found.peak_mib) == (3.0, 4.0, 5.0)
    assert (found.downtime_ms, found.own_downtime_ms, found.faults) == (1.25, 0.9375, 7)
    assert [found.stop_ms, found.devices_ms, found.protect_ms, found.cont_ms] == [*parts.values()]


def test_figures_of_stop_and_save_have_no_parts() -> None:
    found = figures(_saved(), _view(10), _view(1000), _view(1000))
    assert found.downtime_ms == 1.25
    assert found.own_downtime_ms is None
    assert found.faults is None


def test_the_table_shows_what_there_is_and_the_failures() -> None:
    result = BoardCaseResult(
        case=CASE,
        populated_mib=254.9,
        methods={
            "inside": BoardMethodResult(
                repetitions=[_figures()],
                spreads={"own_downtime_ms": Spread(median=1.5, least=1.0, greatest=9.0)},
                ratios={"downtime_ms": 0.004},
            ),
            "stop": BoardMethodResult(failures=["MachineError: no"]),
        },
        audits=["AUDIT ok pages=1", "AUDIT FAILED pages=1"],
    )
    text = case_table(result)
    assert "256 MiB of RAM, 255 populated; 20 MiB/s" in text
    assert "1.50 [1.00 9.00]" in text
    assert "0.004" in text
    assert "stop failed: MachineError: no" in text
    assert "AUDIT FAILED" in text
    assert "AUDIT ok" not in text


@pytest.mark.parametrize(("downtime_ms", "progress", "missed"), [(1, 1, 0), (3, 1, 1), (3, 0.5, 2)])
def test_aims_are_compared_with_medians(downtime_ms: float, progress: float, missed: int) -> None:
    found = _figures(downtime_ms, progress)
    spread = {
        name: Spread(median=getattr(found, name), least=0, greatest=0)
        for name in ("own_downtime_ms", "progress")
    }
    result = BoardCaseResult(case=CASE, methods={"inside": BoardMethodResult(spreads=spread)})
    assert targets_text([result]).count("NOT reached") == missed


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    has_uffd_wp().require()
    report = tmp_path / "report.json"
    arguments = ["--ram", "16", "--repeat", "1", "--free-s", "0.1", "--directory", str(tmp_path)]
    assert board.main([*arguments, "--json", str(report)]) == 0
    (case,) = json.loads(report.read_text())["cases"]
    assert case["failure"] is None
    assert all(audit.startswith("AUDIT ok") for audit in case["audits"])
    assert len(case["audits"]) == 2, "a board for each protection"
    for name, method in case["methods"].items():
        assert method["failures"] == [], name
        (found,) = method["repetitions"]
        assert found["downtime_ms"] > 0
        assert (found["own_downtime_ms"] is None) == (name == "stop")
        assert found["file_mib"] > 0
        assert found["durable_s"] > 0
    assert case["methods"]["inside"]["repetitions"][0]["file_mib"] > 12
    assert "Targets" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_an_unknown_method_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        board.main(["--methods", "inside,nothing"])
    assert "no method nothing" in capsys.readouterr().err
