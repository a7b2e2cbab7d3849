"""Training examples: three lists of numbers of one length, as arrays and as tf.train.Example.

Protobuf's own library takes longer to write a list of numbers than the tokenizer takes to produce
it, so this module serializes whole blocks of examples at once. A block is an int32 array of shape
(examples, 3, tokens): ids, mask, labels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

from gptj_convert.formats.containers.protobuf import (
    BYTES,
    MAX_VARINT_BYTES,
    VARINT,
    encode_field,
    encode_varint,
    read_fields,
    read_varint,
)

#: The features of an example, each a list of max_sequence_length numbers.
INPUT_IDS = "input_ids"
INPUT_MASK = "input_mask"
"""On disk 1 on real tokens; the input function passes the inverse to the model."""
LABELS = "labels"
FEATURES = (INPUT_IDS, INPUT_MASK, LABELS)
TEXT = "text"
"""The only feature of GPT-J's original trainer: max_sequence_length + 1 ids, all of them text."""

#: Number of examples serialized in one pass.
_TOGETHER = 64
#: Numbers below this one are encoded by tables, in a third of the time.
_IN_TABLES = 2**16

# Field numbers of tf.train.Example and its parts.
_FEATURES = _MAP_ENTRY = _KEY = _VALUES = 1
_FEATURE = 2
_INT64_LIST = 3

_KEYS = tuple(encode_field(_KEY, name.encode()) for name in FEATURES)


def max_bytes(length: int) -> int:
    """Return an upper bound of the bytes of an example of `length` tokens."""
    return len(FEATURES) * (MAX_VARINT_BYTES * length + 64) + 1024


def serialize(block: np.ndarray) -> Iterator[bytes]:
    """Yield each example of a block as the bytes of protobuf's deterministic serialization.

    Args:
        block: examples, int32 of shape (examples, 3, tokens), without negative numbers.
    """
    for start in range(0, len(block), _TOGETHER):
        part = block[start : start + _TOGETHER]
        for row in zip(*_lists(part), strict=True):
            parts = [b""]
            for key, values in zip(_KEYS, row, strict=True):
                parts += (_entry_head(key, len(values)), values)
            parts[0] = _head(_FEATURES, sum(map(len, parts)))
            yield b"".join(parts)


@lru_cache(maxsize=2**14)
def _entry_head(key: bytes, size: int) -> bytes:
    """Return what precedes the varints of a feature, of `size` bytes in all."""
    heads: list[bytes] = []
    for number in (_VALUES, _INT64_LIST, _FEATURE):
        heads.insert(0, _head(number, size))
        size += len(heads[0])
    return b"".join((_head(_MAP_ENTRY, len(key) + size), key, *heads))


def _head(number: int, size: int) -> bytes:
    """Return the tag and the length of a field of `size` bytes."""
    return encode_varint(number << 3 | BYTES) + encode_varint(size)


def parse(data: bytes) -> dict[str, np.ndarray]:
    """Return the integer lists of an example by name, int64.

    Raises:
        ValueError: the bytes are not a tf.train.Example.
    """
    found: dict[str, np.ndarray] = {}
    for features in _parts(memoryview(data), _FEATURES):
        for entry in _parts(features, _MAP_ENTRY):
            key = b"".join(bytes(k) for k in list(_parts(entry, _KEY))[-1:])
            lists = [v for f in _parts(entry, _FEATURE) for v in _parts(f, _INT64_LIST)]
            values = [_numbers(p) for v in lists for p in _parts(v, _VALUES, packed=True)]
            found[key.decode("utf-8", "replace")] = (
                np.concatenate(values) if values else np.empty(0, np.int64)
            )
    return found


def parse_together(records: Sequence[bytes], names: Sequence[str]) -> dict[str, np.ndarray] | None:
    """Parse examples with lists of one length together, in a quarter of the time of `parse`.

    Args:
        records: serialized examples, at least one.
        names: features that each example has.

    Returns:
        Each feature, int32 of shape (records, tokens); None if an example is damaged or is one
        that only `parse` reads, such as one with lists of several lengths, with features of other
        types, or with numbers outside 0 to 2**28 - 1.
    """
    try:
        found = [_packed_lists(data) for data in records]
        columns = {name: [features[name.encode()] for features in found] for name in names}
    except (ValueError, KeyError):
        return None
    texts = _packed_texts(columns) if {INPUT_IDS, LABELS} <= columns.keys() else None
    if texts:
        columns |= {INPUT_IDS: texts}
        del columns[LABELS]
    parsed: dict[str, np.ndarray] = {}
    for name, column in columns.items():
        if (values := _small_numbers(column)) is None:
            return None
        parsed[name] = values
    if texts:
        text = parsed[INPUT_IDS]
        parsed |= {INPUT_IDS: text[:, :-1], LABELS: text[:, 1:]}
    return parsed


def _packed_texts(columns: Mapping[str, Sequence[bytes]]) -> list[bytes] | None:
    """Return the varints of ids and last label of each record, if its labels are its ids one token
    later, as in packed text; None if those of one are not."""
    texts: list[bytes] = []
    for ids, labels in zip(columns[INPUT_IDS], columns[LABELS], strict=True):
        first = next((n for n, byte in enumerate(ids, start=1) if byte < 0x80), 0)
        common = len(ids) - first
        if ids[first:] != labels[:common]:
            return None
        texts.append(ids + labels[common:])
    return texts


#: An entry up to the numbers of its list: key, value, feature, list, numbers; each with its size.
_ENTRY = re.compile(
    rb"\n(VARINT)\n([\x00-\x7f])([^\x12]*)\x12(VARINT)\x1a(VARINT)\n(VARINT)".replace(
        b"VARINT", rb"[\x80-\xff]*[\x00-\x7f]"
    ),
    re.DOTALL,
)


def _packed_lists(data: bytes) -> dict[bytes, bytes]:
    """Return the varints of each feature, where each has one packed list and nothing else.

    Raises:
        ValueError: the example has another form.
    """
    if data[:1] != b"\n":
        raise ValueError
    size, at = read_varint(memoryview(data), 1)
    if size != len(data) - at:
        raise ValueError
    found: dict[bytes, bytes] = {}
    while at < len(data):
        entry = _ENTRY.match(data, at)
        if not entry:
            raise ValueError
        count = _number(entry[6])
        at = entry.end() + count
        # Each size counts what follows it, up to the end of the numbers.
        sizes = [_number(entry[n]) + entry.end(n) for n in (1, 4, 5)]
        if sizes != [at] * 3 or entry[2] != bytes([len(entry[3])]) or at > len(data):
            raise ValueError
        found[entry[3]] = data[entry.end() : at]
    return found


def _number(varint: bytes) -> int:
    return sum((byte & 0x7F) << 7 * n for n, byte in enumerate(varint))


def _small_numbers(lists: Sequence[bytes]) -> np.ndarray | None:
    """Decode lists of varints of at most four bytes.

    Returns:
        The numbers, int32 of shape (lists, numbers of each); None if a varint is longer or cut, or
        if the lists differ in length.
    """
    # Each number is read as a word of four bytes, which end with its last one.
    raw = np.frombuffer(b"".join((bytes(4), *lists)), np.uint8)
    last = np.flatnonzero(raw < 0x80)
    sizes, last = last[4:] - last[3:-1], last[4:]
    ends = np.cumsum([4, *map(len, lists)])
    count, rest = divmod(len(last), len(lists))
    if rest or not count or not np.array_equal(last[count - 1 :: count], ends[1:] - 1):
        return None
    if len(last) == len(raw) - 4:
        return raw[4:].astype(np.int32).reshape(len(lists), count)
    if sizes.max() > 4:
        return None
    words = np.ndarray((len(raw) - 3,), "<u4", buffer=raw, strides=(1,)).take(last - 3)
    words >>= (32 - 8 * sizes).astype(np.uint32)
    values = words & 0x7F
    for n in range(1, int(sizes.max())):
        values |= words >> n & 0x7F << 7 * n
    return values.view(np.int32).reshape(len(lists), count)


def of_text(example: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return an example with the three features, also where it has `TEXT` in their place."""
    if TEXT not in example or INPUT_IDS in example:
        return example
    ids = example[TEXT]
    return {INPUT_IDS: ids[:-1], INPUT_MASK: np.ones_like(ids[1:]), LABELS: ids[1:]}


def parse_bytes(data: bytes) -> dict[str, bytes]:
    """Return the first byte string of each feature of an example by name.

    Raises:
        ValueError: the bytes are not a tf.train.Example.
    """
    found: dict[str, bytes] = {}
    for features in _parts(memoryview(data), _FEATURES):
        for entry in _parts(features, _MAP_ENTRY):
            key = b"".join(bytes(k) for k in list(_parts(entry, _KEY))[-1:])
            # A feature holds a list of byte strings in its field 1, and the list each of them.
            lists = [v for f in _parts(entry, _FEATURE) for v in _parts(f, 1)]
            values = [bytes(p) for v in lists for p in _parts(v, _VALUES)]
            if values:
                found[key.decode("utf-8", "replace")] = values[0]
    return found


def _lists(part: np.ndarray) -> list[list[bytes]]:
    """Return the varints of each feature as byte strings, one per example."""
    ids, mask, labels = part[:, 0], part[:, 1], part[:, 2]
    if not np.array_equal(ids[:, 1:], labels[:, :-1]):
        return [_varints(values)[0] for values in (ids, mask, labels)]
    # In packed text ids and labels are one sequence without its last or first token.
    rows, first, last = _varints(np.concatenate((ids[:, :1], labels), axis=1))
    both = list(zip(rows, first.tolist(), last.tolist(), strict=True))
    return [
        [row[: len(row) - end] for row, _, end in both],
        _varints(mask)[0],
        [row[begin:] for row, begin, _ in both],
    ]


def _varints(values: np.ndarray) -> tuple[list[bytes], np.ndarray, np.ndarray]:
    """Encode each row of a matrix as one byte string of varints.

    Returns:
        The strings, and the sizes in bytes of the first and of the last varint of each.
    """
    most = int(values.max(initial=0))
    if most < 0x80:
        data, sizes = values.astype(np.uint8), np.ones(values.shape, np.uint8)
    elif most < _IN_TABLES:
        words, marks, lengths = _tables()
        # numpy takes from a table in a quarter of the time if the indices have its own type.
        at = values.astype(np.intp)
        used = marks.take(at).view(bool)
        data, sizes = np.compress(used.ravel(), words.take(at).view(np.uint8)), lengths.take(at)
    else:
        digits, used = _digits(values.astype(np.uint32))
        data, sizes = digits[used], used.sum(axis=2)
    flat = data.tobytes()
    cuts = [0, *np.cumsum(sizes.sum(axis=1, dtype=np.int64)).tolist()]
    rows = [flat[start:end] for start, end in pairwise(cuts)]
    return rows, sizes[:, 0], sizes[:, -1]


def _digits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes of varints along a new axis, and which of them are used.

    Args:
        values: numbers, uint32.
    """
    count = max(1, -(-int(values.max(initial=0)).bit_length() // 7))
    out = np.empty((*values.shape, count), np.uint8)
    used = np.ones((*values.shape, count), bool)
    for n in range(count):
        np.bitwise_and(values, 0x7F, out=out[..., n], casting="unsafe")
        if n + 1 < count:
            values = values >> 7
            np.not_equal(values, 0, out=used[..., n + 1])
            out[..., n] |= used[..., n + 1].view(np.uint8) << 7
    return out, used


@lru_cache(maxsize=1)
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return of each number below `_IN_TABLES` its varint, which bytes it uses, and how many.

    The first two are uint32, four bytes that begin with the lowest; the last is uint8.
    """
    digits, used = _digits(np.arange(_IN_TABLES, dtype=np.uint32))
    words, marks = np.zeros((2, _IN_TABLES, 4), np.uint8)
    words[:, :3], marks[:, :3] = digits, used
    return (
        words.view(np.uint32).ravel(),
        marks.view(np.uint32).ravel(),
        used.sum(axis=1, dtype=np.uint8),
    )


def _numbers(data: memoryview) -> np.ndarray:
    """Decode a byte string of varints, int64.

    Raises:
        ValueError: the string ends inside a varint, or a varint is too long.
    """
    raw = np.frombuffer(data, np.uint8)
    last = np.flatnonzero(raw < 0x80)
    if len(last) == len(raw):
        return raw.astype(np.int64)
    if not len(last) or last[-1] != len(raw) - 1:
        raise ValueError("a list of numbers ends inside one")
    first = np.concatenate(([0], last[:-1] + 1))
    lengths = last - first + 1
    if lengths.max() > MAX_VARINT_BYTES:
        raise ValueError("a number is longer than 64 bits")
    values = np.zeros(len(last), np.uint64)
    for n in range(int(lengths.max())):
        has = lengths > n
        digit = (raw[first[has] + n] & 0x7F).astype(np.uint64)
        values[has] |= digit << np.uint64(7 * n)
    return values.view(np.int64)


def _parts(data: memoryview, wanted: int, *, packed: bool = False) -> Iterator[memoryview]:
    """Yield the contents of the fields `wanted`; with `packed`, also of single varints."""
    for number, kind, content in read_fields(data):
        if number == wanted:
            if kind == BYTES or (packed and kind == VARINT):
                yield content
            else:
                raise ValueError(f"field {number} has the wire type {kind}")
