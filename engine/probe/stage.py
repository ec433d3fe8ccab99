"""The probe step: oracle influences of a random part of the pool, on the checkpoint before a stage, as a labels artifact."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mates.engine.chunks import run_chunks
from mates.engine.config import Recipe, ReferenceConfig, TaskConfig, require
from mates.engine.data.corpus import Corpus, open_corpus
from mates.engine.distributed import World
from mates.engine.flops import decoder_forward, decoder_training
from mates.engine.layout import layout_of
from mates.engine.pretrain import checkpoint
from mates.engine.pretrain.model import build_empty, build_uninitialised, model_config, padded_vocabulary, reset_at_documents
from mates.engine.pretrain.shapes import resolve_shape
from mates.engine.probe.fidelity import Fidelity, Interval, cheapest, fidelity_of, interval, reliability, shown
from mates.engine.probe.methods import make_setting
from mates.engine.probe.prober import ESTIMATES, Probed, Prober
from mates.engine.probe.shards import Rows, Shards
from mates.engine.progress import say
from mates.engine.random import KeyedPermutation
from mates.engine.reference.batches import label_batches
from mates.engine.reference.task import Reference, open_references, reference_folders, reference_weights
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, Cost, Manifest, Request

LABELS_FILE, FIDELITY_FILE = "labels.parquet", "fidelity.parquet"
NOT_IN_CHUNKS = ("method", "fidelity_samples", "min_fidelity")
"""Settings of the probe that say which samples are probed by what, and change nothing about a sample's influence."""
COMPARISON = "comparing methods"
LOW_RELIABILITY = 0.8
DTYPES = {"bf16": torch.float32, "fp32": torch.float32, "fp64": torch.float64}
"""Of weights, moments and losses, by ``probe.precision``."""


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


def calibration_ids(recipe: Recipe, pool_samples: int, stage: int) -> npt.NDArray[np.int64]:
    """Ids of the pool samples that means are taken over: others than are probed, as far as the pool has them.

    A method that is compared with exact influences on its own calibration samples looks better than it is.
    """
    wanted = min(recipe.probe.calibration_samples, pool_samples)
    stop = min(pool_samples, recipe.probe.samples + wanted)
    return KeyedPermutation(pool_samples, recipe.seed, "probe", stage)(np.arange(stop - wanted, stop))


def probe_flops(
    recipe: Recipe, vocab_size: int, references: Sequence[tuple[int, int, int]], samples: int, method: str | None = None
) -> float:
    """FLOPs of probing: each sample by its method, the samples that are compared by all of them, what the methods need beforehand, and
    the decay branch where its end is probed.

    Args:
        recipe: the recipe. vocab_size: entries of the tokenizer's vocabulary.
        references: items, tokens and label tokens of each.
        samples: how many are probed. method: what ``auto`` came to; ``linear`` where that is not known yet.
    """
    probe, length = recipe.probe, recipe.pretrain.sequence_length
    shape, rows = resolve_shape(recipe.model), padded_vocabulary(vocab_size, recipe.model.vocab_multiple)
    step = decoder_training(shape, rows, tokens=length, length=length)
    forward = part = 0.0
    for items, tokens, labels in references:
        one = decoder_forward(shape, rows, tokens=tokens, length=tokens / items, logit_tokens=labels)
        forward, part = forward + one, part + one * min(1.0, probe.subset_items / items)
    pass_ = 2 * shape.matmul_parameters(rows) * length
    each = {
        "exact": step + forward,
        "linear": step + pass_,  # a training step's own pass over the gradients makes the norms, another one the dots
        "centred": step + pass_,
        "frozen": step + pass_,
        "corrected": step + part + pass_,
    }
    method = method or ("linear" if probe.method == "auto" else probe.method)
    gradient, means = 3 * forward, probe.calibration_samples * step
    before = {
        "exact": forward,
        "linear": gradient,
        "centred": means + gradient,
        "frozen": means + gradient,
        "corrected": gradient + 4 * part,
    }
    compared = (
        min(probe.fidelity_samples, samples) * sum(each.values()) + sum(before.values()) if probe.fidelity_samples else before[method]
    )
    branch = recipe.evaluate.decay_steps * recipe.pretrain.batch_size * step if probe.after_decay else 0.0
    return samples * each[method] + compared + branch


def probe_request(recipe: Recipe, method: str, stage: int) -> Request:
    """The labels that choose the data of ``stage``."""
    layout = layout_of(recipe)
    settings = asdict(recipe.probe) | {
        "stage": stage,
        "seed": recipe.seed,
        "sequence_length": recipe.pretrain.sequence_length,
    }
    for name in ("chunk_size", "shard_over", "every"):  # these say who works and when, not on what
        settings.pop(name)
    tasks: list[ReferenceConfig | TaskConfig] = [recipe.reference, *recipe.reference.more]
    whole = [task.name for task in tasks if task.loss_over == "passage"]
    if whole:  # what is not asked for is not named: labels from before it could be are still found
        settings["over_passages"] = whole
    inputs = {
        "checkpoint": artifact.load(layout.probed(method, stage, after_decay=recipe.probe.after_decay)).fingerprint,
        "pool": artifact.load(layout.corpus("pool"), "corpus").fingerprint,
    }
    for folder in reference_folders(recipe):
        reference = artifact.load(folder, "reference")
        inputs[f"reference.{reference.settings['name']}"] = reference.fingerprint
    return Request(directory=layout.labels(method, stage), kind="labels", settings=settings, inputs=inputs)


def probe_stage(recipe: Recipe, world: World, method: str, stage: int) -> Manifest:
    """Probe the checkpoint of ``stage`` − 1 for the selection of ``stage``."""
    request: Request = world.same(lambda: probe_request(recipe, method, stage))
    done: Manifest | None = world.same(request.find)
    if done:
        return done
    team = recipe.probe.shard_over
    require(world.size % team == 0, "probe.shard_over", team, f"a divisor of the number of processes, {world.size}")
    started = time.perf_counter()
    layout = layout_of(recipe)
    parent = layout.probed(method, stage, after_decay=recipe.probe.after_decay)
    pool = open_corpus(layout.corpus("pool"), recipe.pretrain.sequence_length)
    references = open_references(recipe)
    ids = probed_samples(recipe, pool.samples, stage)
    job = _Job(
        recipe=recipe,
        world=world,
        request=request,
        pool=pool,
        names=[reference.name for reference in references],
        prober=open_prober(recipe, parent, pool, references, stage, world),
        label=f"probe {method} stage {stage}",
    )
    seconds, report = job.compare(np.sort(ids[: recipe.probe.fidelity_samples]), started) if recipe.probe.fidelity_samples else (0.0, {})
    by = report.get("method", recipe.probe.method)
    seconds += job.run("parts", np.sort(ids), [by], started=time.perf_counter() if report else started)
    baseline = job.prober.exact.baseline.means.tolist()
    branch = artifact.load(parent).info["branch"]["seconds"] if recipe.probe.after_decay else 0.0
    cost = Cost(
        flops=probe_flops(recipe, pool.info("tokenizer")["vocab_size"], [one.sizes for one in references], len(ids), by),
        seconds=seconds + branch,
        tokens=len(ids) * recipe.pretrain.sequence_length,
    )
    result: Manifest = world.same(lambda: job.commit(ids, by, report, baseline, cost))
    return result


def open_prober(recipe: Recipe, parent: Path, pool: Corpus, references: Sequence[Reference], stage: int, world: World) -> Prober:
    """The methods at a checkpoint, on this rank's device."""
    probe, device = recipe.probe, world.device
    dtype = DTYPES[probe.precision]
    vocabulary = pool.info("tokenizer")
    config = model_config(
        resolve_shape(recipe.model),
        padded_vocabulary(vocabulary["vocab_size"], recipe.model.vocab_multiple),
        vocabulary["end_of_document"],
    )
    world.same(lambda: artifact.verify(parent, below=f"{checkpoint.STATE}/"))
    shards = None
    if probe.shard_over > 1:
        rows = Rows(world.rank % probe.shard_over, probe.shard_over)
        state, _ = checkpoint.read_state(parent, dtype=dtype, device=device, bounds=rows.bounds)
        model = build_empty(config, dtype, device)
        shards = Shards(model, rows, world.team(probe.shard_over))
    else:
        state, _ = checkpoint.read_state(parent, dtype=dtype, device=device)
        model = build_uninitialised(config).to(device=device, dtype=dtype)
    if recipe.pretrain.reset_at_documents:
        reset_at_documents(model, vocabulary["end_of_document"])
    batches = [label_batches(one, batch_tokens=probe.reference_batch_tokens, device=device) for one in references]
    subset = [
        label_batches(one, batch_tokens=probe.reference_batch_tokens, device=device, items=_subset(recipe, one.items, stage))
        for one in references
    ]
    known = pool.windows(np.sort(calibration_ids(recipe, pool.samples, stage)))
    calibration = [
        torch.from_numpy(known[start : start + probe.micro_batch_size]).to(device) for start in range(0, len(known), probe.micro_batch_size)
    ]
    setting = make_setting(
        model,
        state,
        batches,
        calibration,
        generic=probe.generic,
        shards=shards,
        products=torch.bfloat16 if probe.precision == "bf16" else None,
    )
    return Prober(setting, subset, probe.micro_batch_size)


def _subset(recipe: Recipe, items: int, stage: int) -> npt.NDArray[np.int64]:
    return KeyedPermutation(items, recipe.seed, "probe-subset", stage)(np.arange(min(items, recipe.probe.subset_items)))


@dataclass(frozen=True, kw_only=True)
class _Job:
    """The probing of one checkpoint."""

    recipe: Recipe
    world: World
    request: Request
    pool: Corpus
    names: list[str]
    prober: Prober
    label: str

    def run(self, folder: str, ids: npt.NDArray[np.int64], methods: Sequence[str], *, started: float, halves: bool = False) -> float:
        """Probe samples by some methods into chunk files of ``folder``; seconds from ``started`` on, earlier attempts included.

        Samples are taken in the order of their ids, so that a chunk, in which micro-batches form, is the same however they were asked for.
        """
        size = self.recipe.probe.chunk_size

        def make(number: int, path: Path) -> None:
            own = ids[number * size : (number + 1) * size]
            probed = self.prober.probe(self.pool.windows(own), methods, halves=halves)
            self._refuse_broken(probed)
            if self.world.rank % self.recipe.probe.shard_over == 0:
                with artifact.atomic_file(path) as handle:
                    pq.write_table(_table(own, probed, self.names), handle)

        return run_chunks(
            self.request.directory / folder,
            plan={
                "settings": {name: value for name, value in self.request.settings.items() if name not in NOT_IN_CHUNKS},
                "inputs": self.request.inputs,
                "chunk_size": size,
                "methods": list(methods),
            },
            chunks=-(-len(ids) // size),
            file_name=_part_name,
            make=make,
            world=self.world,
            label=f"{self.label}: {COMPARISON}" if halves else self.label,
            started=started,
            team=self.recipe.probe.shard_over,
        )

    def _refuse_broken(self, probed: Probed) -> None:
        """Nothing is kept of a state that gives influences which are not finite."""
        broken = sum(int((~np.isfinite(values)).sum()) for values in probed.influences.values())
        if broken:
            checkpoint_of = self.request.inputs["checkpoint"][:12]
            raise ArtifactError(
                f"{self.label}: {broken} influences of the first samples that were probed now are not finite; the checkpoint "
                f"{checkpoint_of} or its optimizer state holds numbers that are not finite, or too large for {self.recipe.probe.precision}"
            )

    def compare(self, ids: npt.NDArray[np.int64], started: float) -> tuple[float, dict[str, Any]]:
        """Seconds from ``started`` on; the fidelity of every method on these samples, and the method that labels are taken by."""
        seconds = self.run("fidelity", ids, [*ESTIMATES, "sgd", "exact"], started=started, halves=True)
        report: dict[str, Any] = self.world.same(lambda: self._report(_joined(self.request.directory / "fidelity", ids)))
        return seconds, report

    def _report(self, table: pa.Table) -> dict[str, Any]:
        probe, seed = self.recipe.probe, self.recipe.seed
        found: dict[str, list[Fidelity]] = {method: [] for method in (*ESTIMATES, "sgd")}
        oracle = []
        for name in self.names:
            exact = table[f"exact.{name}"].to_numpy()
            oracle.append(interval(reliability, table[f"exact_even.{name}"].to_numpy(), table[f"exact_odd.{name}"].to_numpy(), seed))
            for method, row in found.items():
                row.append(fidelity_of(table[f"{method}.{name}"].to_numpy(), exact, seed))
        chosen = cheapest(ESTIMATES, found, probe.min_fidelity, "exact") if probe.method == "auto" else probe.method
        for line in _lines(found, oracle, self.names, table.num_rows):
            say(line)
        if probe.method == "auto":
            say(f"probe: auto takes {chosen}, the cheapest method whose Spearman is at least {probe.min_fidelity} with 95% confidence")
        return {
            "method": chosen,
            "samples": table.num_rows,
            "methods": {method: {name: one.as_json() for name, one in zip(self.names, row, strict=True)} for method, row in found.items()},
            "reliability": {name: one and asdict(one) for name, one in zip(self.names, oracle, strict=True)},
        }

    def commit(self, ids: npt.NDArray[np.int64], by: str, report: Mapping[str, Any], baseline: Sequence[float], cost: Cost) -> Manifest:
        """Write the labels in probing order, and the comparison."""
        directory, parts = self.request.directory, self.request.directory / "parts"
        sorted_ids = np.sort(ids)
        table = _joined(parts, sorted_ids).take(pa.array(np.searchsorted(sorted_ids, ids)))
        columns = {influence_column(name): table[f"{by}.{name}"].to_numpy() for name in self.names}
        labels = pa.table(
            {"sample_id": ids}
            | columns
            | {f"baseline_loss_nats.{name}": [value] * len(ids) for name, value in zip(self.names, baseline, strict=True)}
            | {name: table[name] for name in ("sample_loss_nats", "grad_norm")}
            | {"method": [by] * len(ids)}
        )
        files = [LABELS_FILE]
        with artifact.atomic_file(directory / LABELS_FILE) as handle:
            pq.write_table(labels, handle)
        if report:
            compared = np.sort(ids[: self.recipe.probe.fidelity_samples])
            with artifact.atomic_file(directory / FIDELITY_FILE) as handle:
                pq.write_table(_joined(directory / "fidelity", compared), handle)
            files.append(FIDELITY_FILE)
        influences = {
            name: {
                "baseline_loss_nats": loss,
                "mean_nats": float(columns[influence_column(name)].mean()),
                "sd_nats": float(columns[influence_column(name)].std()),
                "helpful_share": float((columns[influence_column(name)] < 0).mean()),
            }
            for name, loss in zip(self.names, baseline, strict=True)
        }
        info = {"samples": len(ids), "method": by, "references": self.names, "influences": influences}
        if report:
            info["fidelity"] = report
        manifest = self.request.commit(info=info, cost=cost, files=files)
        for folder in ("parts", "fidelity"):
            shutil.rmtree(directory / folder, ignore_errors=True)
        for name, one in influences.items():
            helpful = f"{100 * one['helpful_share']:.0f}% of the samples lower its loss"
            say(f"probe: {name}: {len(ids)} influences by {by}, mean {one['mean_nats']:+.2e} nats, SD {one['sd_nats']:.2e}, {helpful}")
        return manifest


def _part_name(number: int) -> str:
    return f"part-{number:06d}.parquet"


def _table(ids: npt.NDArray[np.int64], probed: Probed, names: Sequence[str]) -> pa.Table:
    columns: dict[str, Any] = {"sample_id": ids}
    for method, values in probed.influences.items():
        columns |= {f"{method}.{name}": values[:, number] for number, name in enumerate(names)}
    if probed.halves is not None:
        for half, kind in enumerate(("even", "odd")):
            columns |= {f"exact_{kind}.{name}": probed.halves[:, number, half] for number, name in enumerate(names)}
    return pa.table(columns | {"sample_loss_nats": probed.losses, "grad_norm": probed.norms})


def _joined(folder: Path, ids: npt.NDArray[np.int64]) -> pa.Table:
    tables = []
    for path in sorted(folder.glob("part-*.parquet")):
        try:
            tables.append(pq.read_table(path))
        except pa.ArrowInvalid as error:
            path.unlink()
            raise ArtifactError(f"{path}: not readable ({error}) and removed; run the same command again, which makes it anew") from error
    table = pa.concat_tables(tables)
    if table["sample_id"].to_numpy().tolist() != ids.tolist():
        raise ArtifactError(
            f"{folder}: the parts hold {table.num_rows} samples, not the {len(ids)} asked for; remove {folder} and probe again"
        )
    return table


def _lines(found: Mapping[str, Sequence[Fidelity]], oracle: Sequence[Interval | None], names: Sequence[str], samples: int) -> Iterator[str]:
    for number, name in enumerate(names):
        yield f"probe: {name}: agreement with exact influences on {samples} samples (their own reliability: {shown(oracle[number])})"
        if (one := oracle[number]) is None or one.value < LOW_RELIABILITY:
            yield f"probe: WARNING: two halves of {name} rank samples differently: it is too small for what it is asked; give it more items"
        for method, row in found.items():
            yield f"probe:   {method.ljust(9)} Spearman {shown(row[number].spearman)}, Pearson {shown(row[number].pearson)}"


def label_weights(recipe: Recipe) -> dict[str, float]:
    """Weights by which influences on the recipe's reference tasks become one label; tasks that are only measured are left out."""
    names = [recipe.reference.name, *(task.name for task in recipe.reference.more)]
    return {name: weight for name, weight in zip(names, reference_weights(recipe), strict=True) if weight > 0}


def read_labels(directory: Path, weights: Mapping[str, float]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], Manifest]:
    """Sample ids [n] and oracle influences in nats [n] of a labels artifact: the weighted mean over these reference tasks.

    Raises:
        ArtifactError: see :func:`read_influences`.
    """
    ids, values, manifest = read_influences(directory, list(weights))
    return ids, np.average(values, axis=1, weights=list(weights.values())), manifest


def read_influences(directory: Path, names: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], Manifest]:
    """Sample ids [n] and oracle influences in nats [n, R] of a labels artifact, a column for each of these reference tasks.

    Raises:
        ArtifactError: a damaged one, or without one of the tasks.
    """
    manifest = artifact.load(directory, "labels")
    try:
        table = pq.read_table(directory / LABELS_FILE)
        ids, values = table["sample_id"].to_numpy(), [table[influence_column(name)].to_numpy() for name in names]
    except (pa.ArrowInvalid, KeyError) as error:
        columns = ", ".join(map(influence_column, names))
        raise ArtifactError(f"{directory / LABELS_FILE}: {error}; expected columns sample_id and {columns}") from error
    return ids, np.stack(values, axis=1), manifest
