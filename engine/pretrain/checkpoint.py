"""Checkpoints: DeepSpeed's own folder, a Hugging Face export, and ``state/``, which any other step can read.

``state/`` holds fp32 weights and both AdamW moments by parameter name, whatever the world size and ZeRO stage were. DeepSpeed's
own files are pickles: they are loaded only after their hashes match the manifest, and a checkpoint folder is trusted input.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mates.engine.data.index import load_array
from mates.engine.pretrain.reshape import read_universal, write_universal
from mates.engine.pretrain.trainer import Trainer, weight_decay_of
from mates.engine.progress import say
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, Cost, Manifest, Request

DEEPSPEED, EXPORT, STATE = "deepspeed", "hf", "state"
TAG = "checkpoint"
LOSSES = "losses.npy"
SHARD_BYTES = 2 << 30
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


def save(
    request: Request,
    trainer: Trainer,
    *,
    progress: Progress,
    losses: npt.NDArray[np.float64],
    next_lr: float,
    cost: Cost,
    tokenizer_files: Sequence[Path] = (),
) -> Manifest:
    """Write a checkpoint: all ranks take part, rank 0 commits. The kind ``checkpoint`` also gets ``hf/`` and ``state/``.

    Args:
        losses: [stage steps so far], mean loss of each optimizer step in nats.
        next_lr: learning rate that the schedule gives to the step after this checkpoint; probes take it.
        tokenizer_files: copied into ``hf/``, so that the export can be used by itself.
    """
    world, directory = trainer.world, request.directory
    world.same(lambda: shutil.rmtree(directory, ignore_errors=True))
    directory.mkdir(parents=True, exist_ok=True)
    whole = request.kind == "checkpoint"
    info: dict[str, Any] = asdict(progress) | {"ranks": world.size, "zero_stage": trainer.config.zero_stage}
    with _explained(directory):
        trainer.engine.save_checkpoint(str(directory / DEEPSPEED), tag=TAG, client_state={"step": progress.step})
        if whole:
            optimizer, weights = export_state(directory, trainer, next_lr)
            info["optimizer"] = optimizer
            if world.first:
                _write_export(directory / EXPORT, trainer, weights, tokenizer_files)

    def commit() -> Manifest:
        with artifact.atomic_file(directory / LOSSES) as handle:
            np.save(handle, losses, allow_pickle=False)
        names = [str(path.relative_to(directory)) for path in (directory / STATE).glob("*.safetensors")] + [LOSSES] if whole else None
        return request.commit(info=info, cost=cost, identity=names)

    world.barrier()
    result: Manifest = world.same(commit)
    return result


@contextlib.contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """PyTorch and safetensors speak of broken streams when a disk is full; say what it is."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(directory).free
        if free < 1 << 20:
            raise ArtifactError(
                f"{directory}: the disk is full ({free:,} bytes free); earlier checkpoints are untouched. Make space and run the step again"
            ) from error
        raise


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


def _write_export(directory: Path, trainer: Trainer, weights: dict[str, torch.Tensor], tokenizer_files: Sequence[Path]) -> None:
    """Write ``hf/``: the fp32 master weights, a configuration that says so, and the tokenizer."""
    module = trainer.engine.module
    module.save_pretrained(directory, state_dict=weights)
    config = copy.deepcopy(module.config)
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


def load(directory: Path, trainer: Trainer, kind: str) -> Manifest:
    """Restore the engine from a checkpoint whose every file has been hashed against the manifest. All ranks take part.

    One of another number of ranks or ZeRO stage is converted beside it first, which takes as much space again for a while.

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
        _load_reshaped(directory, trainer, *saved_by)
    trainer.updates = int(manifest.info["updates"])
    return manifest


def _load_reshaped(directory: Path, trainer: Trainer, ranks: int, zero_stage: int) -> None:
    """Restore a checkpoint of other ranks or another ZeRO stage."""
    world, config = trainer.world, trainer.config
    folder = directory.with_name(f".{directory.name}.universal")

    def convert() -> None:
        say(f"{directory}: saved by {ranks} ranks with ZeRO-{zero_stage}; converting for {world.size} with ZeRO-{config.zero_stage}")
        shutil.rmtree(folder, ignore_errors=True)
        with _explained(directory):
            write_universal(
                directory / DEEPSPEED / TAG,
                folder,
                zero_stage=zero_stage,
                groups=trainer.group_shapes,
                clip_norm=config.clip_norm,
            )

    world.same(convert)
    read_universal(folder, trainer.engine, zero_stage=config.zero_stage)
    world.barrier()
    world.same(lambda: shutil.rmtree(folder))


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
