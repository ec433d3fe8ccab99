"""What every step leaves on disk: a folder of files with a manifest that is written last.

The protocol, in three rules:

1. A file appears under its final name only when it is whole (temporary name, fsync, rename).
2. ``manifest.json`` is written after all files it names. No manifest, no artifact.
3. A reader checks kind, sizes and recorded fingerprints when it opens an artifact; contents are hashed by :func:`verify`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from blake3 import blake3

if TYPE_CHECKING:
    import numpy as np

MANIFEST_NAME = "manifest.json"
FORMAT = 3
READ_BYTES = 1 << 20
CHECKSUM = "manifest_blake3"

Json = Any  # what json.loads returns; narrowed where it is read


class ArtifactError(ValueError):
    """An artifact is missing, incomplete, damaged or of another kind. The message says which and what to do."""


class ArtifactMismatchError(ArtifactError):
    """A complete artifact stands where another was asked for: made from other inputs or with other settings."""


class DiskFullError(ArtifactError):
    """A file could not be written for want of space; what stood there before is untouched."""


def is_disk_full(error: BaseException) -> bool:
    """Whether an operating-system error says that the disk, or the user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a step took. ``flops`` are floating-point operations by the ledger's formulas; ``seconds`` are wall-clock
    seconds of the step's own work; ``tokens`` are the tokens it read."""

    flops: float = 0.0
    seconds: float = 0.0
    tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """Size in bytes and BLAKE3 digest (hex) of one file of an artifact.

    A file that several processes wrote in sections is never hashed from end to end: ``sections`` holds the bytes and BLAKE3 of
    each, in order, and ``blake3`` is then the hash of their digests one after the other. So hashing and verifying run in parallel.
    """

    bytes: int
    blake3: str
    sections: tuple[tuple[int, str], ...] = ()

    @classmethod
    def of_sections(cls, sections: Iterable[tuple[int, str]]) -> FileRecord:
        """The record of a file from (bytes, BLAKE3) of its sections; empty ones count for nothing."""
        kept = tuple((size, digest) for size, digest in sections if size)
        total = sum(size for size, _ in kept)
        if len(kept) == 1:
            return cls(bytes=total, blake3=kept[0][1])
        return cls(bytes=total, blake3=blake3(b"".join(bytes.fromhex(digest) for _, digest in kept)).hexdigest(), sections=kept)

    def pieces(self) -> Iterator[tuple[int, int, str]]:
        """What the file is verified by: where each section starts, its bytes and its BLAKE3."""
        start = 0
        for size, digest in self.sections or ((self.bytes, self.blake3),):
            yield start, size, digest
            start += size

    @classmethod
    def from_json(cls, raw: Mapping[str, Json]) -> FileRecord:
        """What a manifest says of a file. TypeError, ValueError or KeyError where it says something else."""
        sections = tuple((int(size), str(digest)) for size, digest in raw.get("sections", ()))
        record = cls(bytes=int(raw["bytes"]), blake3=str(raw["blake3"]), sections=sections)
        if sections and (len(sections) == 1 or cls.of_sections(sections) != record):
            raise ValueError("sections do not add up")
        return record

    def as_json(self) -> dict[str, Json]:
        """For the manifest."""
        return {"bytes": self.bytes, "blake3": self.blake3} | ({"sections": self.sections} if self.sections else {})


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The contents of ``manifest.json``.

    ``settings`` are what the artifact was asked to be, and ``inputs`` the fingerprints of the artifacts that it was made
    from: together they decide whether a step may be skipped. ``info`` holds figures found while making it.
    ``fingerprint`` is a hash of kind and file contents, so equal artifacts have equal fingerprints wherever they were made.
    """

    kind: str
    fingerprint: str
    settings: Mapping[str, Json]
    inputs: Mapping[str, str]
    info: Mapping[str, Json]
    files: Mapping[str, FileRecord]
    cost: Cost = field(default_factory=Cost)
    format: int = FORMAT


# --- files ---------------------------------------------------------------------------------------------------------


def fsync_directory(path: Path) -> None:
    """Make renames inside ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Open a temporary file that becomes ``path`` when the block ends without an exception, and is removed otherwise.

    A reader sees the old file or the whole new one. When the disk is full the error says so and ``path`` is untouched.

    Args:
        path: the file.
        durable: wait for the disk. Without it a crash of the machine may leave a file whose contents are lost: its digest, recorded
            elsewhere, is to be checked by a later process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as handle:
            yield handle
            handle.flush()
            if durable:
                os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            free = shutil.disk_usage(path.parent).free
            raise DiskFullError(
                f"{path}: the disk is full ({free:,} bytes free); nothing was changed. Make space and run the step again."
            ) from error
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_directory(path.parent)


def write_json(path: Path, value: Json) -> None:
    """Write ``value`` as indented JSON with sorted keys, atomically. NaN and infinities are refused (ValueError)."""
    data = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    with atomic_file(path) as handle:
        handle.write(data.encode())


def _end_of_lines(handle: io.FileIO) -> int:
    """Where the last line of a file that is whole ends."""
    end = handle.seek(0, os.SEEK_END)
    while end:
        start = handle.seek(max(0, end - (1 << 12)))
        if (found := handle.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0


def append_line(path: Path, line: str) -> None:
    """Append a line, wholly or not at all: where the disk is full nothing of it stays, and a part of a line that a killed process left is
    cut off first. Several processes may append at the same time. DiskFullError says how much is missing."""
    data = f"{line}\n".encode()
    with path.open("ab+", buffering=0) as handle:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        size = _end_of_lines(handle)
        handle.truncate(size)
        done = 0
        try:
            while done < len(data):  # a write that meets the end of the disk writes what fits, and only the next one fails
                done += handle.write(data[done:])
        except OSError as error:
            handle.truncate(size)
            if is_disk_full(error):
                free = shutil.disk_usage(path.parent).free
                raise DiskFullError(
                    f"{path}: the disk is full: {free:,} bytes free, {len(data):,} are needed for a line. Make space and run the step again"
                ) from error
            raise


def write_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Write an array as ``.npy``, atomically."""
    import numpy as np

    buffer = io.BytesIO()  # straight into a file, numpy would report a full disk by an error without a number
    np.save(buffer, array, allow_pickle=False)
    with atomic_file(path) as handle:
        handle.write(buffer.getbuffer())


def read_json(path: Path) -> Json:
    """Read a JSON file; an unreadable one raises ArtifactError naming it."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise ArtifactError(f"{path}: cannot be read as JSON: {error}") from error


def digest_of(path: Path) -> str:
    """BLAKE3 of a file's contents, hex."""
    with path.open("rb") as handle:
        digest = blake3()
        while data := handle.read(READ_BYTES):
            digest.update(data)
        return digest.hexdigest()


def fingerprint_of(value: Json) -> str:
    """BLAKE3 (hex) of a JSON value in canonical form."""
    return blake3(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


# --- artifacts -----------------------------------------------------------------------------------------------------


def normalise(value: Json) -> Json:
    """What ``value`` becomes after a trip through JSON (tuples to lists, int keys to strings)."""
    return json.loads(json.dumps(value, allow_nan=False))


def commit(
    directory: Path,
    *,
    kind: str,
    settings: Mapping[str, Json],
    inputs: Mapping[str, str],
    info: Mapping[str, Json],
    cost: Cost,
    files: Iterable[str] | None = None,
    identity: Iterable[str] | None = None,
    hashed: Mapping[str, FileRecord] | None = None,
) -> Manifest:
    """Hash the artifact's files and write its manifest, which makes it exist.

    Args:
        directory: the artifact's folder, with all its files under their final names.
        kind: the artifact's kind, one of the words of the documentation (``corpus``, ``labels``, ``scores``…).
        settings: what was asked for. inputs: name → fingerprint of what it was made from. info: figures found.
        cost: what making it took.
        files: paths relative to ``directory``; all files below it by default.
        identity: the files whose contents make up the fingerprint; all of ``files`` by default. A checkpoint names its
            weights and moments here, because pickled files differ between equal checkpoints.
        hashed: records of files that were hashed and made durable while they were written; these are not read again.
    """
    names = sorted(files) if files is not None else sorted(_files_below(directory))
    records = dict(hashed or {})

    def record_of(name: str) -> FileRecord:
        path = directory / name
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
        return FileRecord(bytes=path.stat().st_size, blake3=digest_of(path))

    unknown = [name for name in names if name not in records]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 32)) as pool:
        records |= zip(unknown, pool.map(record_of, unknown), strict=True)
    records = {name: records[name] for name in names}
    identity_names = sorted(identity) if identity is not None else names
    manifest = Manifest(
        kind=kind,
        fingerprint=fingerprint_of([kind, [(name, records[name].blake3) for name in identity_names]]),
        settings=normalise(dict(settings)),
        inputs=dict(inputs),
        info=normalise(dict(info)),
        files=records,
        cost=cost,
    )
    files_json = {name: record.as_json() for name, record in records.items()}
    content = normalise(asdict(manifest) | {"files": files_json})
    write_json(directory / MANIFEST_NAME, content | {CHECKSUM: fingerprint_of(content)})
    return manifest


def _files_below(directory: Path) -> list[str]:
    return [
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file() and path.name != MANIFEST_NAME and not path.name.endswith(".tmp")
    ]


MADE_BY = {
    "sample-corpus": "sample-corpus",
    "tokenizer": "tokenizer",
    "corpus": "preprocess",
    "reference": "reference",
    "selection index": "select",
    "checkpoint": "pretrain",
    "labels": "probe",
    "influence model": "fit",
    "scores": "score",
    "evaluation": "evaluate",
}
"""The verb that makes each kind of artifact."""


def load(directory: Path, kind: str | None = None) -> Manifest:
    """Read an artifact's manifest and check kind and file sizes.

    Raises:
        ArtifactError: no manifest (the step did not finish), another kind, or a file that is missing or of another size.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        wanted = f"{kind} " if kind else ""
        step = f"`mates {MADE_BY[kind]}`" if kind in MADE_BY else "the step that makes it"
        raise ArtifactError(f"{directory}: no complete {wanted}artifact here ({MANIFEST_NAME} is missing); run {step}")
    raw = read_json(path)
    if isinstance(raw, dict) and raw.get("format", FORMAT) != FORMAT:
        raise ArtifactError(f"{path}: format {raw['format']!r}, this version reads {FORMAT}")
    try:
        checksum = raw.pop(CHECKSUM)
        manifest = Manifest(
            kind=raw["kind"],
            fingerprint=raw["fingerprint"],
            settings=raw["settings"],
            inputs=raw["inputs"],
            info=raw["info"],
            files={name: FileRecord.from_json(record) for name, record in raw["files"].items()},
            cost=Cost(**raw["cost"]),
            format=raw["format"],
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ArtifactError(f"{path}: not a manifest of this program ({error!r})") from error
    if not (isinstance(manifest.kind, str) and isinstance(manifest.fingerprint, str) and manifest.files):
        raise ArtifactError(f"{path}: not a manifest of this program (kind, fingerprint or files are missing)")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in manifest.files):
        raise ArtifactError(f"{path}: names files outside its folder")
    if not all(isinstance(value, Mapping) for value in (manifest.settings, manifest.inputs, manifest.info)):
        raise ArtifactError(f"{path}: not a manifest of this program (settings, inputs and info are JSON objects)")
    if not all(isinstance(value, int | float) for value in (manifest.cost.flops, manifest.cost.seconds, manifest.cost.tokens)):
        raise ArtifactError(f"{path}: not a manifest of this program (cost holds numbers)")
    if checksum != fingerprint_of(raw):
        raise ArtifactError(f"{path}: was changed after it was written (its {CHECKSUM} does not fit); remove {directory} to make it anew")
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(f"{directory}: holds a {manifest.kind!r} artifact, expected {kind!r}")
    for name, record in manifest.files.items():
        file = directory / name
        if not file.is_file():
            raise ArtifactError(f"{file}: missing, though {path} lists it; restore it or remove {directory} and run the step again")
        size = file.stat().st_size
        if size != record.bytes:
            raise ArtifactError(
                f"{file}: {size} bytes, the manifest says {record.bytes}; the file was cut or changed. "
                f"Restore it or remove {directory} and run the step again"
            )
    return manifest


def verify(directory: Path, kind: str | None = None, *, below: str = "") -> Manifest:
    """:func:`load`, and also hash every file against the manifest, on all cores. ArtifactError names the first file that differs.

    Args:
        directory, kind: as there.
        below: hash only files whose names begin so.
    """
    manifest = load(directory, kind)
    pieces: list[tuple[Path, int, int, str]] = []
    for name, record in manifest.files.items():
        if name.startswith(below):
            pieces += [(directory / name, *piece) for piece in record.pieces()]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 32)) as pool:
        digests = pool.map(lambda piece: _digest_of_range(*piece[:3]), pieces)
        for (path, start, size, expected), found in zip(pieces, digests, strict=True):
            if found != expected:
                where = "" if size == path.stat().st_size else f" of bytes {start} to {start + size}"
                raise ArtifactError(f"{path}: BLAKE3 {found}{where}, the manifest says {expected}; the file was changed")
    return manifest


def is_as_recorded(path: Path, record: FileRecord) -> bool:
    """Whether a file is there and holds what its record says."""
    if not path.is_file() or path.stat().st_size != record.bytes:
        return False
    return all(_digest_of_range(path, start, size) == digest for start, size, digest in record.pieces())


def _digest_of_range(path: Path, start: int, size: int) -> str:
    digest = blake3()
    with path.open("rb") as handle:
        handle.seek(start)
        while size and (data := handle.read(min(size, READ_BYTES))):
            digest.update(data)
            size -= len(data)
    return digest.hexdigest()


def find_complete(directory: Path, *, kind: str, settings: Mapping[str, Json], inputs: Mapping[str, str]) -> Manifest | None:
    """The manifest of a complete artifact that fits, or None where there is none yet.

    Raises:
        ArtifactMismatchError: a complete artifact stands there, but its settings or inputs are not the ones asked for.
            Nothing is overwritten: the message names each difference and what to do.
        ArtifactError: the artifact is damaged.
    """
    if not (directory / MANIFEST_NAME).is_file():
        return None
    manifest = load(directory, kind)
    differences = differing(manifest.settings, normalise(dict(settings))) + differing(manifest.inputs, dict(inputs), "input ")
    if differences:
        raise ArtifactMismatchError(
            f"{directory}: a complete {kind} artifact is here, made with\n  "
            + "\n  ".join(differences)
            + f"\nRestore the old values, choose another run_dir, or remove {directory} to make it anew."
        )
    return manifest


def finished(directory: Path, kind: str) -> Manifest | None:
    """The manifest of a complete artifact, whatever it was made with; None where there is none."""
    return load(directory, kind) if (directory / MANIFEST_NAME).is_file() else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """An artifact that a step is asked for: where, what, with which settings, from which inputs (name → fingerprint)."""

    directory: Path
    kind: str
    settings: Mapping[str, Json]
    inputs: Mapping[str, str]

    def find(self) -> Manifest | None:
        """See :func:`find_complete`."""
        return find_complete(self.directory, kind=self.kind, settings=self.settings, inputs=self.inputs)

    def commit(
        self,
        *,
        info: Mapping[str, Json],
        cost: Cost,
        files: Iterable[str] | None = None,
        identity: Iterable[str] | None = None,
        hashed: Mapping[str, FileRecord] | None = None,
    ) -> Manifest:
        """See :func:`commit`."""
        return commit(
            self.directory,
            kind=self.kind,
            settings=self.settings,
            inputs=self.inputs,
            info=info,
            cost=cost,
            files=files,
            identity=identity,
            hashed=hashed,
        )


def unmake(directory: Path) -> None:
    """Remove an artifact's manifest, so that rewriting its files can never leave a manifest that speaks of others."""
    (directory / MANIFEST_NAME).unlink(missing_ok=True)


def differing(found: Json, asked: Json, prefix: str = "") -> list[str]:
    """Readable lines, one for each leaf where two JSON values differ."""
    if isinstance(found, Mapping) and isinstance(asked, Mapping):
        lines = []
        for key in sorted({*found, *asked}):
            if key not in found:
                lines.append(f"{prefix}{key}: not set, now asked {_short(asked[key])}")
            elif key not in asked:
                lines.append(f"{prefix}{key}: {_short(found[key])}, now not asked for")
            else:
                both = isinstance(found[key], Mapping) and isinstance(asked[key], Mapping)
                inner = f"{prefix}{key}." if both else f"{prefix}{key}"
                lines.extend(differing(found[key], asked[key], inner))
        return lines
    return [] if found == asked else [f"{prefix}: {_short(found)}, now asked {_short(asked)}"]


def _short(value: Json) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
