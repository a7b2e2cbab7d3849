"""Records made in a folder of this machine and uploaded from there to object storage.

`data_params.json` is uploaded last, so records whose upload was interrupted are never taken for
complete. A journal lists the objects that arrived, so that a resumed run uploads the others.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from gptj_convert.files.json_lines import append_line, read_lines
from gptj_convert.streams.progress import Progress, Work
from gptj_model.errors import FileFault, UsageError
from runner.data.reading.data_params import DATA_PARAMS_FILE, stated_files
from runner.data.remote.path import BLOCK, RemotePath, Stat, stat_of
from runner.data.remote.staged_records import RECORDS
from runner.data.remote.storage import faults

#: End of the name of the folder that the records are made in, if none is named.
STAGING = ".staging-gptj"
#: Largest number of parts of an upload, with a margin.
_PARTS = 9000
_RESUME = "resume it with --resume, or start from scratch with --force"


class Upload:
    """Output of a command in object storage.

    Args:
        address: address of the output.
        staging: folder of this machine in which the output is made, in a folder that is called
            like it and is deleted at the end; None means the current folder.
        resume: whether what an interrupted run left is used.
        force: whether an existing output is replaced, and what an interrupted run left deleted.
        parts: names of the folders that an output may consist of, beside files of its own; nothing
            in other folders is touched.

    Attributes:
        folder: folder that the command has to make; what is in it is uploaded.

    Raises:
        UsageError: the output or an interrupted run exists, and neither `resume` nor `force` is
            given.
        FileFault: the storage cannot be used.
    """

    def __init__(
        self,
        address: RemotePath,
        staging: Path | None,
        *,
        resume: bool,
        force: bool,
        parts: Collection[str],
    ) -> None:
        self.address = address
        self.folder = (staging or Path()) / (address.name + STAGING)
        self._journal = self.folder.with_name(f"{self.folder.name}.jsonl")
        self._folders = {Path(part) for part in ("", *parts)}
        self._before = self._listed()
        if not resume and not force:
            self._refuse_existing()
        if force:
            self._journal.unlink(missing_ok=True)
        # A resumed run replaces what the interrupted one was told to replace.
        self._replaces = force or any(line.get("replaces") for line in read_lines(self._journal))

    @property
    def has_begun(self) -> bool:
        """Whether an interrupted upload has left its files on this machine."""
        return self.folder.exists()

    @property
    def is_complete(self) -> bool:
        """Whether the storage holds a complete output, or a part of it that is complete."""
        return bool(self._statements)

    @property
    def _statements(self) -> list[str]:
        """Names of the data_params.json that the storage held at the beginning."""
        return [
            name
            for name in self._before
            if Path(name).name == DATA_PARAMS_FILE and Path(name).parent in self._folders
        ]

    def _refuse_existing(self) -> None:
        if self._before:
            what = "already exists" if self.is_complete else "holds objects already"
            raise UsageError(
                f"{self.address}: {what}",
                hint="choose another address with --out, replace this one with --force, or finish "
                "an interrupted run with --resume",
            )
        if self.has_begun:
            raise UsageError(f"{self.folder}: an interrupted run exists", hint=_RESUME)

    def refuse_a_full_disk(self, sources: int) -> None:
        """Refuse a disk that cannot hold records of sources of so many bytes, about as many."""
        place = self.folder.parent
        place.mkdir(parents=True, exist_ok=True)
        if sources > (free := shutil.disk_usage(place).free):
            raise FileFault(
                f"{place}: records are made here before they are uploaded; the sources have "
                f"{sources / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
                hint="name a folder on another disk with --staging",
            )

    def fetch_statements(self, folder: Path) -> bool:
        """Copy each data_params.json of the storage, and return whether its records are there too.

        Args:
            folder: empty folder to copy to.
        """
        is_whole = True
        for name in self._statements:
            copy = folder / name
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes((self.address / name).read_bytes())
            for record, facts in (stated_files(copy.parent) or {}).items():
                there = self._before.get(str(Path(name).with_name(record)))
                is_whole &= there is not None and there.st_size == facts.bytes
        return is_whole

    def repair(self) -> None:
        """Let `run` replace the output that is there: it is of this command, but not whole."""
        self._replaces = True

    def run(self) -> Work[int]:
        """Upload the folder, yielding progress in bytes, and delete it.

        Returns:
            Number of bytes that were uploaded; the others were there from an interrupted run.

        Raises:
            UsageError: the storage holds a complete output that is not to be replaced.
            FileFault: the storage cannot be written, or holds something else in the end.
        """
        append_line(self._journal, {"replaces": self._replaces})
        files = {str(p.relative_to(self.folder)): p for p in self.folder.rglob("*") if p.is_file()}
        last = [name for name in files if Path(name).name == DATA_PARAMS_FILE]
        kept = self._kept(files)
        if not self._replaces and set(self._statements) - kept:
            raise UsageError(
                f"{self.address}: another output was written there meanwhile",
                hint="choose another address with --out, or replace that one with --force",
            )
        if set(files) != kept:  # an output that is not whole must not look so
            self._delete(self._statements)
            kept -= set(last)
        total, done = sum(p.stat().st_size for p in files.values()), 0
        uploaded = 0
        for name in (*sorted(set(files) - set(last)), *sorted(last)):
            if name in last:
                self._check(files, set(files) - set(last))
            if name not in kept:
                self._put(name, files[name])
                uploaded += files[name].stat().st_size
            done += files[name].stat().st_size
            yield Progress(done, total, name)
        self._check(files, set(files))
        self.discard()
        return uploaded

    def discard(self) -> None:
        """Delete what is on this machine."""
        if self.has_begun:
            shutil.rmtree(self.folder)
        self._journal.unlink(missing_ok=True)

    def _listed(self) -> dict[str, Stat]:
        return {str(path.relative_to(self.address)): stat for path, stat in self.address.objects()}

    def _kept(self, files: Mapping[str, Path]) -> set[str]:
        """Return the names of the files that the storage holds as this run uploaded them."""
        found: set[str] = set()
        for line in read_lines(self._journal):
            name, there = str(line.get("name")), self._before.get(str(line.get("name")))
            facts = (line.get("bytes"), line.get("version"))
            if name in files and there and facts == (there.st_size, there.version):
                found.add(name)
        return found

    def _put(self, name: str, path: Path) -> None:
        target, size = self.address / name, path.stat().st_size
        piece = max(BLOCK, -(-size // _PARTS // BLOCK) * BLOCK)
        with faults(str(target), "written"):
            target.client.put_file(str(path), target.key, chunksize=piece)
            there = stat_of(target.client.info(target.key))
        append_line(self._journal, {"name": name, "bytes": there.st_size, "version": there.version})

    def _check(self, files: Mapping[str, Path], names: Iterable[str]) -> None:
        """Check that the storage holds these files, and delete those of a replaced output."""
        there = self._listed()
        for name in names:
            found = there[name].st_size if name in there else None
            if found != (size := files[name].stat().st_size):
                raise FileFault(
                    f"{self.address / name}: has {found or 'no'} bytes after the upload, expected "
                    f"{size}",
                    hint="run the command again with --resume",
                )
        if self._replaces:
            self._delete(
                name
                for name in there
                if name not in files
                and Path(name).parent in self._folders
                and any(fnmatchcase(Path(name).name, pattern) for pattern in RECORDS)
            )

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            with faults(str(self.address / name), "deleted"):
                self.address.client.rm_file((self.address / name).key)
