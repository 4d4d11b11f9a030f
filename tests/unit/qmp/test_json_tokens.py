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
from stillframe.qmp.json_tokens import JsonStream

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
    b'{"execute": "stop"', b'{"execute": "st', b'{"execute": "st\\', b"[[[[", b"12", b"tr", b"'",
    b'{"a": "\\u00', b"-", b"1.5e", b"",
])  # fmt: skip
@pytest.mark.parametrize("between", [b"\xff", b"\xff\n"])
def test_the_byte_ff_ends_whatever_was_half_said(half: bytes, between: bytes) -> None:
    out = fed(half + between + b'{"execute": "cont"}\n')
    assert out[-1] == {"execute": "cont"}
    assert {"execute": "stop"} not in out
    assert isinstance(out[-2], str)


@pytest.mark.parametrize(("text", "wanted"), [
    (b"5 ", 5), (b"-0 ", 0), (b"0.5 ", 0.5), (b"1e3 ", 1000.0), (b"true ", True),
    (b"null ", None), (b"'it\\'s'", "it's"), (b'"\\ud83d\\ude00"', "\U0001f600"), (b"{}", {}),
    (b'"\\u0000\\/\\b\\f\\n\\r\\t\\""', '\0/\b\f\n\r\t"'), (b"[]", []), (b"[[], {}]", [[], {}]),
    (b"18446744073709551615 ", 2**64 - 1), (b"-9223372036854775808 ", -(2**63)),
    (b"18446744073709551616 ", 2.0**64), (b"-9223372036854775809 ", -(2.0**63)),
    (b"1" * 400 + b" ", float("inf")), (b'"\xf4\x8f\xbf\xbd"', "\U0010fffd"),
])  # fmt: skip
def test_values(text: bytes, wanted: object) -> None:
    (value,) = fed(text)
    assert value == wanted
    assert type(value) is type(wanted)


# As a real QEMU 7.2 answers; tests/integration/test_qmp_board_like_qemu.py asks one.
@pytest.mark.parametrize(("text", "description"), [
    (b"}", "JSON parse error, expecting value"),
    (b'{"a" 5}', "JSON parse error, missing : in object pair"),
    (b'{"a":}', "JSON parse error, expecting value"),
    (b'{"a":1,}', "JSON parse error, expecting value"),
    (b'{"a":1 "b"}', "JSON parse error, expected separator in dict"),
    (b'{"a":1]', "JSON parse error, expected separator in dict"),
    (b"[1,]", "JSON parse error, expecting value"),
    (b"[1 2]", "JSON parse error, expected separator in list"),
    (b"{1:2}", "JSON parse error, key is not a string in object"),
    (b'{"a":1,"a":2}', "JSON parse error, duplicate key"),
    (b"nul\n", "JSON parse error, invalid keyword 'nul'"),
    (b"@\n", "JSON parse error, stray '@'"),
    (b"0e1\n", "JSON parse error, invalid keyword 'e'"),
    (b'"\\u12"', "JSON parse error, \\u12\" is not a valid Unicode character"),
    (b"01\n", "JSON parse error, stray '01'"),
    (b"-\n", "JSON parse error, stray '-\n'"),
    (b'"a\x01\n', "JSON parse error, stray '\"a\x01'"),
    (b'"a\\\x01\n', "JSON parse error, stray '\"a\\\x01'"),
    (b"\xff", "JSON parse error, stray '�'"),
    (b'"\xc3("', "JSON parse error, invalid UTF-8 sequence in string"),
    (b'"\\q"', "JSON parse error, invalid escape sequence in string"),
    (b'"\\ud83d"', "JSON parse error, \\ud83d is not a valid Unicode character"),
    (b'"\\ud83d\\u0041"', "JSON parse error, \\ud83d is not a valid Unicode character"),
    (b'"\\u12g4"', "JSON parse error, \\u12g4 is not a valid Unicode character"),
    (b'"\\uffff"', "JSON parse error, \\uffff is not a valid Unicode character"),
])  # fmt: skip
def test_what_is_no_value(text: bytes, description: str) -> None:
    assert description in fed(text)


def test_nesting_has_a_limit_and_below_it_none_of_pythons() -> None:
    assert fed(b"[" * 1025) == ["JSON nesting depth limit exceeded"]
    (value,) = fed(b"[" * 1024 + b"]" * 1024)
    depth = 0
    while isinstance(value, list):
        depth, value = depth + 1, value[0] if value else None
    assert depth == 1024


def test_tokens_are_limited_in_number() -> None:
    out = fed(b"[" + b"1," * (1 << 20) + b"1")
    assert out == ["JSON token count limit exceeded"]


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


@pytest.mark.parametrize("word", [b"1", b"a"])
def test_an_endless_word_is_given_up_early(word: bytes) -> None:
    assert fed(*[word * 1000] * 5) == ["JSON token size limit exceeded"]


def test_a_long_string_in_small_pieces_takes_no_square_time() -> None:
    stream = JsonStream()
    text = b'{"a": "' + b"x" * (8 << 20) + b'"}'
    began = time.monotonic()
    out = [v for at in range(0, len(text), 4096) for v in stream.feed(text[at : at + 4096])]
    assert len(out) == 1
    assert time.monotonic() - began < 3
