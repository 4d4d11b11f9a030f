"""Messages out of bytes, however they are cut."""

from __future__ import annotations

import itertools
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillframe.qmp.framing import Framer, FramingError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.lists(st.dictionaries(st.text(), VALUES, max_size=3), max_size=5)


@settings(max_examples=200, deadline=None)
@given(MESSAGES, st.booleans(), st.lists(st.integers(0, 400), max_size=12))
def test_any_cut_gives_the_same_messages(
    messages: list[dict[str, object]], pretty: bool, cuts: list[int]
) -> None:
    text = "".join(json.dumps(m, indent=4 if pretty else None) + "\r\n" for m in messages).encode()
    framer = Framer()
    got: list[dict[str, object]] = []
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    for start, end in itertools.pairwise(places):
        got += framer.feed(text[start:end])
    assert got == messages


def test_blank_lines_are_nothing() -> None:
    assert Framer().feed(b'\r\n\n  \n{"a": 1}\n\r\n') == [{"a": 1}]


@pytest.mark.parametrize(
    "text",
    [b"QEMU 7.2.22 monitor\n", b"[1]\n", b"{broken}\n", b'{"a": "\xff"}\n', b"\0\n", b"{1: 2}\n",
     b"{\n]\n}\n", b'{"a":' + b"[" * 100_000 + b"}\n"],
)  # fmt: skip
def test_what_is_no_message(text: bytes) -> None:
    with pytest.raises(FramingError):
        Framer().feed(text)


@pytest.mark.parametrize("piece", [b"{" + b" " * (1 << 20), b"{" + b" " * (1 << 20) + b"\n"])
def test_an_endless_message_is_given_up(piece: bytes) -> None:
    def feed_for_ever() -> None:
        framer = Framer()
        for _ in range(200):
            framer.feed(piece)

    with pytest.raises(FramingError, match="more than"):
        feed_for_ever()


def test_a_long_message_in_small_pieces_takes_no_square_time() -> None:
    framer = Framer()
    text = b'{"a": "' + b"x" * (8 << 20) + b'"}\n'
    began = time.process_time()
    got = [m for at in range(0, len(text), 4096) for m in framer.feed(text[at : at + 4096])]
    assert len(got) == 1
    assert time.process_time() - began < 3
