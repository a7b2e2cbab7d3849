"""The zip archive of torch.save: places of its members, checked before use, and new headers.

`zipfile` only parses the central directory. Members are stored, never compressed, so each one is a
range of the file: 30 bytes of local header, the name, an extra field (with which PyTorch pads to
align the data), and the data. All members are in one folder:
`NAME/data.pkl`, `NAME/data/KEY` for each storage, `NAME/byteorder`, `NAME/version`, ...
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from gptj_convert.files.ranged_file import DOWNLOAD_HINT, RangedFile
from gptj_model.errors import FileFault

RESAVE_HINT = (
    "re-save it as safetensors on a machine where PyTorch may load it: "
    "model.save_pretrained(DIR, safe_serialization=True)"
)
LEGACY_HINT = (
    're-save it, then convert that: python -c "import torch; '
    "torch.save(torch.load('pytorch_model.bin', weights_only=True), 'new.bin')\""
)

#: Limits on the central directory, which for a GPT-J of 28 blocks has 30 kB.
MAX_DIRECTORY_BYTES = 2**20
MAX_NAME = 1024
PICKLE = "data.pkl"

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_LOCAL_MAGIC = b"PK\x03\x04"
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR64 = struct.Struct("<4sIQI")
_END = struct.Struct("<4sHHHHIIH")
_EXTRA = struct.Struct("<HH")
_ZIP64_ID = 1
#: Value of a 4-byte field whose true value is in a ZIP64 field of 8 bytes.
_NO_SIZE = 0xFFFFFFFF
#: Id of the extra field that PyTorch pads with.
_PADDING_ID = int.from_bytes(b"FB", "little")
#: 1 January 1980, the earliest date of the format.
_DATE = 0x21
#: Flags of encryption, strong encryption, masked headers and patch data.
_UNREADABLE_FLAGS = 0x1 | 0x40 | 0x2000 | 0x20
_UTF8_FLAG = 0x800
#: Number of bytes that are read at once to compute a CRC32.
_CHUNK = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Member:
    """Stored file of an archive."""

    name: str
    """Name with its folder."""
    begin: int
    """Offset of its data in the archive, in bytes."""
    size: int
    crc: int


class TorchZip:
    """Members of an archive that torch.save wrote.

    Attributes:
        members: members by name, without the folder that all of them are in.
        checksummed: whether the archive records CRC32s, which PyTorch can be told to omit.

    Raises:
        FileFault: the file is not such an archive, is cut short, or contradicts its directory.
    """

    def __init__(self, file: RangedFile) -> None:
        self._file = file
        self._path = file.path
        entries, end = self._directory()
        folder = self._folder(entries)
        found = self._locate(entries, end)
        self.members = {m.name.removeprefix(folder): m for m in found}
        self.checksummed = any(m.crc for m in found if m.size)
        order = self.members.get("byteorder")
        if order and (order.size != 6 or self._read(order) != b"little"):
            raise FileFault(
                f"{self._path}: member {order.name!r} is not b'little': the tensors are not in "
                "little-endian byte order",
                hint=RESAVE_HINT,
            )

    def pickle(self, limit: int) -> bytes:
        """Return the content of data.pkl, after checking its CRC32 if one is recorded.

        Raises:
            FileFault: data.pkl has more than `limit` bytes, or its CRC32 differs.
        """
        member = self.members[PICKLE]
        if member.size > limit:
            raise FileFault(
                f"{self._path}: member {member.name!r} has {member.size} bytes, "
                f"expected at most {limit}"
            )
        fault = self.crc_fault(member)
        if fault:
            raise FileFault(f"{self._path}: member {member.name!r}: {fault}", hint=DOWNLOAD_HINT)
        return self._read(member)

    def crc_fault(self, member: Member) -> str | None:
        """Read a member's data, and return how its CRC32 differs from the recorded one, or None.

        Raises:
            FileFault: the data cannot be read.
        """
        if not self.checksummed:
            return None
        crc = 0
        buffer = memoryview(bytearray(min(_CHUNK, member.size)))
        for offset in range(0, member.size, _CHUNK):
            part = buffer[: member.size - offset]
            self._file.read_into(member.begin + offset, part, f"member {member.name!r}")
            crc = zlib.crc32(part, crc)
        if crc == member.crc:
            return None
        return f"CRC32 is {crc:08x}, the archive says {member.crc:08x}"

    def _read(self, member: Member) -> bytes:
        return self._file.read(member.begin, member.size, f"member {member.name!r}")

    def _directory(self) -> tuple[list[zipfile.ZipInfo], int]:
        """Return the entries of the central directory, and its offset in bytes."""
        head = self._file.read(0, min(4, self._file.size), "its first bytes")
        if head.startswith(b"\x80"):
            raise FileFault(
                f"{self._path}: is in the legacy format of PyTorch before 1.6 (a bare pickle), "
                "expected the zip format",
                hint=LEGACY_HINT,
            )
        if head != _LOCAL_MAGIC:
            raise FileFault(
                f"{self._path}: begins with {head!r}, expected a PyTorch checkpoint (a zip "
                f"archive, {_LOCAL_MAGIC!r})"
            )
        try:
            archive = zipfile.ZipFile(_DirectoryReader(self._file))
            return archive.infolist(), archive.start_dir
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as e:
            raise FileFault(
                f"{self._path}: is cut short or not a PyTorch checkpoint: its {self._file.size} "
                f"bytes are not a whole zip archive ({str(e)[:80]!r})",
                hint=DOWNLOAD_HINT,
            ) from None

    def _folder(self, entries: list[zipfile.ZipInfo]) -> str:
        """Return the folder, with its slash, that holds all members."""
        names = [e.filename for e in entries]
        longest = max(map(len, names), default=0)
        if longest > MAX_NAME:
            raise FileFault(
                f"{self._path}: a member's name has {longest} characters, "
                f"expected at most {MAX_NAME}"
            )
        pickles = [n for n in names if n.endswith("/" + PICKLE)]
        if len(pickles) != 1 or pickles[0].count("/") != 1:
            raise FileFault(
                f"{self._path}: is a zip archive with {len(pickles)} members named {PICKLE}, "
                f"expected exactly one, as FOLDER/{PICKLE} (is this a PyTorch checkpoint?)"
            )
        folder = pickles[0].removesuffix(PICKLE)
        strays = [n for n in names if not n.startswith(folder)]
        if strays:
            raise FileFault(
                f"{self._path}: member {strays[0]!r} is outside the folder {folder!r}, expected "
                "every member in it"
            )
        return folder

    def _locate(self, entries: list[zipfile.ZipInfo], end: int) -> list[Member]:
        """Return the entries as members, in file order; no data may reach beyond `end`."""
        found: list[Member] = []
        seen: set[str] = set()
        position = 0
        for entry in sorted(entries, key=lambda e: e.header_offset):
            rule = _entry_fault(entry, seen)
            if rule:
                raise self._fault(entry, rule)
            seen.add(entry.filename)
            start = entry.header_offset
            # zipfile would skip another file in front of the archive; other programs would read it.
            if not found and start != 0:
                raise self._fault(entry, f"begins at byte {start}, expected the first one at 0")
            if start < position:
                raise self._fault(entry, f"begins at byte {start}, inside the one before it")
            begin = self._data_begin(entry, end)
            position = begin + entry.file_size
            if position > end:
                raise self._fault(
                    entry, f"ends at byte {position}, but the directory begins at {end}"
                )
            found.append(Member(entry.filename, begin, entry.file_size, entry.CRC))
        return found

    def _data_begin(self, entry: zipfile.ZipInfo, end: int) -> int:
        """Return the offset of an entry's data; its local header must agree with the directory."""
        name = entry.orig_filename.encode("utf-8" if entry.flag_bits & _UTF8_FLAG else "cp437")
        start = entry.header_offset
        name_at = start + _LOCAL.size
        if name_at + len(name) > end:
            raise self._fault(entry, f"its header at byte {start} is inside the directory")
        header = self._file.read(start, _LOCAL.size + len(name), f"a header of {name!r}")
        fields = _LOCAL.unpack_from(header)
        magic, flags, method, name_size, extra_size = (fields[i] for i in (0, 2, 3, 9, 10))
        if magic != _LOCAL_MAGIC or name_size != len(name) or header[_LOCAL.size :] != name:
            raise self._fault(entry, f"its header is not at byte {start}, where it should be")
        if method != entry.compress_type or flags & _UNREADABLE_FLAGS:
            raise self._fault(entry, f"its header at byte {start} contradicts the directory")
        return name_at + name_size + extra_size

    def _fault(self, entry: zipfile.ZipInfo, rule: str) -> FileFault:
        return FileFault(f"{self._path}: member {entry.filename!r}: {rule}", hint=RESAVE_HINT)


def _entry_fault(entry: zipfile.ZipInfo, seen: set[str]) -> str | None:
    """Return the rule that an entry of the directory breaks, or None."""
    if entry.orig_filename != entry.filename:
        return "its name holds a NUL character"
    if entry.filename in seen:
        return "is in the archive twice"
    if entry.flag_bits & _UNREADABLE_FLAGS:
        return f"is encrypted or a patch (flag bits {entry.flag_bits:#x})"
    if entry.compress_type != zipfile.ZIP_STORED:
        return f"is compressed (method {entry.compress_type}), expected stored"
    if entry.compress_size != entry.file_size:
        return f"is stored in {entry.compress_size} bytes, but its size is {entry.file_size}"
    return None


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """Member of a new archive, stored and without a CRC32."""

    name: str
    size: int
    header_at: int
    """Offset of its local header, in bytes."""


def local_header(entry: ZipEntry, *, alignment: int) -> bytes:
    """Return a member's local header, padded to align the data that follows it."""
    name = entry.name.encode()
    begin = entry.header_at + _LOCAL.size + len(name) + _EXTRA.size
    padding = -begin % alignment
    sizes = (0, entry.size, entry.size, len(name), _EXTRA.size + padding)
    header = _LOCAL.pack(_LOCAL_MAGIC, 20, _UTF8_FLAG, zipfile.ZIP_STORED, 0, _DATE, *sizes)
    return header + name + _EXTRA.pack(_PADDING_ID, padding) + b"Z" * padding


def end_of_zip(entries: Sequence[ZipEntry], begin: int) -> bytes:
    """Return the central directory, which begins at byte `begin`, and the end records."""
    directory = b"".join(map(_directory_entry, entries))
    count, size = len(entries), len(directory)
    if begin < _NO_SIZE:
        return directory + _END.pack(b"PK\5\6", 0, 0, count, count, size, begin, 0)
    return (
        directory
        + _END64.pack(b"PK\6\6", _END64.size - 12, 45, 45, 0, 0, count, count, size, begin)
        + _LOCATOR64.pack(b"PK\6\7", 0, begin + size, 1)
        + _END.pack(b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, _NO_SIZE, _NO_SIZE, 0)
    )


def _directory_entry(entry: ZipEntry) -> bytes:
    name = entry.name.encode()
    at, extra = entry.header_at, b""
    # Only where necessary: the archive reader of PyTorch 2.4 takes it for damage elsewhere.
    if at >= _NO_SIZE:
        at, extra = _NO_SIZE, _EXTRA.pack(_ZIP64_ID, 8) + struct.pack("<Q", at)
    version = 45 if extra else 20
    sizes = (0, entry.size, entry.size, len(name), len(extra))
    fields = (b"PK\1\2", version, version, _UTF8_FLAG, zipfile.ZIP_STORED, 0, _DATE, *sizes)
    return _CENTRAL.pack(*fields, 0, 0, 0, 0, at) + name + extra


class _DirectoryReader:
    """File object with what zipfile needs to read a directory of limited size."""

    def __init__(self, file: RangedFile) -> None:
        self._file = file
        self._at = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
        if base + offset < 0:
            raise OSError("seek before the start")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        rest = max(0, self._file.size - self._at)
        size = rest if size < 0 else min(size, rest)
        if size > MAX_DIRECTORY_BYTES:
            raise FileFault(
                f"{self._file.path}: its zip directory is {size} bytes, "
                f"expected at most {MAX_DIRECTORY_BYTES}"
            )
        data = self._file.read(self._at, size, "the zip directory")
        self._at += size
        return data
