"""What is in a file, streamed in order and in bounded memory: lines as they are stored, or decompressed from gzip or zstandard.

A stream that is cut or broken, or looks like a decompression bomb, raises DamageError: nothing is lost silently.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import IO, Any, Protocol, cast

import zstandard
from blake3 import blake3
from isal import igzip_lib

from mates.preprocess.inputs import RAW_BYTES, DamageError, RawFile

INFLATED_BYTES = 512 << 10  # decompressed at once: what a checksum error takes with it
BOMB_BYTES = 64 << 20  # a stream of less is never taken for a decompression bomb
_GZIP_FEED = 8 << 10, 128 << 10  # compressed bytes given to a gzip member: at its start, and at most
_ZSTD_WINDOW = 1 << 27  # that of `zstd --long`; a larger one would not fit a worker's memory
_ISAL_ERROR = cast(type[Exception], igzip_lib.IsalError)  # its type stub says that it is an instance


class Stream(Protocol):
    """Decompressed bytes in order, and the BLAKE3 digest of the raw ones passed so far."""

    @property
    def digest(self) -> str:
        """In hexadecimal."""

    def readinto(self, view: memoryview) -> int:
        """Bytes put into ``view``; 0 at the end. Raises DamageError where the contents break off."""


class PlainPart:
    """The lines of an uncompressed file whose first byte lies in part ``part`` of ``parts`` equal byte ranges."""

    def __init__(self, raw: RawFile, part: int, parts: int) -> None:
        self._raw, self._digest = raw, blake3()
        self._is_last = part == parts - 1
        self._stop = raw.file.bytes * (part + 1) // parts
        self.start = self._at = _next_line(raw, raw.file.bytes * part // parts, self._stop)  # where the first line begins
        self._done = self._at >= self._stop and not self._is_last

    @property
    def digest(self) -> str:
        """See :class:`Stream`."""
        return self._digest.hexdigest()

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
        self._digest.update(view[:count])
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
    def digest(self) -> str:
        """See :class:`Stream`."""
        return self._raw.digest.hexdigest()

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
        self._raw, self.digest, self.count = raw, blake3(), 0

    def read(self, size: int) -> bytes:
        piece = self._raw.read(size)
        self.digest.update(piece)
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
