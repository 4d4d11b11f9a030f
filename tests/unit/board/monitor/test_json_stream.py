"""Values out of a client's bytes, however they are cut, malformed or hostile."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillframe.qmp.errors import QmpError
from stillframe.qmp.json_stream import NESTING_MAX, JsonStream

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="￾￿"))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT.filter(lambda text: not any(_is_noncharacter(ord(c)) for c in text)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc é\n\"'\\"), inner),
    max_leaves=12,
)
MESSAGES = st.lists(VALUES.map(lambda value: {"v": value}), max_size=4)
CUTS = st.lists(st.integers(0, 600), max_size=12)


def _is_noncharacter(code: int) -> bool:
    return 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE


def pieces(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(places)]


def fed(*data: bytes) -> list[object]:
    """What comes out, errors as their words."""
    stream = JsonStream()
    out = [value for piece in data for value in stream.feed(piece)]
    return [value.description if isinstance(value, QmpError) else value for value in out]


@settings(max_examples=300, deadline=None)
@given(MESSAGES, st.booleans(), st.booleans(), CUTS)
def test_any_cut_gives_the_same_values(
    messages: list[object], pretty: bool, ascii_only: bool, cuts: list[int]
) -> None:
    text = "".join(
        json.dumps(message, indent=2 if pretty else None, ensure_ascii=ascii_only)
        for message in messages
    )
    assert fed(*pieces(text.encode(), cuts)) == messages


@settings(max_examples=500, deadline=None)
@given(
    st.lists(
        st.sampled_from([b"{", b"}", b"[", b"]", b",", b":", b'"', b"'", b"\\", b"\xff", b"\n"])
        | st.sampled_from([b"0", b"-", b"1.", b"e", b"true", b'"a"', b"\x00", b"\\u12"])
        | st.binary(max_size=4),
        max_size=60,
    ).map(b"".join),
    CUTS,
)
def test_any_cut_of_garbage_gives_the_same_errors(garbage: bytes, cuts: list[int]) -> None:
    end = b'\xff\n{"end": 1}'
    whole = fed(garbage + end)
    assert fed(*pieces(garbage + end, cuts)) == whole
    assert whole[-1] == {"end": 1}


@pytest.mark.parametrize("half", [
    b'{"execute": "stop"', b'{"execute": "st', b'{"execute": "st\\', b"[[[[", b"12", b"tr",
    b'{"a": "\\u00', b"-", b"1.5e", b"",
])  # fmt: skip
@pytest.mark.parametrize("between", [b"\xff", b"\xff\n"])
def test_the_byte_ff_ends_whatever_was_half_said(half: bytes, between: bytes) -> None:
    out = fed(half + between + b'{"execute": "cont"}\n')
    assert out[-1] == {"execute": "cont"}
    assert {"execute": "stop"} not in out
    assert isinstance(out[-2], str)


@pytest.mark.parametrize(("text", "wanted"), [
    (b"5 ", 5), (b"-0 ", 0), (b"0.5 ", 0.5), (b"1e3\n", 1000.0), (b"true\r\n", True),
    (b" null ", None), (b'"\\ud83d\\ude00"', "\U0001f600"), (b"{}", {}),
    (b'"\\u0000\\/\\b\\f\\n\\r\\t\\""', '\0/\b\f\n\r\t"'), (b"[]", []), (b"[[], {}]", [[], {}]),
    (b"18446744073709551615 ", 2**64 - 1), (b"-9223372036854775808 ", -(2**63)),
    (b'"\\\\"', "\\"), (b'"]}"', "]}"), (b'"\xf4\x8f\xbf\xbd"', "\U0010fffd"),
])  # fmt: skip
def test_values(text: bytes, wanted: object) -> None:
    (value,) = fed(text)
    assert value == wanted
    assert type(value) is type(wanted)


@pytest.mark.parametrize("text", [
    b"}", b'{"a" 5}', b'{"a":}', b'{"a":1,}', b'{"a":1 "b"}', b'{"a":1]', b"[1,]", b"[1 2]",
    b"{1:2}", b"nul\n", b"@\n", b"0e\n", b'"\\u12"', b"01\n", b"-\n", b'"a\x01', b'"a\\\x01',
    b"\xff", b'"\xc3("', b'"\\q"', b'"\\ud83d"', b'"\\u12g4"', b'{"a": "\n', b"{'a': 1}",
])  # fmt: skip
def test_what_is_no_value_is_one_error_and_the_next_value_is_read(text: bytes) -> None:
    first, *rest = fed(text + b'\n{"next": 1}')
    assert isinstance(first, str)
    assert first.startswith("JSON parse error, ")
    assert rest[-1] == {"next": 1}


def test_nesting_has_a_limit() -> None:
    text = b"[" * NESTING_MAX + b"]" * NESTING_MAX
    assert not isinstance(fed(text)[0], str)
    out = fed(b"[" + text + b'\n{"a": 1}')
    assert out == ["JSON nesting depth limit exceeded", {"a": 1}]


@pytest.mark.parametrize("piece", [b"x" * (1 << 20), b'", "' + b"y" * (1 << 20)])
def test_an_endless_message_is_given_up_and_does_not_stay_in_memory(piece: bytes) -> None:
    stream = JsonStream()
    list(stream.feed(b'["'))
    out: list[object] = []
    for _ in range(70):
        out += stream.feed(piece)
        if out:
            break
    assert isinstance(out[0], QmpError)
    assert out[0].description == "JSON token size limit exceeded"
    assert list(stream.feed(b'\xff\n{"a": 1}'))[-1] == {"a": 1}


@pytest.mark.parametrize("filling", [b"x", b"\\n", b'", "', b"  "])
def test_a_long_message_in_small_pieces_takes_no_square_time(filling: bytes) -> None:
    stream = JsonStream()
    text = b'{"a": ["' + filling * (1 << 18) + b'"]}'
    began = time.process_time()
    out = [v for at in range(0, len(text), 4096) for v in stream.feed(text[at : at + 4096])]
    assert len(out) == 1
    assert isinstance(out[0], dict)
    assert time.process_time() - began < 10
