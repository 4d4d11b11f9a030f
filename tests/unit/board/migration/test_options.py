"""Capabilities and parameters: names, defaults, limits, and QEMU's wording."""

from __future__ import annotations

import pytest

from stillframe.board.migration.capabilities import NAMES, Capabilities
from stillframe.board.migration.parameters import ParameterTable
from stillframe.errors import HostError, RefusedError, StillframeError, UsageError


def nothing_missing() -> None:
    pass


def lacking() -> None:
    raise HostError("userfaultfd is not allowed here")


def capabilities(
    *, tracking: bool = True, missing_pages: bool = True, incoming: bool = False
) -> Capabilities:
    return Capabilities(
        probe_write_tracking=nothing_missing if tracking else lacking,
        probe_missing_pages=nothing_missing if missing_pages else lacking,
        waits_for_incoming=lambda: incoming,
    )


def test_all_are_off_and_stay_as_they_are_set() -> None:
    caps = capabilities()
    assert dict(caps.as_dict()) == dict.fromkeys(NAMES, False)
    caps.set({"events": True})
    caps.set({"postcopy-ram": True})
    assert [name for name, on in caps.as_dict().items() if on] == ["events", "postcopy-ram"]


@pytest.mark.parametrize("other", ["postcopy-ram", "return-path"])
def test_background_snapshot_excludes(other: str) -> None:
    caps = capabilities()
    caps.set({other: True})
    with pytest.raises(RefusedError) as caught:
        caps.set({"background-snapshot": True, "events": True})
    assert str(caught.value) == f"Background-snapshot is not compatible with {other}"
    assert not caps["background-snapshot"]
    assert not caps["events"], "all or none"
    caps.set({"background-snapshot": True, other: False})
    with pytest.raises(RefusedError):
        caps.set({other: True})


def test_an_unknown_name() -> None:
    with pytest.raises(UsageError) as caught:
        capabilities().set({"nonsense": True})
    assert str(caught.value) == "Parameter 'capability' does not accept value 'nonsense'"


def test_what_the_host_cannot_do() -> None:
    with pytest.raises(RefusedError) as caught:
        capabilities(tracking=False).set({"background-snapshot": True})
    assert str(caught.value).startswith("Background-snapshot is not supported by host kernel")
    assert "userfaultfd is not allowed here" in str(caught.value)
    with pytest.raises(RefusedError) as caught:
        capabilities(missing_pages=False, incoming=True).set({"postcopy-ram": True})
    assert str(caught.value).startswith("Postcopy is not supported")
    # Only a destination fills RAM on demand.
    capabilities(missing_pages=False).set({"postcopy-ram": True})


def test_defaults_are_qemus() -> None:
    assert ParameterTable().as_dict() == {
        "max-bandwidth": 134217728,
        "avail-switchover-bandwidth": 0,
        "downtime-limit": 300,
        "max-postcopy-bandwidth": 0,
    }


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ({"downtime-limit": 2000001}, "Parameter 'downtime_limit' expects an integer in the range"),
        ({"downtime-limit": -1}, "Parameter 'downtime_limit' expects an integer in the range"),
        ({"max-bandwidth": 1 << 64}, "Parameter 'max_bandwidth' expects an integer in the range"),
        ({"max-bandwidth": "x"}, "Parameter 'max-bandwidth' expects uint64"),
        ({"max-bandwidth": True}, "Parameter 'max-bandwidth' expects uint64"),
        ({"nope": 1}, "Parameter 'nope' is unexpected"),
    ],
)
def test_bad_parameters_change_nothing(wanted: dict[str, object], text: str) -> None:
    table = ParameterTable()
    with pytest.raises(StillframeError) as caught:
        table.set({"max-postcopy-bandwidth": 5, **wanted})
    assert text in str(caught.value)
    assert table.as_dict() == ParameterTable().as_dict()


def test_who_chose_a_limit() -> None:
    table = ParameterTable()
    assert not table.chosen("max-bandwidth")
    table.set({"max-bandwidth": 134217728})
    assert table.chosen("max-bandwidth")
    assert table.now.max_bandwidth == 134217728
