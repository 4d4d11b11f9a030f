"""The tests' independent reader refuses streams that their description does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from stillframe.vmstate import writer
from tests.support.analyze_reader import Analysis, AnalyzeError, description
from tests.unit.board.state.toys import filled_machine


def changed(change: Callable[[dict[str, Any]], None]) -> bytes:
    """A whole stream whose description was changed."""
    data = filled_machine().stream()
    described, start = description(data)
    change(described)
    return data[:start] + writer.vmdescription(described)


def timer(described: dict[str, Any]) -> list[dict[str, Any]]:
    fields: list[dict[str, Any]] = described["devices"][0]["fields"]
    return fields


def test_unchanged_is_read() -> None:
    analysis = Analysis(changed(lambda d: None))
    assert set(analysis.state) == {"toy/timer (3)", "notes (4)", "globalstate (2)"}
    assert analysis.ram == {"toy.ram": 3 * 4096, "toy.vram": 4096}


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["devices"].pop(),
        lambda d: timer(d).pop(),
        lambda d: timer(d)[0].update(size=4),
        lambda d: timer(d)[0].update(type="uint32"),
        lambda d: timer(d)[2].update(array_len=3),
        lambda d: timer(d)[2].update(size=4),
        lambda d: timer(d)[1].update(name="now_ns"),
        lambda d: timer(d)[1].update(index=1),
        lambda d: timer(d)[3].update(type="bool", size=2),
        lambda d: d["devices"][0]["subsections"].clear(),
        lambda d: d["devices"][0]["subsections"][0].update(vmsd_name="timer/other"),
        lambda d: d["devices"][0]["subsections"][0].update(version=2),
        lambda d: d["configuration"]["fields"][1].update(size=5),
        lambda d: d["devices"][1]["fields"][0].update(size=8),
    ],
)
def test_what_does_not_fit_is_refused(change: Callable[[dict[str, Any]], None]) -> None:
    with pytest.raises((AnalyzeError, KeyError, UnicodeDecodeError)):
        Analysis(changed(change))


def test_last_brace_is_found() -> None:
    """The JSON is found as the script finds it, whatever its length's bytes."""
    for length in range(0x7B00 - 40, 0x7B00 + 60, 20):
        text = {"devices": [], "page_size": 4096, "pad": "x" * length}
        data = writer.stream_header() + writer.eof() + writer.vmdescription(text)
        assert description(data)[0] == json.loads(json.dumps(text))
