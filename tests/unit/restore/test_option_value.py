"""Option values: what is not changed comes out as it went in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillframe.errors import DataError
from stillframe.restore.option_value import OptionValue, escape_commas, split_commas


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("a", ["a"]),
        ("a,b=c", ["a", "b=c"]),
        ("a=x,,y,b=1", ["a=x,,y", "b=1"]),
        ("a=x,,,b=1", ["a=x,,", "b=1"]),
        ("a=1,", ["a=1", ""]),
    ],
)
def test_split(text: str, parts: list[str]) -> None:
    assert split_commas(text) == parts


def test_values() -> None:
    value = OptionValue("socket,id=c0,path=/a,,b,server,wait=off", "backend")
    assert list(value.items()) == [
        ("backend", "socket"),
        ("id", "c0"),
        ("path", "/a,b"),
        ("server", "on"),
        ("wait", "off"),
    ]
    assert value.get("missing", "x") == "x"
    assert value.is_on("server")
    assert not value.is_on("wait")


def test_the_last_of_equal_keys_wins() -> None:
    value = OptionValue("user,id=a,hostfwd=1,hostfwd=2", "type")
    assert value.get("hostfwd") == "2"
    assert value.all("hostfwd") == ["1", "2"]


def test_changes() -> None:
    value = OptionValue("q35,a=1,b=2,a=3", "type")
    value.set("a", "x,y")
    value.set("type", "pc-q35-7.2")
    value.set("new", True)
    assert value.text == "pc-q35-7.2,a=x,,y,b=2,new=on"
    assert value.drop("b", "none") == {"b"}
    assert value.text == "pc-q35-7.2,a=x,,y,new=on"


def test_a_key_is_dropped_with_what_is_below_it() -> None:
    value = OptionValue("driver=qcow2,file.driver=file,file.filename=x,files=y", "driver")
    assert value.drop("file") == {"file"}
    assert value.text == "driver=qcow2,files=y"


def test_json() -> None:
    text = '{"driver":"qcow2","file":{"driver":"file","filename":"/a,b"},"read-only":false}'
    value = OptionValue(text, "driver")
    assert value.text == text
    assert value.get("file.filename") == "/a,b"
    assert value.get("read-only") == "off"
    value.set("read-only", True)
    value.set("file.filename", "/c")
    value.drop("file.driver")
    assert value.text == '{"driver":"qcow2","file":{"filename":"/c"},"read-only":true}'


@pytest.mark.parametrize("text", ["{", "{]", '{"a":' + "[" * 100_000, "{" + '"a":{' * 50])
def test_bad_json(text: str) -> None:
    with pytest.raises(DataError, match="malformed"):
        OptionValue(text, "driver")


def test_deep_json() -> None:
    value = OptionValue('{"a":' * 50 + "1" + "}" * 50, "driver")
    with pytest.raises(DataError, match="nested too deeply"):
        list(value.items())


@given(st.text(st.characters(exclude_characters="\0"), max_size=40))
def test_unchanged_text_is_kept(text: str) -> None:
    if not text.startswith("{"):
        assert OptionValue(text, "driver").text == text


@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5))
def test_any_value_survives(values: list[str]) -> None:
    text = ",".join(f"k{n}={escape_commas(value)}" for n, value in enumerate(values))
    parsed = OptionValue(text, "driver")
    assert [parsed.get(f"k{n}") for n in range(len(values))] == values
