"""The `data.pkl` of a torch.save archive: a program for a stack machine, pickle protocol 2.

Python's own unpickler would import and call whatever the program names. The machine here knows only
the operations that torch.save writes for a dict of tensors, and turns them into plain descriptions.
It cannot import or call anything. Every other operation is refused, with its name and position.
"""

from __future__ import annotations

import pickletools
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptj_convert.formats.containers.torch_zip import RESAVE_HINT
from gptj_model.errors import FileFault

#: Limits on the program, which for a GPT-J of 28 blocks has 60 kB and 12,000 operations.
MAX_PICKLE_BYTES = 16 * 2**20
MAX_OPERATIONS = 2**20
MAX_MARKS = 64
MAX_STRING_BYTES = 1024
#: Types of dict keys: names, and numbers of an optimizer's parameters.
_KEYS = (str, int)

STATE_DICT_HINT = "save only the model's state dict: torch.save(model.state_dict(), FILE)"


def read_pickle(data: bytes, path: Path) -> dict[Any, Any]:
    """Return the dict that a data.pkl describes.

    Its tensors are of type `PickledTensor`, whose claims are not yet checked.

    Args:
        data: content of the data.pkl.
        path: path of the archive, for errors.

    Raises:
        FileFault: the program describes something else, or uses an operation that is not allowed.
    """
    return _Machine(data, path).run()


def type_name(value: Any) -> str:
    """Return the name of a value's type, for errors: the value itself may be too deep to show."""
    return type(value).__name__


@dataclass(frozen=True, slots=True)
class Global:
    """Name of a function or class, with nothing behind it to call."""

    name: str


@dataclass(frozen=True, slots=True)
class StorageType:
    """Storage type such as `torch.FloatStorage`, by its canonical dtype."""

    dtype: str


@dataclass(frozen=True, slots=True)
class Storage:
    """Storage as the pickle describes it; nothing is checked."""

    dtype: str
    key: str
    """Key of its data, which is the member `data/KEY`."""
    numel: int


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """View of a storage, in elements, as the pickle describes it; nothing is checked."""

    storage: Storage
    offset: int
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]


_GLOBALS: dict[str, Global | StorageType] = {
    name: Global(name)
    for name in (
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
    )
} | {
    f"torch.{kind}Storage": StorageType(dtype)
    for kind, dtype in {
        "Double": "float64",
        "Float": "float32",
        "Half": "float16",
        "BFloat16": "bfloat16",
        "Long": "int64",
        "Int": "int32",
        "Short": "int16",
        "Char": "int8",
        "Byte": "uint8",
        "Bool": "bool",
    }.items()
}


class _Machine:
    """Stack machine that runs one data.pkl.

    Values are only built, never compared, hashed or shown: a few bytes can describe a tuple that
    takes practically forever to walk through.
    """

    def __init__(self, data: bytes, path: Path) -> None:
        self._data = data
        self._path = path
        self._next = 0
        self._op_at = 0
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        """Stacks below each mark."""
        self._memo: dict[int, Any] = {}

    def run(self) -> dict[Any, Any]:
        if self._take(2) != b"\x80\x02":
            raise self._fault(f"begins with {self._data[:2]!r}, expected pickle protocol 2")
        for _ in range(MAX_OPERATIONS):
            self._op_at = self._next
            code = self._take(1)
            if code == b".":
                return self._result()
            operation = _OPERATIONS.get(code)
            if operation is None:
                name = _OPCODE_NAMES.get(code, repr(code))
                raise self._fault(f"opcode {name} is not allowed in a checkpoint")
            operation(self)
        raise self._fault(f"has more than {MAX_OPERATIONS} operations")

    def _result(self) -> dict[Any, Any]:
        if self._next != len(self._data):
            raise self._fault(f"STOP with {len(self._data) - self._next} bytes left over")
        value = self.pop()
        if self._stack or self._below:
            raise self._fault("STOP with more than one value on the stack")
        if not isinstance(value, dict):
            raise self._fault(
                f"holds one value of type {type_name(value)}, expected a dict of tensors",
                hint=STATE_DICT_HINT,
            )
        return value

    def _fault(self, what: str, hint: str = RESAVE_HINT) -> FileFault:
        return FileFault(f"{self._path}: data.pkl, byte {self._op_at}: {what}", hint=hint)

    def _take(self, count: int) -> bytes:
        taken = self._data[self._next : self._next + count]
        if len(taken) < count:
            raise self._fault(f"ends at byte {len(self._data)}, inside an operation")
        self._next += count
        return taken

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def pop(self) -> Any:
        if not self._stack:
            raise self._fault("takes a value from an empty stack")
        return self._stack.pop()

    def _top(self) -> Any:
        if not self._stack:
            raise self._fault("needs a value on the stack, which is empty")
        return self._stack[-1]

    def pop_mark(self) -> list[Any]:
        if not self._below:
            raise self._fault("needs a mark on the stack, which has none")
        items, self._stack = self._stack, self._below.pop()
        return items

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def mark(self) -> None:
        if len(self._below) == MAX_MARKS:
            raise self._fault(f"has more than {MAX_MARKS} nested marks")
        self._below.append(self._stack)
        self._stack = []

    def push_tuple(self, count: int) -> None:
        self.push(tuple([self.pop() for _ in range(count)][::-1]))

    def push_long(self) -> None:
        size = self.number("<B")
        if size > 8:
            raise self._fault(f"a number of {size} bytes, expected at most 8")
        self.push(int.from_bytes(self._take(size), "little", signed=True))

    def push_string(self) -> None:
        size = self.number("<I")
        if size > MAX_STRING_BYTES:
            raise self._fault(f"a string of {size} bytes, expected at most {MAX_STRING_BYTES}")
        try:
            self.push(self._take(size).decode("utf-8"))
        except UnicodeDecodeError:
            raise self._fault("a string that is not UTF-8") from None

    def push_global(self) -> None:
        module, name = self._line(), self._line()
        # With a dot in the name, a different pair would give the same text.
        known = _GLOBALS.get(f"{module}.{name}") if "." not in name else None
        if known is None:
            raise self._fault(f"global {f'{module}.{name}'!r} is not allowed in a checkpoint")
        self.push(known)

    def _line(self) -> str:
        end = self._data.find(b"\n", self._next, self._next + MAX_STRING_BYTES)
        if end < 0:
            raise self._fault(f"a name with no end within {MAX_STRING_BYTES} bytes")
        text = self._take(end - self._next).decode("utf-8", "backslashreplace")
        self._next += 1
        return text

    def put(self, layout: str) -> None:
        self._memo[self.number(layout)] = self._top()

    def get(self, layout: str) -> None:
        index = self.number(layout)
        if index not in self._memo:
            raise self._fault(f"fetches memo {index}, which was never stored")
        self.push(self._memo[index])

    def set_items(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(items) % 2:
            raise self._fault(f"sets {len(items)} keys and values in a {type_name(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in _KEYS:
                raise self._fault(
                    f"a dict's key is of type {type_name(key)}, expected a tensor's name",
                    hint=STATE_DICT_HINT,
                )
            if key in target:
                raise self._fault(f"a dict has the key {key!r} twice")
            target[key] = value

    def append(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise self._fault(f"appends to a {type_name(target)}, expected a list")
        target.extend(items)

    def persistent(self) -> None:
        match self.pop():
            case ("storage", StorageType() as kind, str() as key, str(), int() as numel):
                self.push(Storage(kind.dtype, key, numel))
            case _:
                raise self._fault("a persistent id that is not that of a storage")

    def reduce(self) -> None:
        arguments, target = self.pop(), self.pop()
        if not isinstance(target, Global):
            raise self._fault(f"REDUCE calls a {type_name(target)}, expected a known global")
        if not isinstance(arguments, tuple):
            raise self._fault(
                f"REDUCE with a {type_name(arguments)}, expected a tuple of arguments"
            )
        match target.name, arguments:
            case "collections.OrderedDict", ():
                self.push(OrderedDict())
            case (
                "torch._utils._rebuild_tensor_v2",
                (
                    Storage() as storage,
                    int() as offset,
                    tuple() as shape,
                    tuple() as strides,
                    bool(),
                    OrderedDict() as hooks,
                ),
            ) if not hooks:
                self.push(PickledTensor(storage, offset, shape, strides))
            case (
                "torch._utils._rebuild_parameter",
                (PickledTensor() as tensor, bool(), OrderedDict() as hooks),
            ) if not hooks:
                self.push(tensor)
            case _:
                raise self._fault(f"the arguments of {target.name} are not those of a tensor")

    def build(self) -> None:
        state, target = self.pop(), self._top()
        if not isinstance(target, OrderedDict):
            raise self._fault(f"BUILD on a {type_name(target)}, expected an OrderedDict")
        # nn.Module.state_dict() attaches the versions of modules, which are not needed here.
        if not isinstance(state, dict) or list(state) != ["_metadata"]:
            raise self._fault("BUILD with something other than a state dict's _metadata")


_OPCODE_NAMES = {o.code.encode("latin-1"): o.name for o in pickletools.opcodes}

#: Operations that torch.save writes for a dict of tensors and plain values.
_OPERATIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"J": lambda m: m.push(m.number("<i")),
    b"G": lambda m: m.push(m.number(">d")),
    b"\x8a": _Machine.push_long,
    b"X": _Machine.push_string,
    b"c": _Machine.push_global,
    b"(": _Machine.mark,
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push(tuple(m.pop_mark())),
    b"\x85": lambda m: m.push_tuple(1),
    b"\x86": lambda m: m.push_tuple(2),
    b"\x87": lambda m: m.push_tuple(3),
    b"]": lambda m: m.push([]),
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.pop_mark()),
    b"}": lambda m: m.push({}),
    b"s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    b"u": lambda m: m.set_items(m.pop_mark()),
    b"q": lambda m: m.put("<B"),
    b"r": lambda m: m.put("<I"),
    b"h": lambda m: m.get("<B"),
    b"j": lambda m: m.get("<I"),
    b"Q": _Machine.persistent,
    b"R": _Machine.reduce,
    b"b": _Machine.build,
}
