"""Checkpoints: DeepSpeed's own folder, a Hugging Face export, and ``state/``, which any other step can read.

``state/`` holds fp32 weights and both AdamW moments by parameter name, whatever the world size and ZeRO stage were. DeepSpeed's
own files are pickles: they are loaded only after their hashes match the manifest, and a checkpoint folder is trusted input.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mates.engine.data.index import load_array
from mates.engine.pretrain.reshape import read_universal, write_universal
from mates.engine.pretrain.trainer import Trainer, weight_decay_of
from mates.engine.progress import say
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, Cost, DiskFullError, FileRecord, Manifest, Request

DEEPSPEED, EXPORT, STATE = "deepspeed", "hf", "state"
TAG = "checkpoint"
LOSSES = "losses.npy"
SHARD_BYTES = 2 << 30
SMALL_FILES_BYTES = 1 << 17  # scripts, headers, manifest and ends of blocks, when the size of a checkpoint is guessed
KINDS = ("weights", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where training stood: steps of the run and of the stage, and the stage's cost so far.

    ``updates`` optimizer steps of the run were taken; ``skipped`` steps of the stage were not. ``recent_nats`` are the worst rank's losses
    that spikes are told by.
    """

    step: int
    stage_step: int
    seconds: float
    updates: int
    skipped: tuple[int, ...] = ()
    recent_nats: tuple[float, ...] = ()


class Saving:
    """A checkpoint whose files are being written in the background by each rank, out of copies; training may go on meanwhile.

    All ranks make and finish it together. Until it is finished, by rank 0's manifest, it does not exist.
    """

    def __init__(self, request: Request, trainer: Trainer, *, progress: Progress, losses: npt.NDArray[np.float64], cost: Cost) -> None:
        """Copy weights and moments, and begin to write. ``losses`` [stage steps so far]: mean loss of each in nats."""
        self.request, self.trainer, self._losses, self._cost = request, trainer, losses, cost
        world, directory = trainer.world, request.directory
        world.same(lambda: shutil.rmtree(directory, ignore_errors=True))
        self._info = asdict(progress) | {"ranks": world.size, "zero_stage": trainer.config.zero_stage}
        whole = (12 + 4) * _parameters(trainer) if request.kind == "checkpoint" else 0  # state/ and hf/
        with _explained(directory, whole), _kept_in_memory(trainer.engine.checkpoint_engine) as copies:
            directory.mkdir(parents=True, exist_ok=True)
            trainer.engine.save_checkpoint(str(directory / DEEPSPEED), tag=TAG, client_state={"step": progress.step})
        own = torch.tensor(sum(len(data) for _, data in copies), device=world.device)
        self.needed = int(world.total(own)) + whole + SMALL_FILES_BYTES
        """About the bytes of all files."""
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._written = self._writer.submit(_write_copies, directory, copies, self.needed)

    @property
    def is_written(self) -> bool:
        """Whether this rank's files are on disk, or failed to be."""
        return self._written.done()

    def finish(self, info: Mapping[str, Any] | None = None, identity: Sequence[str] | None = None) -> Manifest:
        """Wait for all ranks' files and commit.

        Args:
            info: further figures for the manifest. identity: see :func:`artifact.commit`.

        Raises:
            DiskFullError: naming the bytes that are free and those that are missing, on all ranks.
        """
        world, request = self.trainer.world, self.request

        def commit() -> Manifest:
            with _explained(request.directory, self.needed):
                artifact.write_array(request.directory / LOSSES, self._losses)
                return request.commit(info=self._info | dict(info or {}), cost=self._cost, identity=identity, hashed=hashed)

        try:
            hashed = {name: record for records in world.gathered(self._own_records) for name, record in records.items()}
            manifest: Manifest = world.same(commit)
        except ArtifactError:  # a half one would be in the way of whoever makes space
            world.same(lambda: shutil.rmtree(request.directory, ignore_errors=True))
            raise
        return manifest

    def _own_records(self) -> dict[str, FileRecord]:
        try:
            return self._written.result()
        finally:
            self._writer.shutdown()

    def abandon(self) -> None:
        """Wait for this rank's files, and leave them without a manifest."""
        self._writer.shutdown()


def _parameters(trainer: Trainer) -> int:
    return sum(shape.numel() for group in trainer.group_shapes for shape in group.values())


@contextlib.contextmanager
def _kept_in_memory(writer: Any) -> Iterator[list[tuple[Path, memoryview]]]:
    """Let DeepSpeed's writer of files only give their paths and bytes: each is the file as it will be, so no tensor is held twice."""
    files: list[tuple[Path, memoryview]] = []

    def keep(state_dict: Any, path: str) -> None:
        buffer = io.BytesIO()
        torch.save(state_dict, buffer)
        files.append((Path(path), buffer.getbuffer()))

    writer.save = keep
    try:
        yield files
    finally:
        del writer.save


def _write_copies(directory: Path, files: list[tuple[Path, memoryview]], needed: int) -> dict[str, FileRecord]:
    """Write files durably and hash them; the records by name in the checkpoint, all files of which take about ``needed`` bytes."""
    records = {}
    with _explained(directory, needed):
        while files:
            path, data = files.pop(0)
            with path.open("wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            records[str(path.relative_to(directory))] = FileRecord(bytes=len(data), blake3=blake3(data).hexdigest())
    return records


def save_stage(
    saving: Saving,
    *,
    next_lr: float,
    tokenizer_files: Sequence[Path] = (),
) -> Manifest:
    """Finish the checkpoint of a stage's end, which also gets ``hf/`` and ``state/``: all ranks take part.

    Args:
        saving: begun by all ranks.
        next_lr: learning rate that the schedule gives to the step after this checkpoint; probes take it.
        tokenizer_files: copied into ``hf/``, so that the export can be used by itself.
    """
    directory, trainer = saving.request.directory, saving.trainer
    with _explained(directory, saving.needed):
        optimizer, weights = export_state(directory, trainer, next_lr)
        if trainer.world.first:
            write_export(directory / EXPORT, trainer, weights, tokenizer_files)
    state = [str(path.relative_to(directory)) for path in (directory / STATE).glob("*.safetensors")]
    return saving.finish({"optimizer": optimizer}, [*state, LOSSES])


@contextlib.contextmanager
def _explained(directory: Path, needed: int) -> Iterator[None]:
    """Libraries speak of broken streams when a disk is full; say what it is, and how much is missing of the bytes needed."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, DiskFullError) as error:
        free = shutil.disk_usage(next(path for path in (directory, *directory.parents) if path.exists())).free
        if free >= 1 << 20 and not isinstance(error, DiskFullError) and not artifact.is_disk_full(error):
            raise
        left = max(needed - sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()), 1)
        raise DiskFullError(
            f"{directory}: the disk is full: {free:,} bytes free, about {left:,} are needed for the rest of it. "
            "Earlier checkpoints are untouched; make space and run the same command again"
        ) from error


def export_state(directory: Path, trainer: Trainer, next_lr: float) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Write ``state/`` on rank 0 while all ranks gather.

    Returns:
        What the manifest's ``optimizer`` says, and on rank 0 the fp32 weights by name.
    """
    config, first = trainer.config, trainer.world.first
    writers = {kind: _ShardWriter(directory / STATE, kind) for kind in KINDS}
    weights, decay = {}, {}
    for name, *values in trainer.full_state():
        if first:
            for kind, value in zip(KINDS, values, strict=True):
                writers[kind].add(name, value)
            weights[name] = values[0]
        decay[name] = weight_decay_of(values[0], config)
    if first:
        for writer in writers.values():
            writer.flush()
    optimizer = {
        "t": trainer.updates,
        "next_lr": next_lr,
        "beta1": config.beta1,
        "beta2": config.beta2,
        "eps": config.eps,
        "clip_norm": config.clip_norm,
        "weight_decay": decay,
    }
    return optimizer, weights


def write_export(directory: Path, trainer: Trainer, weights: dict[str, torch.Tensor], tokenizer_files: Sequence[Path]) -> None:
    """Write ``hf/``: the fp32 master weights, a configuration that says so, and the tokenizer."""
    module = trainer.engine.module
    module.generation_config.use_cache = True  # training has no use for a cache, whoever generates has
    module.save_pretrained(directory, state_dict=weights)
    config = copy.deepcopy(module.config)
    config.use_cache = True
    config.dtype = torch.float32  # save_pretrained writes the dtype of training, and loading would round to it
    config.save_pretrained(directory)
    for file in tokenizer_files:
        shutil.copyfile(file, directory / file.name)


class _ShardWriter:
    """Writes tensors of one kind into safetensors files of about 2 GiB, so that no more than that is held."""

    def __init__(self, directory: Path, kind: str) -> None:
        self._directory, self._kind, self._number, self._bytes = directory, kind, 0, 0
        self._held: dict[str, torch.Tensor] = {}

    def add(self, name: str, value: torch.Tensor) -> None:
        self._held[name] = value.contiguous()
        self._bytes += value.numel() * value.element_size()
        if self._bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._held:
            self._directory.mkdir(parents=True, exist_ok=True)
            save_file(self._held, self._directory / f"{self._kind}-{self._number:05d}.safetensors")
        self._held, self._bytes, self._number = {}, 0, self._number + 1


def load(directory: Path, trainer: Trainer, kind: str, beside: Path | None = None) -> Manifest:
    """Restore the engine from a checkpoint whose every file has been hashed against the manifest. All ranks take part.

    One of another number of ranks or ZeRO stage is first converted, ``beside`` the artifact that is made from it, since several jobs may
    start from one checkpoint; by default beside itself. That takes as much space again for a while.

    Raises:
        ArtifactError: damaged, or not a checkpoint of this kind.
    """
    manifest: Manifest = trainer.world.same(lambda: artifact.verify(directory, kind))
    saved_by = manifest.info["ranks"], manifest.info["zero_stage"]
    if saved_by == (trainer.world.size, trainer.config.zero_stage):
        path, client = trainer.engine.load_checkpoint(str(directory / DEEPSPEED), tag=TAG)
        if path is None or client["step"] != manifest.info["step"]:
            raise ArtifactError(f"{directory}: DeepSpeed could not restore step {manifest.info['step']} from it")
    else:
        _load_reshaped(directory, trainer, *saved_by, beside or directory)
    trainer.updates = int(manifest.info["updates"])
    return manifest


def _load_reshaped(directory: Path, trainer: Trainer, ranks: int, zero_stage: int, beside: Path) -> None:
    """Restore a checkpoint of other ranks or another ZeRO stage."""
    world, config = trainer.world, trainer.config
    folder = beside.with_name(f".{beside.name}.universal")

    def convert() -> None:
        say(f"{directory}: saved by {ranks} ranks with ZeRO-{zero_stage}; converting for {world.size} with ZeRO-{config.zero_stage}")
        shutil.rmtree(folder, ignore_errors=True)
        with _explained(folder, 12 * _parameters(trainer) + SMALL_FILES_BYTES):
            write_universal(
                directory / DEEPSPEED / TAG,
                folder,
                zero_stage=zero_stage,
                groups=trainer.group_shapes,
                clip_norm=config.clip_norm,
            )

    world.same_after_long(convert)
    read_universal(folder, trainer.engine, zero_stage=config.zero_stage)
    world.barrier()
    world.same(lambda: shutil.rmtree(folder, ignore_errors=True))


def _rows_of(handle: Any, key: str, bounds: Callable[[int], tuple[int, int]] | None) -> torch.Tensor:
    part = handle.get_slice(key)
    start, stop = bounds(part.get_shape()[0]) if bounds else (0, part.get_shape()[0])
    rows: torch.Tensor = part[start:stop]
    return rows


def read_losses(directory: Path) -> npt.NDArray[np.float64]:
    """Loss of each optimizer step of the stage, in nats: [steps] float64."""
    return np.array(load_array(directory / LOSSES, np.dtype(np.float64), 1))


@dataclass(frozen=True)
class OptimizerState:
    """AdamW's state at a checkpoint, on one device in one dtype. ``t`` optimizer steps have been taken."""

    weights: dict[str, torch.Tensor]
    exp_avg: dict[str, torch.Tensor]
    exp_avg_sq: dict[str, torch.Tensor]
    weight_decay: dict[str, float]
    t: int
    next_lr: float
    beta1: float
    beta2: float
    eps: float
    clip_norm: float


def read_state(
    directory: Path, *, dtype: torch.dtype, device: torch.device, bounds: Callable[[int], tuple[int, int]] | None = None
) -> tuple[OptimizerState, Manifest]:
    """Read ``state/`` of an artifact.

    Args:
        directory: the artifact. dtype, device: of the tensors.
        bounds: first and last (exclusive) row to read of so many; all by default.

    Raises:
        ArtifactError: it has none, or tensors are missing or contradict each other.
    """
    manifest = artifact.load(directory)
    if "optimizer" not in manifest.info:
        raise ArtifactError(f"{directory}: this {manifest.kind} artifact has no {STATE}/ to probe")
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for kind in KINDS:
        files = sorted(name for name in manifest.files if name.startswith(f"{STATE}/{kind}-"))
        tensors[kind] = {}
        for name in files:
            try:
                with safe_open(directory / name, framework="pt") as handle:
                    for key in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                        tensors[kind][key] = _rows_of(handle, key, bounds).to(device=device, dtype=dtype)
            except SafetensorError as error:
                raise ArtifactError(f"{directory / name}: not a readable safetensors file ({error})") from error
    optimizer = manifest.info["optimizer"]
    expected = set(optimizer["weight_decay"])
    for kind, values in tensors.items():
        if set(values) != expected:
            raise ArtifactError(f"{directory / STATE}: {kind} lacks or adds {sorted(expected ^ set(values))[:3]}")
    state = OptimizerState(
        weights=tensors["weights"],
        exp_avg=tensors["exp_avg"],
        exp_avg_sq=tensors["exp_avg_sq"],
        **{key: optimizer[key] for key in ("weight_decay", "t", "next_lr", "beta1", "beta2", "eps", "clip_norm")},
    )
    return state, manifest
