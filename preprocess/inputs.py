"""Input files: finding them, opening them, and streaming what is in them, decompressed, in bounded memory.

A file is named by a local path or by a URL that fsspec knows (``s3://``, ``https://``, ``memory://``). Everything that can stop a
file short of its end raises: nothing is lost silently.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol, cast

import zstandard
from fsspec.core import url_to_fs
from isal import igzip_lib

SUFFIXES = (".json.gz", ".jsonl.gz", ".jsonl.zst", ".json.zst", ".jsonl", ".json", ".parquet")

RAW_BYTES = 1 << 20  # read from the file system at once
INFLATED_BYTES = 512 << 10  # decompressed at once: what a checksum error takes with it
BOMB_BYTES = 64 << 20  # a stream of less is never taken for a decompression bomb
_GZIP_FEED = 8 << 10, 128 << 10  # compressed bytes given to a gzip member: at its start, and at most
_ZSTD_WINDOW = 1 << 27  # that of `zstd --long`; a larger one would not fit a worker's memory
_FILE_URL = "file://"
_ISAL_ERROR = cast(type[Exception], igzip_lib.IsalError)  # its type stub says that it is an instance


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
            yield InputFile(f"{prefix}{path}", path.stat().st_size), os.path.realpath(path)
    except OSError as error:  # a folder that may not be listed, say
        raise InputError(f"{pattern}: cannot be searched ({error})") from error


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


# --- streaming --------------------------------------------------------------------------------------------------------


class Stream(Protocol):
    """Decompressed bytes in order, and the SHA-256 of the raw ones passed so far."""

    @property
    def sha256(self) -> str:
        """In hexadecimal."""

    def readinto(self, view: memoryview) -> int:
        """Bytes put into ``view``; 0 at the end. Raises DamageError where the contents break off."""


class PlainPart:
    """The lines of an uncompressed file whose first byte lies in part ``part`` of ``parts`` equal byte ranges."""

    def __init__(self, raw: RawFile, part: int, parts: int) -> None:
        self._raw, self._sha256 = raw, hashlib.sha256()
        self._is_last = part == parts - 1
        self._stop = raw.file.bytes * (part + 1) // parts
        self.start = self._at = _next_line(raw, raw.file.bytes * part // parts, self._stop)  # where the first line begins
        self._done = self._at >= self._stop and not self._is_last

    @property
    def sha256(self) -> str:
        """See :class:`Stream`."""
        return self._sha256.hexdigest()

    def readinto(self, view: memoryview) -> int:
        """See :class:`Stream`."""
        if self._done:
            return 0
        count = self._raw.readinto(view)
        if count == 0:
            self._raw.check_end(self._at)
        if not self._is_last and self._at + count >= self._stop:
            ahead = max(0, self._stop - 1 - self._at)
            newline = bytes(view[ahead:count]).find(b"\n")
            if newline >= 0:
                count, self._done = ahead + newline + 1, True
        self._at += count
        self._sha256.update(view[:count])
        return count


def _next_line(raw: RawFile, start: int, stop: int) -> int:
    """Go to where the first line at or after ``start`` begins, or to ``stop`` if none begins before it."""
    if start == 0:
        return 0
    at = raw.seek(start - 1)  # a line begins at start if the one before ends there
    while at < stop and (piece := raw.read(min(RAW_BYTES, stop - at))):
        newline = piece.find(b"\n")
        if newline >= 0:
            return raw.seek(at + newline + 1)
        at += len(piece)
    return raw.seek(stop)


class _Compressed:
    """What gzip and zstandard streams share: the raw bytes, counted and hashed, and a bound on what so few may give."""

    def __init__(self, raw: RawFile, max_expansion: int) -> None:
        self._raw, self._max_expansion, self._out = _HashedFile(raw), max_expansion, 0

    @property
    def sha256(self) -> str:
        """See :class:`Stream`."""
        return self._raw.sha256.hexdigest()

    def readinto(self, view: memoryview) -> int:
        """See :class:`Stream`."""
        count = self._inflate(view[:INFLATED_BYTES])
        self._out += count
        if self._out > max(BOMB_BYTES, self._max_expansion * self._raw.count):
            raise DamageError(
                f"{self._raw.count:,} bytes gave {self._out:,}, as in a decompression bomb; expected at most {self._max_expansion} "
                "times as many. If the file is sound, decompress it first"
            )
        if self._raw.count == 0:
            raise DamageError("0 bytes, which is no compressed stream; one of nothing has some")
        return count

    def _inflate(self, view: memoryview) -> int:
        raise NotImplementedError


class _HashedFile:
    def __init__(self, raw: RawFile) -> None:
        self._raw, self.sha256, self.count = raw, hashlib.sha256(), 0

    def read(self, size: int) -> bytes:
        piece = self._raw.read(size)
        self.sha256.update(piece)
        self.count += len(piece)
        if not piece:
            self._raw.check_end(self.count)
        return piece


class GzipStream(_Compressed):
    """A file of one or more gzip members; zeros may follow the last one, as tapes leave them."""

    def __init__(self, raw: RawFile, max_expansion: int) -> None:
        super().__init__(raw, max_expansion)
        self._member: Any = None
        self._members = 0
        self._piece, self._at, self._feed = b"", 0, _GZIP_FEED[0]

    def _inflate(self, view: memoryview) -> int:
        while True:
            data = self._next() if self._member is None or self._member.needs_input else b""
            if self._member is None:
                if not data:
                    return 0
                self._member = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_GZIP)
            elif not data and self._member.needs_input:
                raise DamageError("the gzip stream is cut")
            try:
                inflated = self._member.decompress(data, len(view))
            except _ISAL_ERROR as error:
                raise DamageError(f"the gzip stream is broken: {error}") from error
            if self._member.eof:
                self._at -= len(self._member.unused_data)
                self._member, self._members, self._feed = None, self._members + 1, _GZIP_FEED[0]
            if inflated:
                view[: len(inflated)] = inflated
                return len(inflated)

    def _next(self) -> memoryview:
        """The next compressed bytes. Few at a member's start, since what is left over at its end is copied."""
        if self._member is None:
            self._top_up(_GZIP_FEED[0])  # isal misreads a header with a checksum of its own that comes in two pieces
            while self._members and self._piece[self._at : self._at + 1] == b"\0":
                self._piece, self._at = self._piece[self._at :].lstrip(b"\0"), 0
                self._top_up(_GZIP_FEED[0])
        self._top_up(1)
        data = memoryview(self._piece)[self._at : self._at + self._feed]
        self._at += len(data)
        self._feed = min(2 * self._feed, _GZIP_FEED[1])
        return data

    def _top_up(self, size: int) -> None:
        while len(self._piece) - self._at < size and (more := self._raw.read(RAW_BYTES)):
            self._piece, self._at = self._piece[self._at :] + more, 0


class ZstdStream(_Compressed):
    """A file of one or more zstandard frames."""

    def __init__(self, raw: RawFile, max_expansion: int) -> None:
        super().__init__(raw, max_expansion)
        self._raw = self._walked = _WalkedFile(raw)
        decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self._reader = decompressor.stream_reader(cast(IO[bytes], self._raw), read_size=RAW_BYTES, read_across_frames=True)

    def _inflate(self, view: memoryview) -> int:
        try:
            count = self._reader.readinto(view)
        except zstandard.ZstdError as error:
            if "too much memory" in str(error):
                raise DamageError(
                    f"compressed by zstd --long with a window of more than {_ZSTD_WINDOW >> 20} MiB, too much for the memory of a "
                    "worker; decompress it, or compress it anew with zstd --long=27 or without --long"
                ) from error
            raise DamageError(f"the zstandard stream is broken: {error}") from error
        if count == 0 and not self._walked.complete:  # the library ends quietly where a frame is cut
            raise DamageError("the zstandard stream is cut")
        return count


class _WalkedFile(_HashedFile):
    """Zstandard frames, whose headers and those of their blocks are walked over to tell whether the last one is complete."""

    def __init__(self, raw: RawFile) -> None:
        super().__init__(raw)
        self._head, self._is_between_frames = b"", True
        self._steps = self._walk()
        self._want = next(self._steps)

    @property
    def complete(self) -> bool:
        """Whether a frame ends where the bytes read so far do."""
        return self._is_between_frames and not self._head

    def read(self, size: int) -> bytes:
        piece = super().read(size)
        at = 0
        while at < len(piece) or self._want == 0:
            if self._want > 0:  # bytes of a header
                taken = piece[at : at + self._want - len(self._head)]
                self._head, at = self._head + taken, at + len(taken)
                if len(self._head) < self._want:
                    break
                head, self._head = self._head, b""
                self._want = self._steps.send(head)
            else:  # bytes to pass over
                step = min(-self._want, len(piece) - at)
                self._want, at = self._want + step, at + step
                if self._want == 0:
                    self._want = self._steps.send(b"")
        return piece

    def _walk(self) -> Generator[int, bytes, None]:
        """Wants, by turns, so many bytes of a header or (negative) to pass over so many. See RFC 8878, section 3.1."""
        while True:
            self._is_between_frames = True
            magic = yield 4
            self._is_between_frames = False
            if magic[0] >> 4 == 5 and magic[1:] == b"\x2a\x4d\x18":  # a skippable frame
                yield -int.from_bytes((yield 4), "little")
                continue
            descriptor = (yield 1)[0]
            is_single_segment, dictionary, content = descriptor >> 5 & 1, descriptor & 3, descriptor >> 6
            yield -((not is_single_segment) + (0, 1, 2, 4)[dictionary] + (is_single_segment, 2, 4, 8)[content])
            is_last = 0
            while not is_last:
                block = int.from_bytes((yield 3), "little")
                is_last, kind, size = block & 1, block >> 1 & 3, block >> 3
                yield -(1 if kind == 1 else size)  # kind 1 is one byte, repeated
            yield -(descriptor & 4)  # the checksum
