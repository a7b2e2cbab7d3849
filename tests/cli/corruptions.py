"""The corruption matrix: what is done to a converted checkpoint, and what verify must say.

Every case is done to a copy of the small model converted to TensorFlow, in `folder`. Beside it
lies `other`, the same model with other weights, converted too. docs/verification.md lists them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import ml_dtypes
import numpy as np

from gptj_convert.formats.containers.tensor_bundle import BundleSource
from gptj_model.config import GPTJConfig
from gptj_model.dtypes import FLOATS
from gptj_model.op import Op
from gptj_model.tensors import Tensor, table
from tests.cli.rewriting import rewrite_bundle
from tests.small_model import SMALL

CONFIG = GPTJConfig.preset("tiny", **SMALL)
PREFIX = "tf_model.ckpt"
INDEX = f"{PREFIX}.index"
DATA = f"{PREFIX}.data-00000-of-00001"

Tensors = dict[str, np.ndarray]
TENSORS = {t.hf: t for t in table(CONFIG)}


@dataclass(frozen=True)
class Corruption:
    """One case."""

    what: str
    """Cases of one kind are one line of the documentation."""
    of: str
    """Variant of that kind."""
    level: str
    """Level of the verification that finds it."""
    named: str
    """HF name of the tensor, or the file, that is named first."""
    diagnosis: str | None
    damage: Callable[[Path], None]

    def __str__(self) -> str:
        return f"{self.what}: {self.of}"


def _rewritten(change: Callable[[Tensors], None]) -> Callable[[Path], None]:
    return lambda folder: rewrite_bundle(folder, change)


def _each(hf: str, rule: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Rewrite one tensor from its values, in TensorFlow's layout."""
    tf = TENSORS[hf].tf
    return _rewritten(lambda t: t.update({tf: rule(t[tf])}))


def _exchanged(pairs: list[tuple[str, str]]) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        for a, b in ((TENSORS[x].tf, TENSORS[y].tf) for x, y in pairs):
            tensors[a], tensors[b] = tensors[b], tensors[a]

    return _rewritten(change)


def _h(block: int, rest: str) -> str:
    return f"transformer.h.{block}.{rest}"


def _block(i: int) -> list[Tensor]:
    return [t for t in TENSORS.values() if t.block == i]


def _by_rows(rule: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """A rule for rows in HF's layout, applied to a TensorFlow kernel, (in, out)."""
    return lambda values: np.ascontiguousarray(rule(values.T).T)


def _in_heads(rule: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """A rule for (heads, features of one, …) of a kernel's rows in HF's layout."""

    def of_rows(values: np.ndarray) -> np.ndarray:
        heads = values.reshape(CONFIG.n_head, CONFIG.head_dim, -1).copy()
        return rule(heads).reshape(values.shape)

    return _by_rows(of_rows)


def _rolled_head(heads: np.ndarray) -> np.ndarray:
    heads[2] = np.roll(heads[2], 1, axis=0)
    return heads


def _split_rotary(heads: np.ndarray) -> np.ndarray:
    n = CONFIG.rotary_dim
    order = [*range(0, n, 2), *range(1, n, 2), *range(n, CONFIG.head_dim)]
    return heads[:, order]


def _unit_in_the_last_place(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    at = np.unravel_index(np.flatnonzero(bits & 1)[-1], bits.shape)
    bits[at] += 1
    return values


def _in_bytes(name: str, change: Callable[[bytearray], None]) -> Callable[[Path], None]:
    """A file is changed in place: its checksums are what they were."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        change(content)
        (folder / name).write_bytes(content)

    return damage


def _flip(at: int, bit: int = 0) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        content[at] ^= 1 << bit

    return change


def _flipped_in(tensor: Tensor, bit: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        source = BundleSource(folder / PREFIX)
        entry = source.entries[tensor.tf]
        source.close()
        value = entry.offset + tensor.size // 2 * 4
        _in_bytes(DATA, _flip(value + bit // 8, bit % 8))(folder)

    return damage


def _flip_after(name: str, text: str) -> Callable[[Path], None]:
    """The last bit of the byte after a text."""

    def change(content: bytearray) -> None:
        content[content.index(text.encode()) + len(text)] ^= 1

    return _in_bytes(name, change)


def _other_digit_after(name: str, text: str) -> Callable[[Path], None]:
    def change(content: bytearray) -> None:
        at = content.index(text.encode()) + len(text)
        content[at] = ord("2" if content[at] == ord("1") else "1")

    return _in_bytes(name, change)


def _configured(**fields: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        values = json.loads(path.read_text()) | fields
        path.write_text(json.dumps(values, indent=2) + "\n")

    return damage


def _cut_vocabulary(rows: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in ("transformer.wte.weight", "lm_head.bias"):
            tensors[TENSORS[name].tf] = tensors[TENSORS[name].tf][:rows]
        kernel = TENSORS["lm_head.weight"].tf
        tensors[kernel] = tensors[kernel][:, :rows]

    return change


def _both(*damages: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


def _flip_words(bit: int) -> str:
    part = "mantissa" if bit < 23 else "exponent" if bit < 31 else "sign"
    text = f"one bit of one value is flipped: bit {bit}, of the {part}"
    if bit == 0:
        text += "; that is one unit in the last place"
    return f"{text}; changed after it was written, by the bundle's index"


_MATRICES = [t for t in TENSORS.values() if t.tf_op is Op.TRANSPOSE]
_OF_A_BLOCK = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj")
_CHANGED = "it was changed after it was written"
_ANOTHER = "no tensor is the source's: these are the weights of another model or revision"
_WTE = "transformer.wte.weight"
_Q = _h(1, "attn.q_proj.weight")
_OUT = _h(1, "attn.out_proj.weight")
_SIZE = 4 * sum(t.size for t in TENSORS.values()) + 8  # global_step is an int64

CASES: list[Corruption] = [
    *(
        Corruption(
            "a matrix is not transposed", t.hf, "weights", t.hf, "the transposition was skipped",
            _each(t.hf, lambda v: v.T.reshape(v.shape)),
        )
        for t in _MATRICES
    ),
    *(
        Corruption(
            "two projections of a block are exchanged", f"{a} and {b}", "weights", a,
            f"{a} and {b} are exchanged", _exchanged([(a, b)]),
        )
        for i in range(CONFIG.n_layer)
        for x, y in ((0, 1), (0, 2), (1, 3))
        for a, b in [[_h(i, f"{_OF_A_BLOCK[n]}.weight") for n in (x, y)]]
    ),
    *(
        Corruption(
            "two blocks are exchanged", f"{i} and {j}", "weights", _h(i, "ln_1.weight"),
            f"blocks {i} and {j} are exchanged",
            _exchanged([(a.hf, b.hf) for a, b in zip(_block(i), _block(j), strict=True)]),
        )
        for i, j in combinations(range(CONFIG.n_layer), 2)
    ),
    Corruption(
        "a block is written twice", "1 as 2, too", "weights", _h(2, "ln_1.weight"),
        "block 2 is block 1 of the source",
        _rewritten(
            lambda t: t.update(
                {b.tf: t[a.tf] for a, b in zip(_block(1), _block(2), strict=True)}
            )
        ),
    ),
    *(
        Corruption(
            "biases of two blocks are exchanged", f"{a} and {b}", "weights", a,
            f"{a} and {b} are exchanged", _exchanged([(a, b)]),
        )
        for which in ("fc_in", "fc_out")
        for a, b in [[_h(i, f"mlp.{which}.bias") for i in (0, 2)]]
    ),
    *(
        Corruption(
            "gain and bias of a norm are exchanged", norm, "weights", f"{norm}.weight",
            f"{norm}.weight and {norm}.bias are exchanged",
            _exchanged([(f"{norm}.weight", f"{norm}.bias")]),
        )
        for norm in (*(_h(i, "ln_1") for i in range(CONFIG.n_layer)), "transformer.ln_f")
    ),
    *(
        Corruption(
            "one value is one unit in the last place off", hf, "weights", hf,
            "one value differs; that is one unit in the last place",
            _each(hf, _unit_in_the_last_place),
        )
        for hf in (_WTE, _Q, _h(2, "mlp.fc_out.weight"), "transformer.ln_f.bias", "lm_head.bias")
    ),
    *(
        Corruption(
            "one bit of a tensor's data is flipped", t.hf, "weights", t.hf,
            _flip_words(7 * n % 32), _flipped_in(t, 7 * n % 32),
        )
        for n, t in enumerate(TENSORS.values())
    ),
    Corruption(
        "rows are exchanged", f"3 and 100 of {_WTE}", "weights", _WTE,
        "rows 3 and 100 are exchanged",
        _each(_WTE, lambda v: v[[*range(3), 100, *range(4, 100), 3, *range(101, len(v))]]),
    ),
    *(
        Corruption(
            "rows are permuted", hf, "weights", hf,
            f"rows are permuted: {rows // 2 * 2} of {rows} are elsewhere",
            _each(hf, _by_rows(lambda v: v[::-1])),
        )
        for hf in (_h(0, "mlp.fc_in.weight"), "lm_head.weight")
        for rows in [TENSORS[hf].shape[0]]
    ),
    *(
        Corruption(
            "rows of the embedding are shifted", f"by {n}", "weights", _WTE,
            f"rows are shifted by {n}", _each(_WTE, lambda v, n=n: np.roll(v, n, axis=0)),
        )
        for n in (1, -1, 3)
    ),
    *(
        Corruption(
            "one head's features are rotated", hf, "weights", hf,
            f"{axis} of head 2 are rotated by 1", _each(hf, rule),
        )
        for hf, axis, rule in (
            (_Q, "rows", _in_heads(_rolled_head)),
            (_h(0, "attn.v_proj.weight"), "rows", _in_heads(_rolled_head)),
            (_OUT, "columns", lambda v: _in_heads(_rolled_head)(v.T).T),
        )
    ),
    Corruption(
        "heads are exchanged", _Q, "weights", _Q, "heads 1 and 3 are exchanged",
        _each(_Q, _in_heads(lambda heads: heads[[0, 3, 2, 1]])),
    ),
    Corruption(
        "rotary features are in the order of split halves", _Q, "weights", _Q,
        "rows of every head are permuted, in each alike: between the orders of interleaved and "
        "of split rotary features",
        _each(_Q, _in_heads(_split_rotary)),
    ),
    *(
        Corruption(
            "a tensor is zeroed", hf, "weights", hf, "all values are zero",
            _each(hf, np.zeros_like),
        )
        for hf in ("lm_head.bias", _Q)
    ),
    Corruption(
        "part of a tensor is zeroed", _WTE, "weights", _WTE, "every value that differs is zero",
        _each(_WTE, lambda v: np.concatenate([v[:100], 0 * v[100:]])),
    ),
    Corruption(
        "some rows are replaced", _WTE, "weights", _WTE, "only 2 rows from 7 to 9 differ",
        _each(_WTE, lambda v: v + np.isin(np.arange(len(v)), (7, 9))[:, None].astype(v.dtype)),
    ),
    *(
        Corruption(
            "a tensor is rounded on the way", f"{hf}, to {dtype}", "weights", hf,
            f"the source, rounded to {dtype} on the way",
            _each(hf, lambda v, to=FLOATS[dtype]: v.astype(to).astype(v.dtype)),
        )
        for hf in (_WTE, _Q, "transformer.ln_f.weight")
        for dtype in ("bfloat16", "float16")
    ),
    Corruption(
        "every tensor is rounded on the way", "to bfloat16", "weights", _WTE,
        "the source, rounded to bfloat16 on the way",
        _rewritten(
            lambda t: t.update(
                {n: v.astype(ml_dtypes.bfloat16).astype(v.dtype) for n, v in t.items() if v.shape}
            )
        ),
    ),
    Corruption(
        "a tensor is cut to bfloat16, not rounded", _Q, "weights", _Q,
        "the source, cut to bfloat16 instead of rounded",
        _each(_Q, lambda v: (v.view(np.uint32) & 0xFFFF0000).view(np.float32)),
    ),
    *(
        Corruption(
            "a tensor is scaled", f"{hf}, by {factor}", "weights", hf,
            f"every value is {factor} times the source's",
            _each(hf, lambda v, f=factor: v * np.float32(f)),
        )
        for hf, factor in ((_Q, 0.288675), (_OUT, -1), ("lm_head.bias", 2))
    ),
    *(
        Corruption(
            "a tensor is left out", hf, "structure", hf, "1 of 35 tensors were left out",
            _rewritten(lambda t, name=TENSORS[hf].tf: t.pop(name)),
        )
        for hf in ("lm_head.bias", _h(1, "ln_1.bias"), _WTE)
    ),
    Corruption(
        "the vocabulary is cut", "in the tensors", "structure", _WTE,
        "the vocabulary was cut: rows from 200 up are missing", _rewritten(_cut_vocabulary(200)),
    ),
    Corruption(
        "the vocabulary is cut", "in the tensors and config.json", "structure", "config.json",
        "the vocabulary was cut: rows from 200 up are missing",
        _both(_rewritten(_cut_vocabulary(200)), _configured(vocab_size=200)),
    ),
    *(
        Corruption(
            "config.json changes the model", f"{field} is {value}", "structure", "config.json",
            diagnosis, _configured(**{field: value}),
        )
        for field, value, diagnosis in (
            ("rotary_dim", 4, _CHANGED),
            ("layer_norm_epsilon", 1e-6, _CHANGED),
            ("n_head", 6, _CHANGED),
            ("n_positions", 1024, _CHANGED),
            ("tie_word_embeddings", True, "it ends at byte 485, of 486 that were written"),
        )
    ),
    Corruption(
        "the index is cut by a byte", INDEX, "structure", INDEX,
        "it ends at byte 1763, of 1764 that were written", _in_bytes(INDEX, lambda c: c.pop()),
    ),
    *(
        Corruption(
            "a bit of the index is flipped", f"at byte {at}", "structure", INDEX, _CHANGED,
            _in_bytes(INDEX, _flip(at)),
        )
        for at in (0, 5, 300, 1000, 1700, 1763)
    ),
    Corruption(
        "the data file is cut by a byte", DATA, "structure", DATA,
        f"it ends at byte {_SIZE - 1}, of {_SIZE} that were written",
        _in_bytes(DATA, lambda c: c.pop()),
    ),
    Corruption(
        "the data file has an extra byte", DATA, "structure", DATA,
        f"it continues beyond byte {_SIZE}, where it ended when it was written",
        _in_bytes(DATA, lambda c: c.append(0)),
    ),
    *(
        Corruption(
            "a file is missing", name, "structure", name, "it is missing",
            lambda folder, name=name: (folder / name).unlink(),
        )
        for name in (DATA, INDEX, "config.json", "tokenizer.json")
    ),
    Corruption(
        "the data file is another checkpoint's", DATA, "weights", _WTE,
        f"{_ANOTHER}; changed after it was written, by the bundle's index",
        lambda folder: shutil.copyfile(folder.parent / "other" / DATA, folder / DATA),
    ),
    Corruption(
        "data and index are another checkpoint's", "both", "weights", _WTE,
        f"{_ANOTHER}; changed after it was written, by manifest.json",
        lambda folder: [
            shutil.copyfile(folder.parent / "other" / n, folder / n) for n in (DATA, INDEX)
        ],
    ),
    *(
        Corruption(
            "a bit of a small file is flipped", name, "structure", name, _CHANGED,
            _flip_after(name, after),
        )
        for name, after in (
            ("config.json", '"initializer_range": 0.0'),
            ("generation_config.json", '"eos_token_id": '),
            ("tokenizer.json", "{"),
        )
    ),
    Corruption(
        "a bit of the manifest is flipped", "its first bracket", "structure", "manifest.json",
        None, _in_bytes("manifest.json", _flip(0)),
    ),
    *(
        Corruption(
            "a digit of the manifest is changed", f"of {what}", level, named, diagnosis,
            _other_digit_after("manifest.json", after),
        )
        for what, after, level, named, diagnosis in (
            ("a file's size", f'"{INDEX}": {{\n   "bytes": ', "structure", INDEX,
             "it ends at byte 1764, of 2764 that were written"),
            ("a file's SHA-256", '"sha256": "', "structure", "checkpoint", _CHANGED),
            ("a tensor's crc32c", '"crc32c": "', "weights", "lm_head.bias",
             "the values are the source's; their checksum in this file is not theirs"),
            ("a crc32c of the source", '"source_crc32c": "', "weights", "manifest.json",
             "the values are the source's; its checksum in this file is not"),
        )
    ),
]  # fmt: skip
