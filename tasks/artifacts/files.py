"""File operations that survive a power cut, and the errors that they end in."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.context import StepError


class StoreError(StepError):
    """The store cannot do what was asked: the path, the reason and the remedy, on one line."""


class ArtifactMissing(StoreError):
    """No artifact has this key."""


class ArtifactDamaged(StoreError):
    """The artifact is not what was written; it has been moved to quarantine."""


class Unsound(Exception):
    """A folder or a file is not as the store wrote it; the text names the file and says what differs."""


_REMEDIES = {
    errno.ENOSPC: "free some space, run `lathe cache gc`, or put the store on a larger disk",
    errno.EDQUOT: "free some space, run `lathe cache gc`, or ask for a larger quota",
    errno.EIO: "the disk failed; check it, then run `lathe cache verify`",
    errno.EMFILE: "raise the limit of open files with `ulimit -n 4096` and run again",
    errno.ENFILE: "close other programs, the machine has too many files open, and run again",
    errno.EACCES: "make the store writable for this user",
    errno.EPERM: "make the store writable for this user",
    errno.EROFS: "put the store on a disk that can be written",
    errno.EXDEV: "write the artifact in a folder from Store.scratch(), which is on the store's disk",
    errno.ENOLCK: "put the store on a local disk, this one cannot lock files",
    errno.EOPNOTSUPP: "put the store on a local disk, this one cannot lock files",
}

_OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE}
"""Those of them that say nothing of the path, so that the remedy is the same whoever met them."""

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How libraries written in Rust name the error of the system."""

_DAMAGE = {
    errno.EBADMSG,
    errno.EIO,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EUCLEAN,
    errno.ENXIO,
}
"""Errors of reading that say something of the file. All others (too many open files, no memory, no right to read) say
something of the reader, and an artifact must not be given up for them."""


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


def with_remedy(error: Exception) -> str:
    """The kind and text of an error, and the remedy where the machine refused (a full disk), in whatever words."""
    told = _OS_ERROR.search(str(error))
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    remedy = f"; {_REMEDIES[number]}" if number in _OF_THE_MACHINE else ""
    return f"{type(error).__name__}: {error}{remedy}"


@contextmanager
def explained(doing: str, path: Path) -> Iterator[None]:
    """Turn an ``OSError`` into a ``StoreError`` of one line: ``cannot write PATH: No space left on device; …``."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "check the path and run again")
        place = error.filename if isinstance(error.filename, (str, Path)) else path
        raise StoreError(f"cannot {doing} {place}: {_reason(error)}; {remedy}") from error


@contextmanager
def reading(path: Path, shown: str) -> Iterator[None]:
    """Turn an ``OSError`` into ``Unsound`` where it says that the file is damaged, else into a ``StoreError``."""
    try:
        yield
    except OSError as error:
        if error.errno in _DAMAGE:
            raise Unsound(f"{shown}: {_reason(error)}") from error
        with explained("read", path):
            raise


def _open_plain(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)


def hash_file(path: Path, sync: bool = False) -> str:
    """SHA-256 of the file in hex; with ``sync`` its bytes are on the disk afterwards.

    Raises:
        OSError: it cannot be read, or is a symbolic link.
    """
    with open(path, "rb", buffering=0, opener=_open_plain) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
    return digest


def read_bytes(path: Path) -> bytes:
    """The file's bytes; a symbolic link is not followed."""
    with open(path, "rb", buffering=0, opener=_open_plain) as file:
        return file.readall()


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file, or a file anew, and have it on the disk; the entry in its folder is not."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(path: Path) -> None:
    """Have the folder's entries on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """Make a folder, with those above it, and have every new one on the disk."""
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        os.mkdir(path)
    except FileExistsError:
        if not path.is_dir():
            raise
    sync_folder(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a folder as far as possible; what cannot be removed stays for the next collection."""
    shutil.rmtree(path, ignore_errors=True)


def scan(folder: Path) -> tuple[dict[str, int], list[Path]]:
    """Sizes of the regular files under ``folder`` by relative POSIX path, and the folders, inner ones first.

    Raises:
        Unsound: something under it is neither a file nor a folder (a symbolic link, a device, a socket), or has a
            name that is not UTF-8.
        OSError: a folder cannot be read.
    """
    files: dict[str, int] = {}
    folders: list[Path] = []

    def visit(path: Path, prefix: str) -> None:
        with os.scandir(path) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        for entry in listed:
            name = f"{prefix}{entry.name}"
            if not _is_utf8(name):
                raise Unsound(f"{name!r}: the name is not UTF-8")
            mode = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(mode.st_mode):
                visit(path / entry.name, f"{name}/")
            elif stat.S_ISREG(mode.st_mode):
                files[name] = mode.st_size
            else:
                kind = "a symbolic link" if stat.S_ISLNK(mode.st_mode) else "not a regular file"
                raise Unsound(f"{name}: it is {kind}")
        folders.append(path)

    visit(folder, "")
    return files, folders


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def size_of(path: Path) -> int:
    """Bytes of all files under ``path``, without following links; what vanishes meanwhile counts nothing."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total
