"""A folder as files of a bounded size, to be carried to a machine one by one: a tar stream, compressed by zstandard, cut into pieces.

    python benchmarks/flops_to_accuracy.py --tier gpu --data-only
    python benchmarks/pieces.py pack runs/flops_to_accuracy_gpu/data PIECES [--mib 40]
    python benchmarks/pieces.py unpack PIECES runs/flops_to_accuracy_gpu/data

For the data of a tier (tokenizer, corpora, reference) where the text itself cannot be taken along: ``flops_to_accuracy.py --tier`` believes
an unpacked folder, and makes none of it again. Pieces have digests; a folder is unpacked whole or not at all.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import zstandard

from mates.preprocess import artifact

LIST = "pieces.json"
RECIPE = "data-recipe.json"
"""What the data was made by, written when all of it is there."""
LEVEL = 12


class PieceError(RuntimeError):
    """Pieces are missing or damaged, or a folder is in the way."""


class _Cut(io.RawIOBase):
    """What is written, in files of so many bytes."""

    def __init__(self, folder: Path, size: int) -> None:
        super().__init__()
        self._folder, self._size, self._room, self.paths = folder, size, 0, list[Path]()

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        for start, stop in self._spans(len(view)):
            with self.paths[-1].open("ab") as handle:
                handle.write(view[start:stop])
        return len(view)

    def _spans(self, length: int) -> Iterator[tuple[int, int]]:
        start = 0
        while start < length:
            if not self._room:
                self.paths.append(self._folder / f"piece-{len(self.paths):05d}")
                self.paths[-1].write_bytes(b"")
                self._room = self._size
            stop = min(length, start + self._room)
            yield start, stop
            self._room -= stop - start
            start = stop


def pack(source: Path, pieces: Path, size: int) -> list[Path]:
    """Write the files below a folder into pieces of at most ``size`` bytes. PieceError where pieces are there already."""
    if not source.is_dir():
        raise PieceError(f"{source}: no such folder")
    if not (source / RECIPE).is_file():
        raise PieceError(
            f"{source / RECIPE}: no such file, so this is no complete data of a tier; make it by flops_to_accuracy.py --data-only"
        )
    links = [path for path in source.rglob("*") if path.is_symlink()]
    if links:
        raise PieceError(f"{links[0]}: a link, which cannot be carried; pack a folder that holds the files themselves")
    if pieces.exists():
        raise PieceError(f"{pieces}: is there already; remove it, or name another folder")
    pieces.mkdir(parents=True)
    cut = _Cut(pieces, size)
    with (
        zstandard.ZstdCompressor(level=LEVEL, threads=-1).stream_writer(cast(IO[bytes], cut), closefd=False) as compressed,
        tarfile.open(fileobj=compressed, mode="w|") as tar,
    ):
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            tar.add(path, arcname=str(path.relative_to(source)))
    artifact.write_json(pieces / LIST, {path.name: artifact.digest_of(path) for path in cut.paths})
    return cut.paths


def unpack(pieces: Path, target: Path) -> None:
    """Make the folder that was packed. PieceError where it is there, or a piece is missing or damaged."""
    if target.exists():
        raise PieceError(f"{target}: is there already")
    if not (pieces / LIST).is_file():
        raise PieceError(f"{pieces / LIST}: no such file; bring all that `pieces.py pack` wrote")
    try:
        known = artifact.read_json(pieces / LIST)
    except artifact.ArtifactError as error:
        raise PieceError(str(error)) from error
    if not (isinstance(known, dict) and known):
        raise PieceError(f"{pieces / LIST}: found no names and digests of pieces; bring it again")
    for name, digest in known.items():
        if not (pieces / name).is_file() or artifact.digest_of(pieces / name) != digest:
            raise PieceError(f"{pieces / name}: missing or damaged; bring it again")
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        with _joined([pieces / name for name in sorted(known)]) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            tar.extractall(part, filter="data")
    except (tarfile.TarError, zstandard.ZstdError) as error:
        shutil.rmtree(part)
        raise PieceError(f"{pieces}: {error}; pack them again") from error
    shutil.copy(pieces / LIST, part / LIST)
    part.rename(target)


class _Chain(io.RawIOBase):
    """Files read as one."""

    def __init__(self, paths: list[Path]) -> None:
        super().__init__()
        self._left, self._open = list(reversed(paths)), io.BytesIO()  # type: tuple[list[Path], io.BufferedIOBase]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        while True:
            count = self._open.readinto(buffer)  # type: ignore[arg-type]
            if count or not self._left:
                return count
            self._open.close()
            self._open = self._left.pop().open("rb")


@contextmanager
def _joined(paths: list[Path]) -> Iterator[zstandard.ZstdDecompressionReader]:
    with io.BufferedReader(_Chain(paths)) as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
        yield stream


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["pack", "unpack"])
    parser.add_argument("source", type=Path, help="the folder, or its pieces")
    parser.add_argument("target", type=Path, help="where the pieces, or the folder, go")
    parser.add_argument("--mib", type=int, default=40, help="size of a piece")
    options = parser.parse_args(arguments)
    if options.mib < 1:
        parser.error(f"--mib: found {options.mib}, expected at least 1")
    try:
        if options.verb == "pack":
            made = pack(options.source, options.target, options.mib << 20)
            print(f"{len(made)} pieces, {sum(path.stat().st_size for path in made) / 2**20:.1f} MiB")
        else:
            unpack(options.source, options.target)
    except PieceError as error:
        print(f"pieces: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
