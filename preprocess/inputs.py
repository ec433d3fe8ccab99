"""Input files: finding them and opening them.

A file is named by a local path or by a URL that fsspec knows (``s3://``, ``https://``, ``memory://``). Everything that can stop a
file short of its end raises: nothing is lost silently.
"""

from __future__ import annotations

import errno
import glob
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, cast

from fsspec.core import url_to_fs

SUFFIXES = (".json.gz", ".jsonl.gz", ".jsonl.zst", ".json.zst", ".jsonl", ".json", ".parquet")

RAW_BYTES = 1 << 20  # read from the file system at once
_FILE_URL = "file://"


class InputError(ValueError):
    """An input file cannot be found or read. The message names it."""


class DamageError(Exception):
    """A file's contents break off or make no sense. The message says how; the reader decides whether that is an error."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file: a local path as given or found, or a URL; and its size."""

    name: str
    bytes: int


# --- finding ----------------------------------------------------------------------------------------------------------------------


def find_inputs(patterns: list[str]) -> list[InputFile]:
    """Files named by files, folders and globs, local or of any file system of fsspec, in the order given.

    Inside a folder or glob they are sorted. A folder gives the files with one of ``SUFFIXES`` below it, hidden ones left out;
    symbolic links are followed.

    Raises:
        InputError: a pattern that matches nothing, a name of an unknown form, a broken symbolic link, the same file twice, or a
            size that the file system cannot tell.
    """
    found: list[InputFile] = []
    first_names: dict[str, str] = {}
    for pattern in patterns:
        for file, identity in _find(pattern):
            if not file.name.endswith(SUFFIXES):
                raise InputError(f"{file.name}: unknown form; expected a name ending in {', '.join(SUFFIXES)}")
            if identity in first_names:
                again = f" (again as {file.name})" if file.name != first_names[identity] else ""
                raise InputError(f"{first_names[identity]}: named more than once{again}; its documents would be repeated")
            first_names[identity] = file.name
            found.append(file)
    return found


def _find(pattern: str) -> Iterator[tuple[InputFile, str]]:
    """Files of one pattern, each with what tells whether two names mean the same file."""
    if _is_remote(pattern):
        yield from _find_remote(pattern)
        return
    prefix = _FILE_URL if pattern.startswith(_FILE_URL) else ""
    try:
        for path in _find_local(pattern.removeprefix(prefix)):
            yield InputFile(_readable(f"{prefix}{path}"), path.stat().st_size), os.path.realpath(path)
    except OSError as error:  # a folder that may not be listed, say
        raise InputError(f"{pattern}: cannot be searched ({error})") from error


def _readable(name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name!a}: a name that is no UTF-8 cannot be recorded; rename the file or its folder") from error
    return name


def _is_remote(name: str) -> bool:
    return "://" in name and not name.startswith(_FILE_URL)


def _find_local(pattern: str) -> Iterator[Path]:
    matches = [Path(pattern)] if os.path.lexists(pattern) else sorted(_glob(Path(pattern)))
    if not matches:
        raise InputError(f"{pattern}: no such file, folder or match")
    for path in map(_normal, matches):
        if path.is_dir():
            below = [item for item in _walk(path) if item.name.endswith(SUFFIXES) or not item.exists()]  # the link may be to a folder
            if not below:
                raise InputError(f"{path}: no file ending in {', '.join(SUFFIXES)} below this folder")
            yield from map(_regular, below)
        else:
            yield _regular(path)


def _glob(pattern: Path) -> Iterator[Path]:
    """Matches of a pattern. The library's own ``**`` needs exponential time where symbolic links lead upwards."""
    at = pattern.parts.index("**") if "**" in pattern.parts else len(pattern.parts)
    for name in glob.glob(str(Path(*pattern.parts[:at]))):  # noqa: PTH207 - the pattern may be absolute
        if at == len(pattern.parts):
            yield Path(name)
        elif Path(name).is_dir():
            yield from (path for path in _walk(Path(name)) if _fits(path.relative_to(name).parts, pattern.parts[at:]))


def _fits(names: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern or not names:
        return not pattern and not names
    if pattern[0] == "**":
        return len(pattern) == 1 or any(_fits(names[start:], pattern[1:]) for start in range(len(names)))
    return fnmatchcase(names[0], pattern[0]) and _fits(names[1:], pattern[1:])


def _walk(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """What is below a folder, sorted, but hidden entries, and none where it is one of those ``above`` it, as a link may lead back."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if path.is_dir():
            yield from _walk(path, above | {real})
        else:
            yield path


def _regular(path: Path) -> Path:
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path}: a broken symbolic link to {path.readlink()}; mend it or remove it")
    if not path.is_file():
        raise InputError(f"{path}: not a regular file; expected one, since an input may be read more than once")
    return path


def _normal(path: Path) -> Path:
    """The path without ``..``, except where that would name another file: behind a symbolic link."""
    normal = os.path.normpath(path)
    return Path(normal) if os.path.realpath(normal) == os.path.realpath(path) else path


def _find_remote(url: str) -> Iterator[tuple[InputFile, str]]:
    """Files of one URL. Every protocol has exceptions of its own, so any of them becomes an InputError."""
    try:
        system, path = _file_system(url)
        matches = _remote_matches(system, path, url)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{url}: cannot be looked up ({type(error).__name__}: {error})") from error
    for name, size in matches:
        if size is None:
            raise InputError(f"{name}: its size is unknown to the server; download the file and name the copy")
        yield InputFile(name, size), name


def _remote_matches(system: Any, path: str, url: str) -> list[tuple[str, int | None]]:
    try:
        info = system.info(path)
    except FileNotFoundError:
        info = None
    if info and info["type"] != "directory":
        # a chain such as simplecache::s3://... is known by the whole of it
        return [(url if "::" in url else system.unstrip_protocol(path), info["size"])]
    if "::" in url:
        raise InputError(f"{url}: no such file; in a chain of file systems name the files one by one")
    entries = system.find(path, detail=True) if info else system.glob(path, detail=True)
    files = {name: entry["size"] for name, entry in entries.items() if entry["type"] != "directory"}
    if info:
        root = len(path.rstrip("/")) + 1
        files = {name: size for name, size in files.items() if name.endswith(SUFFIXES) and not _hidden(name[root:])}
        if not files:
            raise InputError(f"{url}: no file ending in {', '.join(SUFFIXES)} below this folder")
    if not files:
        raise InputError(f"{url}: no such file, folder or match")
    return [(system.unstrip_protocol(name), files[name]) for name in sorted(files, key=lambda name: name.split("/"))]


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _file_system(url: str) -> tuple[Any, str]:
    try:
        system, path = url_to_fs(url)
    except ImportError as error:
        raise InputError(f"{url}: no support for {url.split('://')[0]}:// is installed here. {error}") from error
    except ValueError as error:
        raise InputError(f"{url}: no file system can open it ({error})") from error
    return system, path


# --- opening -------------------------------------------------------------------------------------------------------


def open_raw(file: InputFile) -> BinaryIO:
    """The file's bytes as they are stored; unbuffered where it is local.

    Raises:
        InputError: the file cannot be opened.
    """
    try:
        if _is_remote(file.name):
            system, path = _file_system(file.name)
            return cast(BinaryIO, system.open(path, "rb"))
        return cast(BinaryIO, Path(file.name.removeprefix(_FILE_URL)).open("rb", buffering=0))
    except InputError:
        raise
    except Exception as error:  # each protocol has its own
        raise InputError(f"{file.name}: cannot be opened ({error}); expected a file of {file.bytes:,} bytes") from error


class RawFile:
    """A file whose reading errors are InputErrors, so that a failing disk is never taken for a damaged file."""

    def __init__(self, file: InputFile) -> None:
        self.file = file
        self._handle: Any = open_raw(file)
        self.closed = False
        self.mode = "rb"  # Arrow asks for it

    def __enter__(self) -> RawFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; more than once is no error."""
        self.closed = True
        self._handle.close()

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes; none at the end."""
        return cast(bytes, self._guard(self._handle.read, size))

    def readinto(self, view: memoryview) -> int:
        """Bytes put into ``view``; 0 at the end."""
        return cast(int, self._guard(self._handle.readinto, view))

    def seek(self, position: int, whence: int = 0) -> int:
        """Go to a position."""
        return cast(int, self._guard(self._handle.seek, position, whence))

    def tell(self) -> int:
        """The position."""
        return cast(int, self._guard(self._handle.tell))

    def size(self) -> int:
        """The size that the file had when it was found; Arrow asks for it."""
        return self.file.bytes

    def check_end(self, position: int) -> None:
        """Raises InputError unless the file, which ended at ``position``, is as long as when it was found."""
        if position != self.file.bytes:
            raise InputError(f"{self.file.name}: {position:,} bytes, but {self.file.bytes:,} when it was found; it changed meanwhile")

    def _guard(self, call: Callable[..., object], *arguments: object) -> object:
        try:
            return call(*arguments)
        except Exception as error:  # each protocol has its own
            code = f" {errno.errorcode.get(error.errno, '')}" if isinstance(error, OSError) and error.errno else ""
            raise InputError(f"{self.file.name}: cannot be read:{code} {error}; it may be sound, so mend the access and retry") from error
