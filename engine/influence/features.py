"""What an influence model can see of a sample beside its words: how hard it is, and how near to the reference tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mates.engine.baselines.dsir import Dsir, log_shares
from mates.engine.baselines.ngram_lm import NgramLanguageModel
from mates.engine.baselines.quality import QualityClassifier, packed
from mates.engine.config import Recipe
from mates.engine.data.corpus import Corpus, open_corpus
from mates.engine.data.index import load_array
from mates.engine.influence.bags import ngram_flops
from mates.engine.influence.model import Samples, Windows
from mates.engine.layout import layout_of
from mates.engine.probe.stage import label_weights, probed_samples
from mates.engine.random import KeyedPermutation
from mates.engine.reference.task import Reference, open_references
from mates.engine.select.methods import label_stages
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError

FEATURES_FILE = "features.json"
DIFFICULTY, RELEVANCE, QUALITY = "difficulty", "relevance", "quality"
POOL_SAMPLES = 50_000  # samples of the pool that n-grams are counted in, at most
CLASSIFIED_SAMPLES = 20_000  # samples of the pool, and of a reference, that a classifier is fitted to, at most
LEAST_SAMPLES = 50
BLOCK = 4096


@dataclass(frozen=True)
class ExtraFeatures:
    """Features of samples, each standardised over the probed samples.

    ``difficulty`` is the loss under a bigram language model of the pool, in nats a token; ``relevance.TASK`` is DSIR's importance weight of
    a task's text over the pool's, in nats an n-gram; ``quality.TASK`` the log-odds, by a linear classifier on n-grams, that a sample is of
    a task's text and not of the pool.
    """

    language_model: NgramLanguageModel | None = None
    ratios: dict[str, Dsir] = field(default_factory=dict)
    classifiers: dict[str, QualityClassifier] = field(default_factory=dict)
    standard: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((2, 0)))
    """[2, F], mean and SD of each."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the features [F]."""
        of_tasks = [f"{RELEVANCE}.{task}" for task in self.ratios] + [f"{QUALITY}.{task}" for task in self.classifiers]
        return (*((DIFFICULTY,) if self.language_model else ()), *of_tasks)

    def compute(self, samples: Samples) -> npt.NDArray[np.float32]:
        """Features [n, F] of samples, each independent of the others."""
        result = np.empty((len(samples), len(self.names)), np.float32)
        for start in range(0, len(samples) if self.names else 0, BLOCK):
            raw = self._raw(samples[start : start + BLOCK])
            result[start : start + BLOCK] = (raw - self.standard[0]) / self.standard[1]
        return result

    def _raw(self, samples: Samples) -> npt.NDArray[np.float64]:
        windows = samples.windows
        columns = [self.language_model.losses(windows)] if self.language_model else []
        columns += [ratio.relevance(windows) for ratio in self.ratios.values()]
        columns += [-classifier.scores(windows) for classifier in self.classifiers.values()]
        return np.stack(columns, axis=1)

    def standardised(self, samples: Samples) -> ExtraFeatures:
        """The same with means and SDs over some samples."""
        raw = np.concatenate([self._raw(samples[start : start + BLOCK]) for start in range(0, len(samples), BLOCK)])
        spread = raw.std(0)
        return replace(self, standard=np.stack([raw.mean(0), np.where(spread > 0, spread, 1.0)]))

    def flops(self, samples: int, length: int) -> float:
        """FLOPs of computing them for samples of ``length`` tokens."""
        return feature_flops(samples, length, difficulty=self.language_model is not None, tables=len(self.ratios) + len(self.classifiers))

    def save(self, directory: Path) -> None:
        """Write what :meth:`load` reads; nothing where there are no features."""
        if not self.names:
            return
        ends = {task: classifier.end for task, classifier in self.classifiers.items()}
        artifact.write_json(directory / FEATURES_FILE, {"features": self.names, "ends_of_document": ends})
        artifact.write_array(directory / "features-standard.npy", self.standard)
        for name, ratio in self.ratios.items():
            artifact.write_array(directory / f"features-{RELEVANCE}.{name}.npy", ratio.tables)
        for name, classifier in self.classifiers.items():
            artifact.write_array(directory / f"features-{QUALITY}.{name}.npy", classifier.weights)
        for name, values in self.language_model.arrays.items() if self.language_model else ():
            artifact.write_array(directory / f"features-{DIFFICULTY}.{name}.npy", values)

    @classmethod
    def load(cls, directory: Path) -> ExtraFeatures:
        """What :meth:`save` wrote. ArtifactError where it is something else."""
        if not (directory / FEATURES_FILE).is_file():
            return NO_FEATURES
        saved = artifact.read_json(directory / FEATURES_FILE)
        names, ends = saved["features"], saved.get("ends_of_document", {})  # models from before classifiers have none

        def read(name: str, dtype: npt.DTypeLike, axes: int = 1) -> npt.NDArray[Any]:
            return np.array(load_array(directory / f"features-{name}.npy", np.dtype(dtype), axes))

        def tasks(kind: str) -> list[str]:
            """In the order of the columns, which that of a mapping in JSON is not."""
            return [name.removeprefix(f"{kind}.") for name in names if name.startswith(f"{kind}.")]

        try:
            model = None
            if DIFFICULTY in names:
                dtypes = {"starts": np.int64, "followers": np.uint32, "counts": np.int64}
                model = NgramLanguageModel.from_arrays({name: read(f"{DIFFICULTY}.{name}", dtype) for name, dtype in dtypes.items()})
            ratios = {task: Dsir.from_array(read(f"{RELEVANCE}.{task}", np.float64)) for task in tasks(RELEVANCE)}
            classifiers = {task: QualityClassifier.from_array(read(f"{QUALITY}.{task}", np.float64), ends[task]) for task in tasks(QUALITY)}
            found = cls(model, ratios, classifiers, read("standard", np.float64, 2))
        except (KeyError, ValueError) as error:
            raise ArtifactError(f"{directory}: extra features that cannot be read ({error}); fit the model again") from error
        if found.standard.shape != (2, len(names)):
            raise ArtifactError(
                f"{directory}: means and SDs of shape {found.standard.shape}, expected (2, {len(names)}); fit the model again"
            )
        return found


NO_FEATURES = ExtraFeatures()


def feature_flops(samples: int, length: int, *, difficulty: bool, tables: int) -> float:
    """FLOPs of a look-up and an addition for each next token, if ``difficulty`` is a feature, and for each n-gram in each of the tables of
    relevance and quality."""
    return 2.0 * samples * difficulty * (length - 1) + tables * ngram_flops(samples, length)


def feature_inputs(recipe: Recipe) -> dict[str, str]:
    """Fingerprints of what features are made from."""
    found = {f"reference.{one.name}": one.manifest.fingerprint for one in weighted_references(recipe)}
    return found | {"pool": artifact.load(layout_of(recipe).corpus("pool"), "corpus").fingerprint}


def weighted_references(recipe: Recipe) -> list[Reference]:
    """The reference tasks that count; those of weight 0 are measured only."""
    return [one for one in open_references(recipe) if one.name in label_weights(recipe)]


def make_features(recipe: Recipe, stage: int) -> ExtraFeatures:
    """The features that a recipe's influence model of a stage sees.

    N-grams are counted in samples of the pool that the model is not fitted to: those would seem easier than candidates are. Classifiers,
    too, know none of these. ArtifactError where there is too little to make them of.
    """
    if not recipe.fit.features:
        return NO_FEATURES
    try:
        return _make(recipe, stage)
    except ArtifactError:
        raise
    except ValueError as error:
        raise ArtifactError(f"fit.features, stage {stage}: {error}") from error


def _make(recipe: Recipe, stage: int) -> ExtraFeatures:
    pool = open_corpus(layout_of(recipe).corpus("pool"), recipe.pretrain.sequence_length)
    others = unprobed_samples(recipe, pool, stage)
    model, ratios, classifiers = None, {}, {}
    if DIFFICULTY in recipe.fit.features:
        model = NgramLanguageModel.fit(pieces(pool, others), pool.info("tokenizer")["vocab_size"])
    if RELEVANCE in recipe.fit.features:
        raw = log_shares(pieces(pool, others), "raw text")
        ratios = {one.name: Dsir(log_shares(item_tokens(one), one.name) - raw) for one in weighted_references(recipe)}
    if QUALITY in recipe.fit.features:
        rows = KeyedPermutation(len(others), recipe.seed, "quality", stage)(np.arange(min(len(others), CLASSIFIED_SAMPLES)))
        negatives = Samples(pool, others[rows]).windows
        for one in weighted_references(recipe):
            classifiers[one.name] = _classifier(one, negatives, pool.info("tokenizer")["end_of_document"])
    return ExtraFeatures(model, ratios, classifiers).standardised(Samples(pool, probed_samples(recipe, pool.samples, stage)))


def _classifier(reference: Reference, negatives: Windows, end: int) -> QualityClassifier:
    """Of a reference's text against samples of the pool [n, L]. ArtifactError where it has less than two samples' worth."""
    length = negatives.shape[1]
    positives = packed(item_tokens(reference), length, CLASSIFIED_SAMPLES)
    if len(positives) < 2:
        raise ArtifactError(
            f"{reference.name}: {len(reference.tokens)} tokens, at least two samples of {length} are needed to tell it from the pool; "
            f"raise reference.items, or leave {QUALITY} out of fit.features"
        )
    return QualityClassifier.fit(positives, negatives, end)


def unprobed_samples(recipe: Recipe, pool: Corpus, stage: int) -> npt.NDArray[np.int64]:
    """Ids of pool samples whose labels the influence model of a stage is not trained on. ArtifactError where there are hardly any."""
    own, *earlier = (probed_samples(recipe, pool.samples, probed) for probed in label_stages(recipe, stage))
    known = np.unique(np.concatenate([own, *earlier]))
    stop = min(pool.samples, POOL_SAMPLES + len(own) + sum(map(len, earlier)))
    others = KeyedPermutation(pool.samples, recipe.seed, "probe", stage)(np.arange(len(own), stop))
    others = others[~np.isin(others, known)][:POOL_SAMPLES]
    if len(others) < LEAST_SAMPLES:
        raise ArtifactError(
            f"{pool.directory}: {len(others)} samples in the pool beside the {len(known)} that are probed, at least {LEAST_SAMPLES} are "
            f"needed to count n-grams in; enlarge corpus.pool_share (now {recipe.corpus.pool_share}), probe fewer or lower "
            f"fit.earlier_labels (now {recipe.fit.earlier_labels})"
        )
    return np.sort(others)


def pieces(corpus: Corpus, ids: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.integer[Any]]]:
    """Tokens of samples, some [m, L] at a time."""
    for start in range(0, len(ids), BLOCK):
        yield corpus.stored(ids[start : start + BLOCK])[:, :-1]


def item_tokens(reference: Reference) -> Iterator[npt.NDArray[np.integer[Any]]]:
    """Tokens of each item of a reference, the last one, which is only a label, too."""
    for start, stop in zip(reference.offsets[:-1], reference.offsets[1:], strict=True):
        yield np.append(reference.tokens[start:stop], reference.labels[stop - 1])
