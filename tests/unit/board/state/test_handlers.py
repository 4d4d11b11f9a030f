"""The registry of save-state handlers."""

from __future__ import annotations

import io

import pytest

from stillframe.board.state.handlers import FIRST_SECTION_ID, SaveStateHandler, SaveStateRegistry
from stillframe.errors import NotFoundError, UsageError
from stillframe.vmstate.source import StreamSource
from tests.unit.board.state.toys import TIMER, timer


def test_order_is_by_priority_then_registration() -> None:
    registry = SaveStateRegistry()
    for idstr, priority in (("a", 0), ("b", 5), ("c", 0), ("d", -1), ("e", 5)):
        registry.register(idstr, SaveStateHandler(), version_id=1, priority=priority)
    assert [e.idstr for e in registry.entries] == ["b", "e", "a", "c", "d"]


def test_section_ids_are_unique_and_never_used_again() -> None:
    registry = SaveStateRegistry()
    first = registry.register("a", SaveStateHandler(), version_id=1)
    second = registry.register("b", SaveStateHandler(), version_id=1, priority=9)
    registry.unregister("b")
    third = registry.register("b", SaveStateHandler(), version_id=1)
    assert [e.section_id for e in (first, second, third)] == [2, 3, 4]
    assert FIRST_SECTION_ID == 2
    assert registry.entries == (first, third)


def test_instances_are_counted() -> None:
    registry = SaveStateRegistry()

    def register(instance_id: int | None = None) -> int:
        entry = registry.register("a", SaveStateHandler(), version_id=1, instance_id=instance_id)
        return entry.instance_id

    assert [register(), register(), register(7), register()] == [0, 1, 7, 8]
    with pytest.raises(UsageError, match="section 'a' 7 is registered already"):
        register(7)
    registry.unregister("a", 1)
    assert registry.find("a", 1) is None
    assert register(1) == 1


@pytest.mark.parametrize(
    ("idstr", "version_id", "instance_id"),
    [("", 1, 0), ("x" * 256, 1, 0), ("é", 1, 0), ("a", -1, 0), ("a", 1 << 31, 0), ("a", 1, -1)],
)
def test_impossible_entries_are_refused(idstr: str, version_id: int, instance_id: int) -> None:
    with pytest.raises(UsageError):
        SaveStateRegistry().register(
            idstr, SaveStateHandler(), version_id=version_id, instance_id=instance_id
        )


def test_unregister_refuses_what_is_not_there() -> None:
    with pytest.raises(NotFoundError, match="section 'a' 0 is not registered"):
        SaveStateRegistry().unregister("a")


def test_devices_have_their_descriptions_version() -> None:
    entry = SaveStateRegistry().register_device("pci/timer", TIMER, timer(), priority=3)
    assert (entry.idstr, entry.version_id, entry.priority) == ("pci/timer", 3, 3)
    assert not entry.handler.iterable


def test_plain_handler_saves_nothing() -> None:
    handler = SaveStateHandler()
    out = io.BytesIO()
    assert handler.iterate(out) is True
    for step in (handler.setup, handler.complete_precopy, handler.complete_postcopy, handler.save):
        step(out)
    handler.load(StreamSource(io.BytesIO()), 1)
    handler.cleanup()
    assert out.getvalue() == b""
    assert (handler.iterable, handler.is_active(), handler.has_postcopy()) == (False, True, False)
