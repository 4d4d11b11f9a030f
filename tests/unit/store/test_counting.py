"""A sink that counts what goes through it."""

from __future__ import annotations

from pathlib import Path

from stillframe.still.sinks import SparseSink
from stillframe.store.backends.counting import counting
from stillframe.store.backends.local import LocalSink
from tests.support_store.memory import MemorySink


def test_it_counts_and_passes_on() -> None:
    counts: list[int] = []
    inner = MemorySink()
    sink = counting(inner, counts.append)
    sink.write(b"abc")
    sink.write(memoryview(b"de"))
    sink.commit()
    sink.abort()
    assert counts == [3, 5]
    assert sink.description == inner.description
    assert isinstance(sink, SparseSink) is isinstance(inner, SparseSink)


def test_a_sparse_sink_stays_sparse(tmp_path: Path) -> None:
    counts: list[int] = []
    sink = counting(LocalSink(tmp_path / "x"), counts.append)
    assert isinstance(sink, SparseSink)
    sink.write_at(4096, b"abc")
    sink.set_length(8192)
    sink.commit()
    assert counts == [3]
    assert (tmp_path / "x").read_bytes() == bytes(4096) + b"abc" + bytes(4093)
