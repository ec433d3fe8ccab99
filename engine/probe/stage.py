"""The probe step: oracle influences of a random part of the pool, on the checkpoint before a stage, as a labels artifact."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mates.engine.chunks import run_chunks
from mates.engine.config import Recipe
from mates.engine.data.corpus import Corpus, open_corpus
from mates.engine.distributed import World
from mates.engine.flops import decoder_forward, decoder_training
from mates.engine.layout import layout_of
from mates.engine.pretrain import checkpoint
from mates.engine.pretrain.model import build_model, model_config, padded_vocabulary
from mates.engine.pretrain.shapes import resolve_shape
from mates.engine.probe.exact import ExactProbe
from mates.engine.progress import say
from mates.engine.random import KeyedPermutation
from mates.engine.reference.batches import label_batches
from mates.engine.reference.task import Reference, open_reference
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, Cost, Manifest, Request

LABELS_FILE = "labels.parquet"
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


def influence_column(reference_name: str) -> str:
    """Name of the column of oracle influences on a reference task."""
    return f"influence_nats.{reference_name}"


def probed_samples(recipe: Recipe, pool_samples: int, stage: int) -> npt.NDArray[np.int64]:
    """Ids of the pool samples probed for a stage, in probing order. ArtifactError where the pool has too few."""
    wanted = recipe.probe.samples
    if pool_samples < wanted:
        raise ArtifactError(
            f"{layout_of(recipe).corpus('pool')}: {pool_samples} samples in the pool, probe.samples asks for {wanted}; "
            f"enlarge corpus.pool_share (now {recipe.corpus.pool_share}) or probe fewer"
        )
    return KeyedPermutation(pool_samples, recipe.seed, "probe", stage)(np.arange(wanted))


def probe_flops(recipe: Recipe, vocab_size: int, reference: Reference | tuple[int, int, int], samples: int) -> float:
    """FLOPs of exact probes: forward and backward of each sample, then a forward pass over the reference, and the baseline once; and
    the decay branch where its end is probed.

    ``reference`` is one, or (items, tokens, label tokens) of one that does not exist yet.
    """
    items, tokens, labels = (
        reference
        if isinstance(reference, tuple)
        else (reference.items, len(reference.tokens), int(reference.manifest.info["label_tokens"]))
    )
    shape, rows = resolve_shape(recipe.model), padded_vocabulary(vocab_size, recipe.model.vocab_multiple)
    length = recipe.pretrain.sequence_length
    step = decoder_training(shape, rows, tokens=length, length=length)
    forward = decoder_forward(shape, rows, tokens=tokens, length=tokens / items, logit_tokens=labels)
    branch = recipe.evaluate.decay_steps * recipe.pretrain.batch_size * step if recipe.probe.after_decay else 0.0
    return samples * (step + forward) + forward + branch


def probe_request(recipe: Recipe, method: str, stage: int) -> Request:
    """The labels that choose the data of ``stage``."""
    layout = layout_of(recipe)
    settings = asdict(recipe.probe) | {
        "stage": stage,
        "seed": recipe.seed,
        "sequence_length": recipe.pretrain.sequence_length,
    }
    settings.pop("chunk_size")
    reference = artifact.load(layout.reference("train"), "reference")
    inputs = {
        "checkpoint": artifact.load(layout.probed(method, stage, after_decay=recipe.probe.after_decay)).fingerprint,
        "pool": artifact.load(layout.corpus("pool"), "corpus").fingerprint,
        f"reference.{reference.settings['name']}": reference.fingerprint,
    }
    return Request(directory=layout.labels(method, stage), kind="labels", settings=settings, inputs=inputs)


def probe_stage(recipe: Recipe, world: World, method: str, stage: int) -> Manifest:
    """Probe the checkpoint of ``stage`` − 1 for the selection of ``stage``."""
    request: Request = world.same(lambda: probe_request(recipe, method, stage))
    done: Manifest | None = world.same(request.find)
    if done:
        return done
    started = time.perf_counter()
    layout = layout_of(recipe)
    parent = layout.probed(method, stage, after_decay=recipe.probe.after_decay)
    pool = open_corpus(layout.corpus("pool"), recipe.pretrain.sequence_length)
    reference = open_reference(layout.reference("train"))
    ids = probed_samples(recipe, pool.samples, stage)
    prober = open_prober(recipe, parent, pool, reference, world.device)
    parts, size = request.directory / "parts", recipe.probe.chunk_size
    seconds = run_chunks(
        parts,
        plan={"settings": request.settings, "inputs": request.inputs, "chunk_size": size},
        chunks=-(-len(ids) // size),
        file_name=_part_name,
        make=lambda number, path: _write_part(path, prober, pool, ids[number * size : (number + 1) * size], reference.name, world),
        world=world,
        label=f"probe {method} stage {stage}",
        started=started,
    )
    branch = artifact.load(parent).info["branch"]["seconds"] if recipe.probe.after_decay else 0.0
    cost = Cost(
        flops=probe_flops(recipe, pool.info("tokenizer")["vocab_size"], reference, len(ids)),
        seconds=seconds + branch,
        tokens=len(ids) * recipe.pretrain.sequence_length,
    )
    result: Manifest = world.same(lambda: _commit(request, parts, prober, ids, reference.name, cost))
    return result


def open_prober(recipe: Recipe, parent: Path, pool: Corpus, reference: Reference, device: torch.device) -> ExactProbe:
    """An exact probe of a checkpoint on a device."""
    dtype = DTYPES[recipe.probe.precision]
    state, _ = checkpoint.read_state(parent, dtype=dtype, device=device)
    vocabulary = pool.info("tokenizer")
    config = model_config(
        resolve_shape(recipe.model),
        padded_vocabulary(vocabulary["vocab_size"], recipe.model.vocab_multiple),
        vocabulary["end_of_document"],
    )
    model = build_model(config, recipe.seed).to(device=device, dtype=dtype)
    batches = label_batches(reference, batch_tokens=recipe.probe.reference_batch_tokens, device=device)
    return ExactProbe(model, state, batches)


def _part_name(number: int) -> str:
    return f"part-{number:06d}.parquet"


def _write_part(path: Path, prober: ExactProbe, pool: Corpus, ids: npt.NDArray[np.int64], reference_name: str, world: World) -> None:
    results = prober.probe_all(pool.windows(ids), world.device)
    table = pa.table(
        {
            "sample_id": ids,
            influence_column(reference_name): [result.influence_nats for result in results],
            "baseline_loss_nats": [prober.baseline_loss_nats] * len(ids),
            "sample_loss_nats": [result.sample_loss_nats for result in results],
            "grad_norm": [result.grad_norm for result in results],
            "method": ["exact"] * len(ids),
        }
    )
    with artifact.atomic_file(path) as handle:
        pq.write_table(table, handle)


def _commit(request: Request, parts: Path, prober: ExactProbe, ids: npt.NDArray[np.int64], reference_name: str, cost: Cost) -> Manifest:
    table = pa.concat_tables(pq.read_table(path) for path in sorted(parts.glob("part-*.parquet")))
    if table["sample_id"].to_numpy().tolist() != ids.tolist():
        raise ArtifactError(
            f"{parts}: the parts hold {table.num_rows} samples, not the {len(ids)} asked for; remove {parts} and probe again"
        )
    values = table[influence_column(reference_name)].to_numpy()
    if not np.isfinite(values).all():
        raise ArtifactError(
            f"{parts}: {int((~np.isfinite(values)).sum())} influences are not finite; the checkpoint or its optimizer state is broken"
        )
    with artifact.atomic_file(request.directory / LABELS_FILE) as handle:
        pq.write_table(table, handle)
    info = {
        "samples": len(ids),
        "mean_nats": float(values.mean()),
        "sd_nats": float(values.std()),
        "helpful_share": float((values < 0).mean()),
        "baseline_loss_nats": prober.baseline_loss_nats,
        "references": [reference_name],
    }
    manifest = request.commit(info=info, cost=cost, files=[LABELS_FILE])
    shutil.rmtree(parts)
    helpful = f"{100 * (values < 0).mean():.0f}% of the samples lower the reference loss"
    say(f"probe: {len(ids)} influences, mean {values.mean():+.2e} nats, SD {values.std():.2e}, {helpful}")
    return manifest


def read_labels(directory: Path, reference_name: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], Manifest]:
    """Sample ids [n] and oracle influences in nats [n] of a labels artifact. ArtifactError for a damaged one."""
    manifest = artifact.load(directory, "labels")
    try:
        table = pq.read_table(directory / LABELS_FILE)
        ids, values = table["sample_id"].to_numpy(), table[influence_column(reference_name)].to_numpy()
    except (pa.ArrowInvalid, KeyError) as error:
        raise ArtifactError(
            f"{directory / LABELS_FILE}: {error}; expected columns sample_id and {influence_column(reference_name)}"
        ) from error
    return ids, values, manifest
