"""Where a run's artifacts lie. One place says it; every step and the report ask here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mates.engine.config import Recipe

SHARED = "shared"  # the arm of stage 0, which all methods start from


@dataclass(frozen=True)
class Layout:
    """Paths of a run."""

    root: Path
    data: Path

    @property
    def sample_corpus(self) -> Path:
        """The embedded corpus' shards and reference passages."""
        return self.data / "sample-corpus"

    @property
    def tokenizer(self) -> Path:
        """Tokenizer artifact."""
        return self.data / "tokenizer"

    def corpus(self, split: str) -> Path:
        """Corpus artifact: train, pool or holdout."""
        return self.data / "corpus" / split

    def reference(self, half: str) -> Path:
        """Reference artifact: train (what probes measure) or test (what evaluation reports)."""
        return self.data / "reference" / half

    def further_reference(self, name: str) -> Path:
        """Reference artifact of one of the recipe's further tasks."""
        return self.data / "reference" / "more" / name

    def stage(self, method: str, stage: int) -> Path:
        """Folder of one stage of one method; stage 0 is shared by all methods."""
        return self.root / (SHARED if stage == 0 else method) / f"stage{stage}"

    def checkpoint(self, method: str, stage: int) -> Path:
        """Checkpoint at the end of a stage."""
        return self.stage(method, stage) / "checkpoint"

    def partial_checkpoints(self, method: str, stage: int) -> Path:
        """Folder of the checkpoints inside a stage."""
        return self.stage(method, stage) / "partial"

    def labels(self, method: str, stage: int) -> Path:
        """Oracle influences that choose the data of ``stage`` (probed on the checkpoint before it)."""
        return self.stage(method, stage) / "labels"

    def influence_model(self, method: str, stage: int) -> Path:
        """Influence model that chooses the data of ``stage``."""
        return self.stage(method, stage) / "influence-model"

    def scores(self, method: str, stage: int) -> Path:
        """Scores of the candidates of ``stage``."""
        return self.stage(method, stage) / "scores"

    def index(self, method: str, stage: int) -> Path:
        """Selection index of ``stage``."""
        return self.stage(method, stage) / "index"

    def evaluation(self, method: str, stage: int) -> Path:
        """Evaluation of the checkpoint of ``stage``."""
        return self.stage(method, stage) / "evaluation"

    def of_step(self, verb: str, method: str, stage: int) -> Path:
        """The artifact of one of a stage's steps, by the step's verb."""
        places = {
            "probe": self.labels,
            "fit": self.influence_model,
            "score": self.scores,
            "select": self.index,
            "pretrain": self.checkpoint,
            "evaluate": self.evaluation,
        }
        return places[verb](method, stage)

    def probed(self, method: str, stage: int, *, after_decay: bool) -> Path:
        """The artifact whose ``state/`` is probed for ``stage``: the checkpoint before it, or the end of that one's decay branch."""
        return (self.evaluation if after_decay else self.checkpoint)(method, stage - 1)

    @property
    def report(self) -> Path:
        """The report."""
        return self.root / "report.html"

    @property
    def ledger(self) -> Path:
        """What every step cost."""
        return self.root / "ledger.json"

    @property
    def metrics(self) -> Path:
        """JSON lines of training progress."""
        return self.root / "metrics.jsonl"


def layout_of(recipe: Recipe) -> Layout:
    """The layout of a recipe's run."""
    root = recipe.path()
    return Layout(root, Path(recipe.data_dir) if recipe.data_dir else root / "data")


def union_layouts(recipe: Recipe) -> list[Layout]:
    """The data folders whose corpora the recipe reads as one; nothing of runs is looked for there."""
    return [Layout(Path(folder), Path(folder)) for folder in recipe.corpus.union]
