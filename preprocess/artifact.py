"""What every step leaves on disk: a folder of files with a manifest that is written last.

The protocol, in three rules:

1. A file appears under its final name only when it is whole (temporary name, fsync, rename).
2. ``manifest.json`` is written after all files it names. No manifest, no artifact.
3. A reader checks kind, sizes and recorded fingerprints when it opens an artifact; contents are hashed by :func:`verify`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

MANIFEST_NAME = "manifest.json"
FORMAT = 1

Json = Any  # what json.loads returns; narrowed where it is read


class ArtifactError(ValueError):
    """An artifact is missing, incomplete, damaged or of another kind. The message says which and what to do."""


class ArtifactMismatchError(ArtifactError):
    """A complete artifact stands where another was asked for: made from other inputs or with other settings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a step took. ``flops`` are floating-point operations by the ledger's formulas; ``seconds`` are wall-clock
    seconds of the step's own work; ``tokens`` are the tokens it read."""

    flops: float = 0.0
    seconds: float = 0.0
    tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """Size in bytes and SHA-256 (hex) of one file of an artifact."""

    bytes: int
    sha256: str


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
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that becomes ``path`` when the block ends without an exception, and is removed otherwise.

    A reader sees the old file or the whole new one. When the disk is full the error says so and ``path`` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent).free
            raise ArtifactError(
                f"{path}: the disk is full ({free:,} bytes free); nothing was changed. Make space and run the step again."
            ) from error
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_json(path: Path, value: Json) -> None:
    """Write ``value`` as indented JSON with sorted keys, atomically. NaN and infinities are refused (ValueError)."""
    data = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    with atomic_file(path) as handle:
        handle.write(data.encode())


def read_json(path: Path) -> Json:
    """Read a JSON file; an unreadable one raises ArtifactError naming it."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path}: cannot be read as JSON: {error}") from error


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's contents, hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fingerprint_of(value: Json) -> str:
    """SHA-256 (hex) of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


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
    """
    names = sorted(files) if files is not None else sorted(_files_below(directory))
    records = {}
    for name in names:
        path = directory / name
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
        records[name] = FileRecord(bytes=path.stat().st_size, sha256=sha256_file(path))
    identity_names = sorted(identity) if identity is not None else names
    manifest = Manifest(
        kind=kind,
        fingerprint=fingerprint_of([kind, [(name, records[name].sha256) for name in identity_names]]),
        settings=normalise(dict(settings)),
        inputs=dict(inputs),
        info=normalise(dict(info)),
        files=records,
        cost=cost,
    )
    write_json(directory / MANIFEST_NAME, asdict(manifest))
    return manifest


def _files_below(directory: Path) -> list[str]:
    return [
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file() and path.name != MANIFEST_NAME and not path.name.endswith(".tmp")
    ]


def load(directory: Path, kind: str | None = None) -> Manifest:
    """Read an artifact's manifest and check kind and file sizes.

    Raises:
        ArtifactError: no manifest (the step did not finish), another kind, or a file that is missing or of another size.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        wanted = f"{kind} " if kind else ""
        raise ArtifactError(f"{directory}: no complete {wanted}artifact here ({MANIFEST_NAME} is missing); run the step that makes it")
    raw = read_json(path)
    try:
        manifest = Manifest(
            kind=raw["kind"],
            fingerprint=raw["fingerprint"],
            settings=raw["settings"],
            inputs=raw["inputs"],
            info=raw["info"],
            files={name: FileRecord(**record) for name, record in raw["files"].items()},
            cost=Cost(**raw["cost"]),
            format=raw["format"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: not a manifest of this program ({error!r})") from error
    if not (isinstance(manifest.kind, str) and isinstance(manifest.fingerprint, str) and manifest.files):
        raise ArtifactError(f"{path}: not a manifest of this program (kind, fingerprint or files are missing)")
    if not all(isinstance(value, Mapping) for value in (manifest.settings, manifest.inputs, manifest.info)):
        raise ArtifactError(f"{path}: not a manifest of this program (settings, inputs and info are JSON objects)")
    if not all(isinstance(value, int | float) for value in (manifest.cost.flops, manifest.cost.seconds, manifest.cost.tokens)):
        raise ArtifactError(f"{path}: not a manifest of this program (cost holds numbers)")
    if manifest.format != FORMAT:
        raise ArtifactError(f"{path}: format {manifest.format}, this version reads {FORMAT}")
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


def verify(directory: Path, kind: str | None = None) -> Manifest:
    """:func:`load`, and also hash every file against the manifest. ArtifactError names the first file that differs."""
    manifest = load(directory, kind)
    for name, record in manifest.files.items():
        found = sha256_file(directory / name)
        if found != record.sha256:
            raise ArtifactError(f"{directory / name}: SHA-256 {found}, the manifest says {record.sha256}; the file was changed")
    return manifest


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
