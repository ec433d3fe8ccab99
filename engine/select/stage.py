"""The select step: a stage's selection index."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mates.engine.baselines.duplicates import Duplicates
from mates.engine.config import Recipe
from mates.engine.data.blocks import Blocks, CorpusTooSmallError, make_blocks
from mates.engine.data.corpus import Corpus, open_corpus
from mates.engine.data.index import INDEX_FILE, load_array, write_ids
from mates.engine.distributed import World
from mates.engine.influence.model import joining
from mates.engine.influence.score import Scores, open_scores
from mates.engine.layout import layout_of
from mates.engine.probe.stage import label_weights
from mates.engine.progress import Progress, say
from mates.engine.select.choose import PIECE, Cut, Floats, Ids, find_cut, gumbel_keys
from mates.engine.select.domains import Domains
from mates.engine.select.methods import Rule, needs_scores, rule_of, uses_influences
from mates.preprocess import artifact
from mates.preprocess.artifact import Cost, Manifest, Request
from mates.preprocess.indexed import IndexedWriter

SELECTED_NAME = "selected"
COPIED = 4096  # samples that are copied at a time
LEFT_FILE = "left.npy"
BEHIND = 1e12  # taken off the keys of what a cascade dropped: more than any score over the lowest temperature

Masks = npt.NDArray[np.bool_]


def select_request(recipe: Recipe, method: str, stage: int) -> Request:
    """The selection index of ``stage``."""
    layout, config = layout_of(recipe), recipe.select
    corpus = open_corpus(layout.corpus("train"), recipe.pretrain.sequence_length)
    blocks = make_blocks(recipe, corpus.samples)
    is_scored = needs_scores(method, stage)
    settings: dict[str, Any] = {
        "method": method if is_scored else "random",
        "stage": stage,
        "seed": recipe.seed,
        "samples": recipe.pretrain.steps_per_stage * recipe.pretrain.batch_size,
        "candidates": [blocks.bounds[stage], blocks.bounds[stage + 1]],
        "sequence_length": recipe.pretrain.sequence_length,
    }
    inputs = {"corpus": corpus.fingerprint}
    if is_scored:
        settings |= asdict(rule_of(recipe, method))
        inputs["scores"] = artifact.load(layout.scores(method, stage), "scores").fingerprint
    if uses_influences(method, stage):
        settings["label_weights"] = label_weights(recipe)
    if config.materialize:
        settings["materialize"] = True
    if stage > 0 and config.duplicates != "keep":
        settings |= {"duplicates": config.duplicates, "duplicate_similarity": config.duplicate_similarity}
    if stage > 0 and config.domains is not None:
        settings |= {"domains": config.domains, "floors": config.floors, "caps": config.caps}
    return Request(directory=layout.index(method, stage), kind="selection index", settings=settings, inputs=inputs)


def select_stage(recipe: Recipe, method: str, stage: int, world: World | None = None) -> Manifest:
    """Write the selection index of a stage; ranks share the candidates, and write the index that one would.

    Without scores (``random``) a uniform sample of the block is taken (a prefix of it, the block being in keyed random order); with
    scores, what the method's :class:`Rule` says. The chosen ids stay in the order of the block, which is a keyed random one.

    Raises:
        CorpusTooSmallError: too few candidates are left by dropped duplicates and caps.
    """
    world = world or World(0, 1, torch.device("cpu"))
    request: Request = world.same(lambda: select_request(recipe, method, stage))
    done: Manifest | None = world.same(request.find)
    if done:
        return done
    start = time.perf_counter()
    layout = layout_of(recipe)
    corpus = open_corpus(layout.corpus("train"), recipe.pretrain.sequence_length)
    blocks = make_blocks(recipe, corpus.samples)
    k, n, directory = request.settings["samples"], blocks.size(stage), request.directory
    info: dict[str, Any] = {"ratio": k / n}
    world.same(lambda: directory.mkdir(parents=True, exist_ok=True))
    if stage == 0 or not (needs_scores(method, stage) or {"duplicates", "domains"} & set(request.settings)):
        pieces = (blocks.candidates(stage, first, min(first + PIECE, k)) for first in range(0, k, PIECE))
        world.same(lambda: write_ids(directory, pieces, k))
    else:
        label = f"select {method} stage {stage}"
        candidates = _Candidates(recipe, corpus, blocks, method, stage, world)
        if recipe.select.duplicates != "keep":
            candidates.left = world.same_after_long(lambda: _write_left(recipe, corpus, blocks, stage, directory / LEFT_FILE, label))
        choice = _Choice(candidates, k)
        _write_shared(world, directory, choice.take(), k)
        info |= choice.info(label)
        world.same(lambda: (directory / LEFT_FILE).unlink(missing_ok=True))
    files = [INDEX_FILE]
    if recipe.select.materialize:
        world.same_after_long(lambda: _materialize(directory, corpus))
        files += [f"{SELECTED_NAME}.bin", f"{SELECTED_NAME}.idx"]
    cost = Cost(seconds=time.perf_counter() - start)
    result: Manifest = world.same_after_long(lambda: request.commit(info=info, cost=cost, files=files, identity=[INDEX_FILE]))
    return result


def _write_shared(world: World, directory: Path, pieces: Iterable[Ids], count: int) -> None:
    """Write an index from the pieces of all ranks, in their order."""
    if world.size == 1:
        write_ids(directory, pieces, count)
        return
    parts = [directory / f"index.part-{rank}" for rank in range(world.size)]

    def write_own() -> None:
        with parts[world.rank].open("wb") as handle:
            for piece in pieces:
                handle.write(np.ascontiguousarray(piece, "<i8").data)

    def read_all() -> Iterator[Ids]:
        for part in parts:
            for first in range(0, part.stat().st_size, 8 * PIECE):
                yield np.fromfile(part, "<i8", PIECE, offset=first)

    def join() -> None:
        write_ids(directory, read_all(), count)
        for part in parts:
            part.unlink()

    world.gathered(write_own)
    world.same(join)


def _materialize(directory: Path, corpus: Corpus) -> None:
    """Write the samples of an index, in its order."""
    ids = load_array(directory / INDEX_FILE, np.dtype(np.int64), 1)
    with IndexedWriter(directory / SELECTED_NAME, corpus.dtype) as writer:
        for start in range(0, len(ids), COPIED):
            windows = corpus.stored(np.asarray(ids[start : start + COPIED]))
            writer.write(windows.ravel(), np.full(len(windows), windows.shape[1], np.int32))


def _write_left(recipe: Recipe, corpus: Corpus, blocks: Blocks, stage: int, path: Path, label: str) -> Path:
    """Write which candidates [n] are no duplicates of earlier ones. Returns the file's path."""
    n, config = blocks.size(stage), recipe.select
    found = Duplicates(config.duplicate_similarity if config.duplicates == "near" else None)
    left = np.ones(n, np.bool_)
    with Progress(f"{label} {config.duplicates} duplicates", -(-n // COPIED), "piece") as progress:
        for start in range(0, n, COPIED):
            windows = corpus.stored(blocks.candidates(stage, start, start + COPIED))[:, :-1]
            left[start : start + COPIED] = ~found.add(windows)
            progress.add()
    artifact.write_array(path, left)
    say(f"{label}: {n - int(left.sum()):,} of {n:,} candidates are {config.duplicates} duplicates of others and dropped")
    return path


@dataclass(frozen=True)
class _Piece:
    """Some candidates: what is chosen by, larger first [m], ids [m], joined scores [m], and domains [m] by number."""

    keys: Floats
    ids: Ids
    scores: Floats
    domains: npt.NDArray[np.int16]

    def only(self, mask: Masks) -> _Piece:
        """Those of a mask [m]."""
        return _Piece(self.keys[mask], self.ids[mask], self.scores[mask], self.domains[mask])


def _of_domain(number: int, piece: _Piece) -> Masks:
    mask: Masks = piece.domains == number
    return mask


class _Candidates:
    """The candidates of a stage, of which each rank counts a part, in whole pieces."""

    def __init__(self, recipe: Recipe, corpus: Corpus, blocks: Blocks, method: str, stage: int, world: World) -> None:
        self.recipe, self._blocks, self._stage, self.world = recipe, blocks, stage, world
        self.n, self.rule = blocks.size(stage), Rule()
        self.domains = Domains(corpus, recipe.select) if recipe.select.domains is not None else None
        self.left: Path | None = None
        self._scores: Scores | None = None
        if needs_scores(method, stage):
            self.rule, self._scores = rule_of(recipe, method), open_scores(layout_of(recipe).scores(method, stage), corpus.fingerprint)
            self._join = np.ones(1)
            if uses_influences(method, stage):
                self._join = joining(list(label_weights(recipe).values()), self._scores.manifest.info["label_covariance_nats2"])
        pieces = -(-self.n // PIECE)
        first, stop = (pieces * (world.rank + more) // world.size * PIECE for more in (0, 1))
        self.part = range(min(first, self.n), min(stop, self.n))

    def piece(self, start: int, stop: int) -> _Piece:
        """Candidates start … stop, without the dropped ones."""
        ids = self._blocks.candidates(self._stage, start, stop)
        scores, dropped = self._joined(start, stop)
        values = -scores if self.rule.keep == "high" else scores
        if self.rule.temperature > 0:
            keys = gumbel_keys(values, ids, temperature=self.rule.temperature, seed=self.recipe.seed, stage=self._stage)
        else:
            keys = -values
        keys = np.where(dropped, keys - BEHIND, keys)
        domains = self.domains.of(ids) if self.domains else np.full(len(ids), -1, np.int16)
        found = _Piece(keys, ids, scores, domains)
        return found if self.left is None else found.only(load_array(self.left, np.dtype(np.bool_), 1)[start:stop])

    def _joined(self, start: int, stop: int) -> tuple[Floats, Masks]:
        """Joined scores [m], and what a cascade dropped [m]."""
        if self._scores is None:  # a random choice: the first in the order of the block, which is a random one
            return np.arange(start, stop, dtype=np.float64), np.zeros(stop - start, np.bool_)
        scores, dropped = self._scores.predicted(self._scores.read(start, stop).astype(np.float64))
        return scores @ self._join, dropped

    @property
    def is_scored(self) -> bool:
        """Whether there are scores, or the choice is random."""
        return self._scores is not None

    @property
    def dropped(self) -> int:
        """Candidates that a cascade dropped."""
        return int(self._scores.manifest.info["dropped"]) if self._scores else 0

    def own(self) -> Iterator[_Piece]:
        """Pieces of this rank's part."""
        for start in range(self.part.start, self.part.stop, PIECE):
            yield self.piece(start, min(start + PIECE, self.n))

    def counts(self) -> npt.NDArray[np.int64]:
        """Candidates of each limited domain, and of all others, over all ranks."""
        if self.domains is None:
            return np.array([self.n if self.left is None else np.count_nonzero(load_array(self.left, np.dtype(np.bool_), 1))])
        names = len(self.domains.names)
        own = np.zeros(names + 1, np.int64)
        for piece in self.own():
            own += np.bincount(np.where(piece.domains < 0, names, piece.domains), minlength=names + 1)
        return self.sum(own)

    def sum(self, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Over ranks."""
        found: npt.NDArray[np.int64] = self.world.total(torch.from_numpy(counts).to(self.world.device)).cpu().numpy()
        return found

    def cut(self, k: int, among: Callable[[_Piece], Masks] | None) -> Cut:
        """Where the k largest keys of the candidates, or of some of them, end."""

        def piece(start: int, stop: int) -> tuple[Floats, Ids]:
            found = self.piece(start, stop)
            found = found.only(among(found)) if among else found
            return found.keys, found.ids

        return find_cut(piece, self.n, k, part=self.part, sums=self.sum)


class _Choice:
    """The k candidates with the largest keys, with as many of each domain as floors and caps say.

    A domain's floor is filled with its best first; the best of all that are left follow, of each domain at most its cap.
    """

    def __init__(self, candidates: _Candidates, k: int) -> None:
        self._candidates, self._k = candidates, k
        self._counts = candidates.counts()
        self._floors: dict[int, Cut] = {}
        self._caps: dict[int, Cut | None] = {}
        least, most = self._limits()
        possible = sum(most) + int(self._counts[-1])
        if possible < k:
            raise CorpusTooSmallError(
                f"{int(self._counts.sum()):,} of {candidates.n:,} candidates are left, of which select.caps let {possible:,} be chosen; "
                f"{k:,} are needed. Drop fewer duplicates, raise the caps or lower select.ratio"
            )
        for number, (floor, cap) in enumerate(zip(least, most, strict=True)):
            if floor:
                self._floors[number] = candidates.cut(floor, partial(_of_domain, number))
            if cap < self._counts[number]:
                self._caps[number] = candidates.cut(cap, partial(_of_domain, number)) if cap else None
        rest = k - sum(least)
        above = (possible - sum(least) - rest) // 2 if candidates.rule.keep == "middle" else 0
        free = self._free if self._floors or self._caps else None
        self._rest = candidates.cut(rest + above, free) if rest else None
        self._above = candidates.cut(above, free) if above else None
        self._sums: list[tuple[float, float]] = []
        self._selected = np.zeros_like(self._counts)

    def _limits(self) -> tuple[list[int], list[int]]:
        """Least and largest numbers of each limited domain."""
        if self._candidates.domains is None:
            return [], []
        config, k = self._candidates.recipe.select, self._k
        least, most = [], []
        for name, count in zip(self._candidates.domains.names, self._counts.tolist(), strict=False):
            least.append(min(int(np.ceil(config.floors.get(name, 0.0) * k - 1e-6)), count))
            most.append(min(int(np.floor(config.caps.get(name, 1.0) * k + 1e-6)), count))
        for number in [number for number, floor in enumerate(least) if floor][: max(0, sum(least) - k)]:
            least[number] -= 1  # floors of a whole, each rounded up
        return least, [max(floor, cap) for floor, cap in zip(least, most, strict=True)]

    def _forced(self, piece: _Piece) -> Masks:
        """What floors take."""
        forced = np.zeros(len(piece.ids), np.bool_)
        for number, cut in self._floors.items():
            forced |= (piece.domains == number) & cut.chosen(piece.keys, piece.ids)
        return forced

    def _free(self, piece: _Piece) -> Masks:
        """What neither floors take nor caps leave out."""
        free = ~self._forced(piece)
        for number, cut in self._caps.items():
            free &= (piece.domains != number) | (cut is not None and cut.chosen(piece.keys, piece.ids))
        return free

    def take(self) -> Iterator[Ids]:
        """This rank's chosen ids in the order of the block; counts them."""
        names = len(self._counts) - 1
        for piece in self._candidates.own():
            chosen = self._forced(piece)
            if self._rest is not None:
                by_key = self._rest.chosen(piece.keys, piece.ids)
                if self._above is not None:
                    by_key &= ~self._above.chosen(piece.keys, piece.ids)
                chosen |= self._free(piece) & by_key
            kept = piece.only(chosen)
            self._selected += np.bincount(np.where(kept.domains < 0, names, kept.domains), minlength=names + 1)
            self._sums.append((float(kept.scores.sum()), float(piece.scores.sum())))
            yield kept.ids

    def info(self, label: str) -> dict[str, Any]:
        """Figures of what was taken. Called by all ranks."""
        candidates = self._candidates
        of_pieces = [one for own in candidates.world.gathered(lambda: self._sums) for one in own]
        selected, total = candidates.sum(self._selected.copy()), int(self._counts.sum())
        info: dict[str, Any] = {"candidates_left": total}
        mean, mean_of_all = sum(one for one, _ in of_pieces) / self._k, sum(all_ for _, all_ in of_pieces) / total
        if candidates.is_scored:
            info |= {"mean_score_selected": mean, "mean_score_candidates": mean_of_all}
        if dropped := candidates.dropped:
            info["dropped_by_cascade"] = dropped
            if candidates.world.first and self._k > total - dropped:
                say(f"{label}: WARNING: the cascade left {candidates.n - dropped:,} candidates, fewer than the {self._k:,} that are chosen")
        if candidates.domains:
            names = [*candidates.domains.names, "others"]
            info["domains"] = {
                name: {"candidates": int(found), "selected": int(chosen)}
                for name, found, chosen in zip(names, self._counts, selected, strict=True)
            }
        if candidates.world.first:
            if "mean_score_selected" in info:
                kept = f"{candidates.rule.keep} ones are chosen"
                say(f"{label}: mean score {mean:+.3f} of {self._k:,} selected, {mean_of_all:+.3f} of {total:,} candidates ({kept})")
            for name, one in info.get("domains", {}).items():
                share = f"{one['selected'] / self._k:.1%} of the selected"
                say(f"{label}: {name}: {one['selected']:,} of {one['candidates']:,} candidates, {share}")
        return info
