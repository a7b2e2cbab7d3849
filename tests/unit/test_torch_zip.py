"""Archives in the form of torch.save, read by Python's zipfile and by our own reader."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest

from gptj_convert.files.ranged_file import RangedFile
from gptj_convert.formats.containers.torch_zip import TorchZip, ZipEntry, end_of_zip, local_header
from gptj_model.errors import FileFault

GIB = 2**30
CONTENT = {"x/data.pkl": b"\x80\x02}.", "x/data/0": b"0123456789", "x/données": b""}


def _write(path: Path, begin: int, alignment: int) -> list[ZipEntry]:
    """Write a sparse archive whose second member begins at `begin`, or right behind the first."""
    entries, at = [], 0
    with path.open("wb") as file:
        for n, (name, content) in enumerate(CONTENT.items()):
            at = max(at, begin) if n == 1 else at
            entries.append(ZipEntry(name, len(content), at))
            file.seek(at)
            file.write(local_header(entries[-1], alignment=alignment) + content)
            at = file.tell()
        file.write(end_of_zip(entries, at))
    return entries


@pytest.mark.parametrize("begin", [0, 2**32 - 300, 2**32 - 1, 2**32, 5 * GIB])
def test_a_new_archive_is_read_back(tmp_path: Path, begin: int):
    path = tmp_path / "x.pt"
    entries = _write(path, begin, 64)
    with zipfile.ZipFile(path) as archive:
        found = archive.infolist()
    for entry, info in zip(entries, found, strict=True):
        far = entry.header_at >= 2**32 - 1
        assert (info.filename, info.file_size, info.compress_size) == (
            entry.name,
            entry.size,
            entry.size,
        )
        assert (info.header_offset, info.CRC, info.compress_type) == (entry.header_at, 0, 0)
        assert (info.create_version, info.extract_version) == ((45, 45) if far else (20, 20))
        assert (info.flag_bits, info.date_time) == (0x800, (1980, 1, 1, 0, 0, 0))
        assert (info.internal_attr, info.external_attr, info.volume) == (0, 0, 0)
        assert bool(info.extra) == far
    file = RangedFile(path)
    try:
        ours = TorchZip(file)
        assert not ours.checksummed
        assert set(ours.members) == {"data.pkl", "data/0", "données"}
        for name, content in CONTENT.items():
            member = ours.members[name.removeprefix("x/")]
            assert member.begin % 64 == 0
            assert file.read(member.begin, member.size, name) == content
        assert ours.pickle(4) == CONTENT["x/data.pkl"]
        with pytest.raises(FileFault, match="has 4 bytes, expected at most 3"):
            ours.pickle(3)
    finally:
        file.close()


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_headers_have_the_least_padding_for_alignment(tmp_path: Path, alignment: int):
    entry = ZipEntry("x/data/0", 3, 77)
    header = local_header(entry, alignment=alignment)
    assert (77 + len(header)) % alignment == 0
    assert len(header) < 30 + len(entry.name) + 4 + alignment
    assert header[30 + len(entry.name) :][:2] == b"FB"
    fields = struct.unpack("<4sHHHHHIIIHH", header[:30])
    padding = len(header) - 42
    assert fields == (b"PK\3\4", 20, 0x800, 0, 0, 0x21, 0, 3, 3, 8, 4 + padding)


def test_the_end_locates_a_directory_beyond_4_gib():
    unsaid, begin = 2**32 - 1, 2**32 - 2
    near = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0, 0, 0, begin, 0)
    assert end_of_zip([], begin) == near
    assert end_of_zip([], unsaid) == (
        struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 0, 0, 0, unsaid)
        + struct.pack("<4sIQI", b"PK\6\7", 0, unsaid, 1)
        + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, unsaid, unsaid, 0)
    )
