"""A list of JSON, split into its elements without being parsed."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.data.making.documents.json_lists import Elements, begins_list
from runner.data.making.long_line import Damaged

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def _blocks(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


@given(st.lists(VALUES), st.integers(1, 40), st.sampled_from([None, 2]), st.booleans())
def test_elements_are_those_of_json(values: list, size: int, indent: int | None, ascii: bool):
    data = json.dumps(values, indent=indent, ensure_ascii=ascii).encode()
    data = b"\n\n " + data + b" \n"
    assert begins_list(data)
    found = list(Elements(_blocks(data, size), 10**6))
    assert [json.loads(element or b"") for _, element in found] == values
    lines = data.split(b"\n")
    for line, element in found:
        assert element
        assert element.split(b"\n")[0] in lines[line - 1]


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(
    ("data", "line", "words"),
    [
        (b'[{"a": 1},\n{"a": 2}\n', 3, "the list has no end"),
        (b'[1,\n"no end', 2, "the list has no end"),
        (b"[1]\n\n2", 3, "something follows the list"),
    ],
)
def test_damage(data: bytes, line: int, words: str, size: int):
    with pytest.raises(Damaged, match=words) as caught:
        list(Elements(_blocks(data, size), 100))
    assert caught.value.line + 1 == line


def test_elements_beyond_the_limit():
    data = json.dumps([1, list(range(100)), 2, "x" * 50, 3]).encode()
    found = list(Elements(_blocks(data, 10), 60))
    assert [element for _, element in found] == [b"1", None, b"2", b'"' + b"x" * 50 + b'"', b"3"]
    with pytest.raises(Damaged, match="a string of more than 60 bytes"):
        list(Elements(_blocks(json.dumps(["x" * 500]).encode(), 10), 60))
    assert list(Elements(iter([b"[ ]"]), 10)) == []
    assert [e for _, e in Elements(iter([b"[1, ]"]), 10)] == [b"1", b""]
