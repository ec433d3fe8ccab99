"""The recipe: everything that a run depends on, as frozen dataclasses. Imports no torch, so ``--help`` is instant.

Values are checked when the objects are made; a bad one raises :class:`RecipeError` naming the field by its dotted name.
"""

from __future__ import annotations

import importlib.util
import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, cast, get_args

SAMPLE = "sample"  # the word in place of a path that asks for the embedded corpus or its reference task

Method = Literal["random", "mates", "mates-topk", "mates-static", "dsir", "semdedup", "quality", "perplexity", "ratings"]
INFLUENCE_METHODS = ("mates", "mates-topk", "mates-static")
"""Methods that choose by an influence model, and so need probe and fit."""
ProbeMethod = Literal["exact", "linear", "centred", "frozen", "corrected"]
TaskFormat = Literal["lambada", "arc", "boolq", "copa", "hellaswag", "logiqa", "openbookqa", "piqa", "sciq", "winogrande"]
EVALUATION_TASKS = (
    "sciq",
    "arc_easy",
    "arc_challenge",
    "logiqa",
    "openbookqa",
    "boolq",
    "hellaswag",
    "piqa",
    "winogrande",
    "lambada",
)
"""The zero-shot tasks of the MATES paper, and LAMBADA's held-out half, by lm_eval's names."""


SLURM_VERBS = (
    "sample-corpus",
    "tokenizer",
    "preprocess",
    "reference",
    "probe",
    "fit",
    "score",
    "select",
    "pretrain",
    "evaluate",
    "report",
)
"""Verbs that a job can run."""

OWNED_BY_RECIPE = {
    "train_batch_size": "pretrain.batch_size",
    "train_micro_batch_size_per_gpu": "pretrain.micro_batch_size",
    "gradient_accumulation_steps": "pretrain.micro_batch_size",
    "gradient_clipping": "pretrain.clip_norm",
    "optimizer": "pretrain",
    "scheduler": "pretrain.schedule",
    "bf16": "pretrain.precision",
    "fp16": "pretrain.precision",
    "torch_autocast": "pretrain.precision",
    "data_types": "pretrain.precision",
    "checkpoint": "pretrain.async_checkpoints",
}
"""Keys of the DeepSpeed configuration that a recipe says by its own fields."""
OWNED_OF_ZERO = {"stage": "pretrain.zero_stage", "offload_optimizer": "pretrain.offload_optimizer"}


class RecipeError(ValueError):
    """A recipe value is impossible. The message names the field, the value found and what is expected."""


def require(condition: bool, name: str, found: object, expected: str) -> None:
    """Raise RecipeError naming the field unless ``condition`` holds."""
    if not condition:
        raise RecipeError(f"{name}: found {found!r}, expected {expected}")


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What text is read and which share of the documents goes where."""

    inputs: list[str] = field(default_factory=lambda: [SAMPLE])
    """Files, folders or globs of documents (.json.gz, .jsonl, .jsonl.gz, .jsonl.zst, .parquet), read in the order given, local or as
    fsspec URLs (s3://…, with the package that serves them installed); ``sample`` stands for the embedded corpus."""
    union: list[str] = field(default_factory=list)
    """Data folders of other recipes (their ``data_dir``), tokenized with one tokenizer: their corpora are read as one, where they are,
    instead of ``inputs``, and their tokenizer is taken; ``mates preprocess`` then only notes what they are."""
    text_field: str = "text"
    """Name of the field or column that holds a document's text."""
    metadata_fields: list[str] = field(default_factory=lambda: ["url", "timestamp", "source"])
    """Fields or columns that are kept beside the tokens, in a Parquet row for each document."""
    on_bad_input: Literal["skip", "fail"] = "skip"
    """What malformed lines, documents without text and damaged files do: counted by reason, with examples in rejects.jsonl, or an
    error that names file and line."""
    empty_documents: Literal["drop", "keep"] = "drop"
    """Documents without text: counted as dropped, or kept as documents of no tokens, as Megatron's tool does."""
    max_document_bytes: int = 8 * 2**20
    """Longest line or document that is read, in bytes; longer ones are bad input. A worker's memory grows with it."""
    special_token_text: Literal["text", "special"] = "text"
    """What a literal ``<|endoftext|>`` in a web page becomes: the text that it is, or the special token as in Megatron's tool."""
    features: list[Literal["length", "hash", "ngrams"]] = field(default_factory=list)
    """Computed for each document in the same pass and kept in its Parquet row: length (UTF-8 bytes), hash (XXH3-128 of the
    text, equal for exact duplicates), ngrams (hashed counts of token unigrams and bigrams, and their totals over the corpus)."""
    scorer_tokenizer: str | None = None
    """Folder or tokenizer.json of a pretrained encoder's Hugging Face tokenizer (usually the folder of ``fit.encoder``): its tokens of
    every document are written in the same pass, so that no sample needs to be decoded for it. Null writes none."""
    workers: int | None = None
    """Processes that tokenize; null takes one a core, or one under MPI. The result does not depend on it."""
    sample_bytes: int | None = None
    """Upper bound on the text of the embedded corpus, in bytes; null takes all there is."""
    pool_share: float = 0.05
    """Share of documents (0 to 1) kept for probing: samples of them are probed and never trained on."""
    holdout_share: float = 0.02
    """Share of documents (0 to 1) kept for the held-out language-model loss."""
    split_seed: int = 0
    """Key of the hash of a document's text that sends it to the train, pool or holdout corpus."""

    def __post_init__(self) -> None:
        require(0 <= self.split_seed < 2**64, "corpus.split_seed", self.split_seed, "0 to 2^64 - 1")
        require(len(self.inputs) > 0, "corpus.inputs", self.inputs, "at least one file, folder or glob")
        require(len(set(self.union)) == len(self.union), "corpus.union", self.union, "each folder once")
        require(not self.union or self.inputs == [SAMPLE], "corpus.inputs", self.inputs, "nothing where corpus.union is set")
        scorer = self.scorer_tokenizer
        require(
            not self.union or scorer is None, "corpus.scorer_tokenizer", scorer, "null where corpus.union is set: its parts have their own"
        )
        require(self.text_field != "", "corpus.text_field", self.text_field, "a field name")
        names = self.metadata_fields
        require(all(names) and len(set(names)) == len(names), "corpus.metadata_fields", names, "different field names")
        taken = ("tokens", "utf8_bytes", "text_xxh3_128", "ngram_buckets", "ngram_counts")
        require(not set(names) & set(taken), "corpus.metadata_fields", names, f"names other than {', '.join(taken)}, columns of our own")
        require(self.text_field not in names, "corpus.metadata_fields", names, "fields other than corpus.text_field")
        require(len(set(self.features)) == len(self.features), "corpus.features", self.features, "each feature once")
        require(1024 <= self.max_document_bytes <= 2**30, "corpus.max_document_bytes", self.max_document_bytes, "1024 to 2^30 bytes")
        require(self.workers is None or 1 <= self.workers <= 4096, "corpus.workers", self.workers, "null or 1 to 4096 processes")
        require(0 < self.pool_share < 1, "corpus.pool_share", self.pool_share, "a share above 0 and below 1")
        require(0 < self.holdout_share < 1, "corpus.holdout_share", self.holdout_share, "a share above 0 and below 1")
        require(
            self.pool_share + self.holdout_share < 1,
            "corpus.pool_share + corpus.holdout_share",
            self.pool_share + self.holdout_share,
            "a sum below 1, or nothing is left to train on",
        )
        require(
            self.sample_bytes is None or self.sample_bytes >= 100_000,
            "corpus.sample_bytes",
            self.sample_bytes,
            "null or at least 100000 bytes",
        )


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The language model's tokenizer: taken from ``path``, or trained on the corpus."""

    path: str | None = None
    """An existing tokenizer: a tokenizer.json, a folder that holds one, a sentencepiece .model, or a name on the model hub; null
    trains one on the first documents of the corpus."""
    kind: Literal["bpe", "sentencepiece"] = "bpe"
    """What is trained where ``path`` is null: byte-level BPE (Hugging Face tokenizers) or a sentencepiece BPE model."""
    vocab_size: int = 4096
    """Entries of a trained vocabulary, the end-of-document token included."""
    train_bytes: int = 20_000_000
    """Text that a tokenizer is trained on, in bytes."""
    end_of_document: str | None = None
    """The token put after each document; null takes the tokenizer's own (<|endoftext|> or </s>)."""

    def __post_init__(self) -> None:
        require(300 <= self.vocab_size <= 2**24, "tokenizer.vocab_size", self.vocab_size, "300 to 16777216 entries")
        require(self.train_bytes >= 100_000, "tokenizer.train_bytes", self.train_bytes, "at least 100000 bytes")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A further reference task, all of it to be probed on: no half of it is held out."""

    name: str
    """The task's name: the suffix of its label columns and the name of its folder."""
    format: TaskFormat
    """Form of the file's lines, and with it the prompt: that of the evaluation task of this name."""
    source: str
    """A JSON-lines file (plain, .gz or .zst) of items with their answers; a training split, since the data is chosen by it."""
    items: int
    """Items drawn from the file; the probe's cost is proportional to it."""
    weight: float = 1.0
    """Weight of this task where influences on several are joined into one; 0 measures it and leaves it out."""
    loss_over: Literal["answer", "passage"] = "answer"
    """As ``reference.loss_over``."""

    def __post_init__(self) -> None:
        require_task_name("reference.more.name", self.name)
        require(self.items >= 2, f"reference.more ({self.name}).items", self.items, "at least 2 items")
        require(0 <= self.weight < math.inf, f"reference.more ({self.name}).weight", self.weight, "0 or more")


def require_task_name(field_name: str, name: str) -> None:
    """Raise RecipeError unless ``name`` can name a task: it becomes part of column names and paths."""
    require(name.replace("-", "").replace("_", "").isalnum(), field_name, name, "letters, digits, '-' and '_' only")


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The task, or tasks, whose loss says whether a sample helped."""

    source: str = SAMPLE
    """A JSON-lines file (plain, .gz or .zst) of passages in LAMBADA's form (field ``text``; the last word is to be predicted) or of
    items in another ``format``; ``sample`` stands for the task made from held-out prose of the embedded corpus."""
    format: TaskFormat = "lambada"
    """Form of the file's lines, and with it the prompt: that of the evaluation task of this name."""
    name: str = "last-word"
    """The task's name: it becomes the suffix of label columns (``influence_nats.NAME``)."""
    items: int = 128
    """Passages in the reference set, drawn from the train half; the probe's cost is proportional to it."""
    test_items: int = 512
    """Passages in the held-out test set, drawn from the other half (fewer where there are fewer)."""
    weight: float = 1.0
    """Weight of this task where influences on several are joined into one; 0 measures it and leaves it out."""
    loss_over: Literal["answer", "passage"] = "answer"
    """Which tokens' loss influences are measured on: those of an item's ``answer`` (LAMBADA's last word), or of the whole ``passage``,
    prompt included. What moves the answer's loss of a small model is mostly how likely such words are anywhere; the passage's says
    what text is worth reading, by many more tokens. Logits of a whole reference batch are held at once: mind
    ``probe.reference_batch_tokens``."""
    more: list[TaskConfig] = field(default_factory=list)
    """Further tasks that are probed at the same steps, each into columns of its own."""
    avoid: list[str] = field(default_factory=list)
    """Evaluation files, each as FORMAT:PATH (``arc:arc/test.jsonl.gz``). Items of any reference that share 13 words in a row with
    theirs, prompt included, are left out; shorter items where all words are equal."""

    def __post_init__(self) -> None:
        require(self.items >= 2, "reference.items", self.items, "at least 2 passages")
        require(self.test_items >= 2, "reference.test_items", self.test_items, "at least 2 passages")
        require_task_name("reference.name", self.name)
        is_passages = self.source != SAMPLE or self.format == "lambada"
        require(is_passages, "reference.format", self.format, "lambada, the form of the sample's passages")
        names = [self.name, *(task.name for task in self.more)]
        require(len(set(names)) == len(names), "reference.more", names, "different names, and others than reference.name")
        require(0 <= self.weight < math.inf, "reference.weight", self.weight, "0 or more")
        weights = [self.weight, *(task.weight for task in self.more)]
        require(sum(weights) > 0, "reference.weight", weights, "a weight above 0 for at least one task")
        for entry in self.avoid:
            form, _, path = entry.partition(":")
            require(
                form in get_args(TaskFormat) and path != "",
                "reference.avoid",
                entry,
                f"FORMAT:PATH with one of the formats {', '.join(get_args(TaskFormat))}",
            )

    def avoided(self) -> list[tuple[TaskFormat, Path]]:
        """Format and path of each evaluation file of ``avoid``."""
        parts = [entry.partition(":") for entry in self.avoid]
        return [(cast(TaskFormat, form), Path(path)) for form, _, path in parts]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The language model's shape. Fields left null come from ``preset``, or without one from a 1.6M-parameter GPT-NeoX."""

    preset: str | None = None
    """A known shape: pythia-14m, -31m, -70m, -160m, -410m, -1b, -1.4b, -2.8b, -6.9b or -12b; smollm-135m, -360m or -1.7b, tinyllama-1.1b,
    llama-2-7b or llama-3-8b."""
    config: str | None = None
    """A transformers configuration (config.json, or the folder that holds it) of a GPT-NeoX or Llama whose shape is taken; the vocabulary
    is that of the corpus."""
    weights: str | None = None
    """A Hugging Face folder (config.json and safetensors) whose weights training starts from instead of random ones; moments start at 0.
    Set ``tokenizer.path`` to its tokenizer, usually the same folder, and ``vocab_multiple`` so that its embedding has as many rows."""
    family: Literal["gpt_neox", "llama"] | None = None
    """Architecture, as transformers names it."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    layers: int | None = None
    """Transformer blocks."""
    heads: int | None = None
    """Attention heads."""
    kv_heads: int | None = None
    """Key/value heads (llama only; null: as many as ``heads``)."""
    intermediate_size: int | None = None
    """Width of the feed-forward layer."""
    max_positions: int | None = None
    """Longest sequence in tokens."""
    tie_embeddings: bool | None = None
    """Whether input and output embeddings are one matrix."""
    vocab_multiple: int = 64
    """The embedding has a row for each token id, rounded up to a multiple of this."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "layers", "heads", "kv_heads", "intermediate_size", "max_positions"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"model.{name}", value, "null or at least 1")
        require(self.vocab_multiple >= 1, "model.vocab_multiple", self.vocab_multiple, "at least 1")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Training: data order comes from the stage's selection index; the optimizer is AdamW under DeepSpeed ZeRO."""

    sequence_length: int = 128
    """Tokens of one training sample; a sample's labels are its tokens shifted by one."""
    batch_size: int = 32
    """Samples in one optimizer step, over all ranks."""
    micro_batch_size: int = 16
    """Samples in one forward pass on one rank; the rest of a rank's share is accumulated."""
    stages: int = 3
    """Stages of training; stage 0 trains on random data, each later one on data selected with the stage before it."""
    steps_per_stage: int = 100
    """Optimizer steps in a stage."""
    schedule: Literal["wsd", "cosine"] = "wsd"
    """Learning-rate schedule: warm-up and then constant (the decay happens in the evaluation's branch), or warm-up and cosine to
    ``min_lr_share``."""
    warmup_steps: int = 20
    """Optimizer steps of linear warm-up from 0."""
    min_lr_share: float = 0.1
    """Cosine only: the last step's learning rate as a share of ``lr``."""
    lr: float = 1e-3
    """Peak learning rate."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; biases and norms have none."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of forward and backward; master weights and moments are fp32 in either case."""
    zero_stage: int = 2
    """DeepSpeed ZeRO stage: 0 replicates all, 1 shards moments, 2 also gradients, 3 also weights."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more arithmetic (which
    the ledger, counting model FLOPs, leaves out)."""
    offload_optimizer: bool = False
    """Keep fp32 weights and moments in the memory of the host and take the optimizer step there (ZeRO 1 to 3): less memory, more time."""
    compile: bool = False
    """Compile the model with torch.compile (ZeRO 0 to 2): a minute or more at the start of each attempt, faster steps on a GPU."""
    fused_loss: Literal["auto", "always", "never"] = "auto"
    """Compute output embedding and cross-entropy in pieces, so that the logits of a micro-batch are never held as a whole, by the package
    liger-kernel (`pip install mates[gpu]`). ``auto``: on a GPU where it is installed."""
    reset_at_documents: bool = False
    """Let no token attend to the documents before its own in a window, and count positions from each document's start; false is the
    paper's plain windows. Probes and evaluation follow."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """What happens at a step whose loss on some rank is not finite or above ``spike_sd``, or whose gradient is not finite. All ranks act
    together, and weights and moments stay as they were: ``stop`` saves a checkpoint and ends with an error, ``skip`` goes on with the next
    step's data."""
    spike_sd: float = 6.0
    """Standard deviations above the mean, of the worst rank's loss in the last 128 steps, from which on a loss is bad; 0: no loss is too
    large."""
    checkpoint_every: int = 1000
    """Optimizer steps between checkpoints inside a stage, each of which can be resumed from; the stage's end is always saved."""
    keep_checkpoints: int = 2
    """Checkpoints inside a stage that are kept until it ends, the newest; more than one, so that a damaged one can be passed over."""
    async_checkpoints: bool = False
    """Write checkpoints inside a stage while training goes on: each rank holds a copy of its part in the host's memory until it is on
    disk. A rank that dies meanwhile costs up to two intervals instead of one."""
    log_every: int = 10
    """Optimizer steps between log lines."""

    def __post_init__(self) -> None:
        for name in (
            "sequence_length",
            "batch_size",
            "micro_batch_size",
            "steps_per_stage",
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
        ):
            require(getattr(self, name) >= 1, f"pretrain.{name}", getattr(self, name), "at least 1")
        require(self.stages >= 1, "pretrain.stages", self.stages, "at least 1")
        require(self.warmup_steps >= 0, "pretrain.warmup_steps", self.warmup_steps, "0 or more")
        require(
            self.warmup_steps <= self.total_steps,
            "pretrain.warmup_steps",
            self.warmup_steps,
            f"at most stages x steps_per_stage = {self.total_steps}",
        )
        require(0 <= self.min_lr_share <= 1, "pretrain.min_lr_share", self.min_lr_share, "a share from 0 to 1")
        require(0 < self.lr < math.inf, "pretrain.lr", self.lr, "a learning rate above 0")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"pretrain.{name}", getattr(self, name), "from 0 to below 1")
        require(self.eps > 0, "pretrain.eps", self.eps, "above 0")
        require(self.weight_decay >= 0, "pretrain.weight_decay", self.weight_decay, "0 or more")
        require(self.clip_norm > 0, "pretrain.clip_norm", self.clip_norm, "above 0")
        require(self.zero_stage in (0, 1, 2, 3), "pretrain.zero_stage", self.zero_stage, "0, 1, 2 or 3")
        require(not self.compile or self.zero_stage < 3, "pretrain.zero_stage", self.zero_stage, "0, 1 or 2 where compile is set")
        offloads = self.offload_optimizer
        require(not offloads or self.zero_stage > 0, "pretrain.zero_stage", self.zero_stage, "1, 2 or 3 where offload_optimizer is set")
        require(self.spike_sd >= 0, "pretrain.spike_sd", self.spike_sd, "0 or more")

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.stages * self.steps_per_stage

    @property
    def tokens_per_step(self) -> int:
        """Label tokens in one optimizer step, over all ranks."""
        return self.batch_size * self.sequence_length


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Oracle influences: one optimizer step on a sample, and how the reference loss moves."""

    method: Literal["exact", "linear", "centred", "frozen", "corrected", "auto"] = "exact"
    """``exact``: a literal AdamW step on each sample and a forward pass over the whole reference. ``linear``: the step's dot product with
    the reference gradient. ``centred``: with the gradient at the mean step. ``frozen``: with the second moment held fixed. ``corrected``:
    exact on ``subset_items`` items, corrected by linear. ``auto``: the cheapest of them that is as faithful as ``min_fidelity`` asks."""
    samples: int = 256
    """Samples of the pool probed at each stage."""
    every: int = 1
    """Stages from one probe to the next; the stages between are chosen by the influence model of the last one."""
    after_decay: bool = False
    """Probe the end of the evaluation's decay branch instead of the checkpoint itself (the paper's way). Under a constant learning rate
    the reference gradient of a small model is mostly what its last batches disturbed; the branch takes that away. Its steps are billed
    to the probe."""
    precision: Literal["bf16", "fp32", "fp64"] = "fp32"
    """Arithmetic of the probe. ``bf16``: the matrix products of gradients, as in training (fast on GPUs, slow on most CPUs); weights,
    moments, the optimizer step and the reference losses of exact influences stay in fp32."""
    fidelity_samples: int = 32
    """Samples (of ``samples``) on which every method is compared with exact influences, at every checkpoint; 0 compares nothing. Each costs
    what an exact influence costs, so that beside a cheap method the comparison is most of the time: use fewer once a method is known to
    be faithful."""
    min_fidelity: float = 0.95
    """Spearman's correlation with exact influences that ``auto`` asks of a method: the lower end of its 95% interval."""
    subset_items: int = 16
    """``corrected`` only: items of each reference that it is exact on."""
    calibration_samples: int = 32
    """Samples over which ``centred`` and ``frozen`` take their means."""
    micro_batch_size: int = 4
    """Samples in one forward and backward pass. Micro-batches form inside a chunk, so influences do not depend on the number of ranks."""
    shard_over: int = 1
    """Ranks that hold a model together, each a part of its weights, moments and reference gradients, for models that fit on no single
    device; the number of processes is a multiple. Each such team probes samples of its own. With ``bf16`` each rank keeps all weights in
    bf16 while a pass lasts."""
    generic: bool = False
    """Take gradients sample by sample, for models with layers other than linear ones, embeddings and norms; slower."""
    reference_batch_tokens: int = 8192
    """Padded tokens in one forward pass over the reference."""
    chunk_size: int = 16
    """Samples in one unit of work; finished units survive an interruption."""

    def __post_init__(self) -> None:
        require(self.samples >= 20, "probe.samples", self.samples, "at least 20, or there is nothing to fit and test on")
        counts = ("reference_batch_tokens", "chunk_size", "subset_items", "calibration_samples", "micro_batch_size", "shard_over", "every")
        for name in counts:
            require(getattr(self, name) >= 1, f"probe.{name}", getattr(self, name), "at least 1")
        require(
            self.fidelity_samples == 0 or 8 <= self.fidelity_samples <= self.samples,
            "probe.fidelity_samples",
            self.fidelity_samples,
            f"0, or 8 to probe.samples = {self.samples}",
        )
        require(
            self.method != "auto" or self.fidelity_samples > 0,
            "probe.fidelity_samples",
            self.fidelity_samples,
            "at least 8, since probe.method is auto",
        )
        require(not (self.generic and self.shard_over > 1), "probe.shard_over", self.shard_over, "1, since probe.generic is set")
        require(0 < self.min_fidelity <= 1, "probe.min_fidelity", self.min_fidelity, "a correlation above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """The influence model."""

    model: Literal["encoder", "ngram", "cascade"] = "encoder"
    """``encoder``: a BERT-architecture encoder, mean-pooled over chunks, with a regression head for each reference task. ``ngram``: ridge
    regression on hashed uni- and bigrams of tokens, seconds on a CPU and hardly a FLOP; of what follows only ``features``,
    ``earlier_labels`` and shares matter to it. ``cascade``: both; the n-gram model drops the candidates that it is sure about, the encoder
    reads the rest, and these have the mean of both predictions, weighted by validation labels."""
    features: list[Literal["difficulty", "relevance", "quality"]] = field(default_factory=list)
    """What a model sees of a sample beside its words: ``difficulty``, its loss under a bigram language model of the pool; ``relevance``,
    how much likelier its n-grams are in each reference task than in the pool (DSIR's importance weight, per n-gram); ``quality``, the
    log-odds by a linear classifier of n-grams that it is of the reference task's text and not of the pool. ``fit`` prints what each
    adds."""
    cascade_loss: float = 0.02
    """``cascade`` only: share of what selection gains (in mean oracle influence, over a random choice) that dropping may lose on
    validation labels; the largest share of candidates that keeps to it is dropped."""
    encoder: str | None = None
    """A pretrained encoder by path or name on the model hub (bert-base-uncased in the paper): it reads the sample's text through its
    own tokenizer. Null makes a small BERT from scratch that reads the corpus' token ids as they are."""
    hidden_size: int = 128
    """Width of an encoder made from scratch."""
    layers: int = 2
    """Blocks of an encoder made from scratch."""
    heads: int = 2
    """Attention heads of an encoder made from scratch."""
    chunk_tokens: int = 512
    """Encoder tokens in a chunk; a sample is cut into chunks and its token vectors are averaged over all of them."""
    max_chunks: int = 2
    """Chunks of a sample that are read; what lies beyond is not seen."""
    epochs: int = 5
    """Passes over the training labels; the epoch with the best validation loss is kept."""
    batch_size: int = 16
    """Samples in one step."""
    lr: float = 5e-5
    """Peak learning rate of AdamW; linear warm-up over the first tenth, then linear to 0."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices."""
    warm_start: bool = True
    """Start from the previous stage's influence model where there is one."""
    earlier_labels: int = 0
    """Train on the labels of so many earlier probes as well, each probe's standardised by itself. What a model prefers moves slowly: old
    labels cost nothing, and make up for few new ones. Validation and test labels are the new ones alone."""
    validation_share: float = 0.1
    """Share of labels (by hash of the sample id) that chooses the epoch."""
    test_share: float = 0.2
    """Share of labels (by hash of the sample id) that Spearman and Pearson are reported on."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "layers", "heads", "max_chunks", "epochs", "batch_size"):
            require(getattr(self, name) >= 1, f"fit.{name}", getattr(self, name), "at least 1")
        require(self.chunk_tokens >= 8, "fit.chunk_tokens", self.chunk_tokens, "at least 8")
        require(len(set(self.features)) == len(self.features), "fit.features", self.features, "each feature once")
        require(0 <= self.cascade_loss < 1, "fit.cascade_loss", self.cascade_loss, "a share from 0 to below 1")
        require(
            self.hidden_size % self.heads == 0,
            "fit.hidden_size",
            self.hidden_size,
            f"a multiple of fit.heads = {self.heads}",
        )
        require(self.earlier_labels >= 0, "fit.earlier_labels", self.earlier_labels, "0 or more")
        require(self.lr > 0, "fit.lr", self.lr, "above 0")
        require(self.weight_decay >= 0, "fit.weight_decay", self.weight_decay, "0 or more")
        for name in ("validation_share", "test_share"):
            require(0 < getattr(self, name) < 1, f"fit.{name}", getattr(self, name), "a share above 0 and below 1")
        require(
            self.validation_share + self.test_share < 0.9,
            "fit.validation_share + fit.test_share",
            self.validation_share + self.test_share,
            "a sum below 0.9",
        )

    @property
    def warm_starts(self) -> bool:
        """Whether a model is fitted from that of the probe before."""
        return self.warm_start and self.model != "ngram"


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Scoring of every candidate with the influence model."""

    chunk_size: int = 2048
    """Samples in one score shard: the unit of work, of resumption and of distribution over ranks."""
    batch_tokens: int | None = None
    """Tokens in one forward pass of an encoder, padding included; null takes 32,768 on a GPU and 4,096 on a CPU, whose caches hold no
    more. Samples of like lengths are read together, inside a chunk, so scores do not depend on the number of ranks."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the encoder; the head is fp32."""

    def __post_init__(self) -> None:
        require(self.chunk_size >= 1, "score.chunk_size", self.chunk_size, "at least 1")
        require(self.batch_tokens is None or self.batch_tokens >= 1, "score.batch_tokens", self.batch_tokens, "null or at least 1")


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Choice of a stage's data from its candidates."""

    ratio: float = 0.2
    """Selected share of the candidates: a stage has steps x batch / ratio candidates."""
    temperature: float = 0.5
    """Temperature of Gumbel-top-k, in standard deviations of the labels: towards 0 plain top-k, large is uniform."""
    materialize: bool = False
    """Also write the selected samples beside the index as ``selected.bin`` and ``selected.idx`` in Megatron's layout, for other trainers:
    in training order, each as a document of sequence_length + 1 tokens."""
    duplicates: Literal["keep", "exact", "near"] = "keep"
    """Candidates that are dropped before the choice, the first in the order of the block being kept: ``exact`` ones have the same tokens as
    an earlier one; ``near`` ones share most of their runs of 5 tokens with it (MinHash)."""
    duplicate_similarity: float = 0.8
    """``near`` only: Jaccard similarity of two samples' runs of 5 tokens from which on they are duplicates."""
    domains: str | None = None
    """A field of ``corpus.metadata_fields`` whose value is a document's domain, for ``floors`` and ``caps``; of ``url`` the host name. A
    sample's domain is that of its first token's document."""
    floors: dict[str, float] = field(default_factory=dict)
    """Least share of the selection by domain; where a domain has too few candidates all of them are taken."""
    caps: dict[str, float] = field(default_factory=dict)
    """Largest share of the selection by domain."""

    def __post_init__(self) -> None:
        require(0 < self.ratio <= 1, "select.ratio", self.ratio, "a share above 0 and at most 1")
        require(
            1e-6 <= self.temperature < math.inf,
            "select.temperature",
            self.temperature,
            "at least 1e-6 (mates-topk is the limit at 0)",
        )
        require(0 < self.duplicate_similarity <= 1, "select.duplicate_similarity", self.duplicate_similarity, "above 0 and at most 1")
        limits = self.floors | self.caps
        require(self.domains is not None or not limits, "select.domains", self.domains, "a metadata field, since floors or caps are set")
        for name, shares in (("floors", self.floors), ("caps", self.caps)):
            for domain, share in shares.items():
                require(0 <= share <= 1, f"select.{name}.{domain}", share, "a share from 0 to 1")
        for domain, share in self.floors.items():
            most = self.caps.get(domain, 1.0)
            require(share <= most, f"select.floors.{domain}", share, f"at most its cap of {most}")
        require(sum(self.floors.values()) <= 1 + 1e-9, "select.floors", self.floors, "shares of at most 1 together")


@dataclass(frozen=True, kw_only=True)
class BaselinesConfig:
    """What the methods that others have published choose by, to compare with; each is asked for in ``methods``."""

    perplexity_keep: Literal["low", "middle", "high"] = "middle"
    """``perplexity``: which candidates are kept, by their loss under the checkpoint before the stage (Marion et al., arXiv 2309.04564,
    found the middle best)."""
    quality_sources: list[str] = field(default_factory=list)
    """``quality``: files of text that is good (as corpus.inputs, at most ``quality_samples`` windows of it are read); empty takes the
    reference tasks' items. The classifier learns to tell it from samples of the pool."""
    quality_samples: int = 20_000
    """``quality``: samples of either kind at most."""
    semdedup_clusters: int | None = None
    """``semdedup``: clusters of k-means on the checkpoint's embeddings; null takes the square root of the candidates."""
    ratings: str | None = None
    """``ratings``: a file of scores of your own (a rating model's, a datamodel's) for the samples of the train corpus: ``.npy`` with a
    float for each, or Parquet with columns sample_id and score."""
    ratings_best: Literal["high", "low"] = "high"
    """``ratings``: which scores are chosen."""
    ratings_temperature: float = 0.0
    """``ratings``: temperature of Gumbel-top-k in the file's unit; 0 is plain top-k."""

    def __post_init__(self) -> None:
        require(self.quality_samples >= 2, "baselines.quality_samples", self.quality_samples, "at least 2")
        clusters = self.semdedup_clusters
        require(clusters is None or clusters >= 1, "baselines.semdedup_clusters", clusters, "null or at least 1")
        require(self.ratings_temperature >= 0, "baselines.ratings_temperature", self.ratings_temperature, "0 or more")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluation of a stage's checkpoint after a short branch with decaying learning rate, which is then thrown away."""

    decay_steps: int = 20
    """Optimizer steps of the branch, linear to 0, on the stage's last samples again; 0 evaluates the checkpoint as it is."""
    holdout_samples: int = 512
    """Samples of the holdout corpus in the held-out loss (fewer where there are fewer)."""
    batch_size: int = 32
    """Samples in one forward pass on one rank."""
    passages: bool = False
    """Also measure the mean loss over all tokens of the held-out reference items (``TASK.passage_loss_nats``)."""
    by: str | None = None
    """A field of ``corpus.metadata_fields`` (of ``url`` the host name) for each value of which the held-out loss is told, too; null for
    none."""
    tasks: list[str] = field(default_factory=list)
    """Zero-shot tasks that lm_eval measures (`pip install mates[eval]`): sciq, arc_easy, arc_challenge, logiqa, openbookqa, boolq,
    hellaswag, piqa, winogrande, and lambada's half that is no reference."""
    task_data: str | None = None
    """Folder with a folder for each task, in it test.jsonl or validation.jsonl (also .gz, .zst, .parquet, and the shards of the model hub);
    lambada also as lambada_test.jsonl. Items are in the hub's form, or of ``choices`` with the number of the right one as ``label``."""
    task_limit: int | None = None
    """Items of each task, the first ones; null for all."""

    def __post_init__(self) -> None:
        require(self.decay_steps >= 0, "evaluate.decay_steps", self.decay_steps, "0 or more")
        for name in ("holdout_samples", "batch_size"):
            require(getattr(self, name) >= 1, f"evaluate.{name}", getattr(self, name), "at least 1")
        unknown = [name for name in self.tasks if name not in EVALUATION_TASKS]
        require(not unknown, "evaluate.tasks", ", ".join(unknown), f"some of {', '.join(EVALUATION_TASKS)}")
        require(len(set(self.tasks)) == len(self.tasks), "evaluate.tasks", self.tasks, "each task once")
        needs_data = bool(self.tasks) and not self.task_data
        require(not needs_data, "evaluate.task_data", self.task_data, "the folder of the tasks' files, since evaluate.tasks names some")
        require(self.task_limit is None or self.task_limit >= 1, "evaluate.task_limit", self.task_limit, "null or at least 1 item")


@dataclass(frozen=True, kw_only=True)
class ResourcesConfig:
    """What SLURM is asked for one kind of job. Null takes what the kind of step has by default."""

    nodes: int | None = None
    """Nodes; null is ``launch.nodes`` for steps on GPUs, otherwise 1."""
    processes: int | None = None
    """Ranks on each node; null is ``launch.processes`` over ``launch.nodes`` for steps on GPUs, otherwise 1."""
    gpus_per_node: int | None = None
    """GPUs asked of each node (``--gpus-per-node``); 0 asks for none, as clusters without them need. Null is one for each rank of a step
    on GPUs, otherwise 0."""
    cpus_per_process: int | None = None
    """Cores of each rank (``--cpus-per-task``); null leaves it to the cluster."""
    memory: str | None = None
    """Memory of a node (``--mem``), such as 200G; null leaves it to the cluster, 0 is all of it."""
    time: str | int | None = None
    """Time limit (``--time``) in quotes, such as "12:00:00" or "2-00:00:00". A step that reaches it saves, goes back to the queue and
    goes on."""
    partition: str | None = None
    """Partition (``--partition``)."""
    options: list[str] = field(default_factory=list)
    """Further options of sbatch, such as --constraint=h100."""

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("processes", 1), ("gpus_per_node", 0), ("cpus_per_process", 1)):
            value = getattr(self, name)
            require(value is None or value >= least, f"launch.slurm: {name}", value, f"null or at least {least}")
        quoted = self.time is None or isinstance(self.time, str)
        require(quoted, "launch.slurm: time", self.time, 'a time in quotes, such as "12:00:00": YAML makes a number of one without them')
        form = 'minutes, "12:00:00" (hours:minutes:seconds) or "2-00:00:00" (with days)'
        require(self.time is None or self.seconds is not None, "launch.slurm: time", self.time, form)
        for name in ("memory", "time", "partition"):
            value = getattr(self, name)
            good = value is None or (value != "" and not set(value) & set(" \n\t\"'"))
            require(good, f"launch.slurm: {name}", value, "null or a word without spaces")
        for option in self.options:
            good = option.startswith("-") and "\n" not in option
            require(good, "launch.slurm: options", option, "an option of sbatch, such as --constraint=h100")

    @property
    def seconds(self) -> float | None:
        """The time limit in seconds; infinite where there is none, None where it is in no form that SLURM reads."""
        text = str(self.time or "UNLIMITED").upper()
        if text in ("UNLIMITED", "INFINITE", "-1", "0"):
            return math.inf
        found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
        if not found:
            return None
        days, first, second, third = (int(part or 0) for part in found.groups())
        if found[1] is None and found[4] is None:  # minutes, or minutes:seconds
            return 60.0 * first + second
        return 86_400.0 * days + 3_600 * first + 60 * second + third


START_SECONDS = 60
SlurmLauncher = Literal["srun", "torchrun", "deepspeed"]


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """How steps run under SLURM (`mates launch slurm`, `mates run --on slurm`)."""

    gpu: ResourcesConfig = field(default_factory=ResourcesConfig)
    """Jobs of steps that run a model: pretrain, probe, evaluate, fit and score with an encoder or a checkpoint."""
    cpu: ResourcesConfig = field(default_factory=ResourcesConfig)
    """Jobs of all others: preprocess, select, n-gram models and so on."""
    steps: dict[str, ResourcesConfig] = field(default_factory=dict)
    """Jobs of one verb, such as ``preprocess: {nodes: 16, processes: 48}``; what is null there is taken from ``gpu`` or ``cpu``."""
    launcher: SlurmLauncher = "srun"
    """Who starts the ranks of a job: srun, one task a rank; or torchrun or deepspeed, started on each node by srun."""
    mpi: str = "pmi2"
    """Interface through which the ranks of preprocess meet (``srun --mpi``): pmi2 for MPICH, pmix for Open MPI."""
    account: str | None = None
    """Account that is billed (``--account``)."""
    setup: list[str] = field(default_factory=list)
    """Commands of the shell that each job runs first, such as ``module load cuda``; where one fails, the job does."""
    srun_options: list[str] = field(default_factory=list)
    """Further options of srun in each job, such as --container-image=mates.sqsh of pyxis."""
    prefix: list[str] = field(default_factory=list)
    """Words before each command that a rank runs, such as [apptainer, exec, --nv, mates.sif]."""
    stop_seconds: int = 120
    """Seconds before the time limit at which a step is asked to save and go back to the queue. SLURM may ask up to a minute earlier."""
    retries: int = 3
    """Times that a job whose step failed by no fault of the recipe (a dead rank, a lost node) goes back to the queue."""

    def __post_init__(self) -> None:
        require(self.stop_seconds >= 0, "launch.slurm.stop_seconds", self.stop_seconds, "0 or more")
        kinds = {"gpu": self.gpu, "cpu": self.cpu} | {f"steps.{verb}": asked for verb, asked in self.steps.items()}
        for name, asked in kinds.items():
            least = self.stop_seconds + START_SECONDS
            expected = f"over {least} s: launch.slurm.stop_seconds = {self.stop_seconds}, and {START_SECONDS} s to start and do something"
            require((asked.seconds or 0) > least, f"launch.slurm.{name}.time", asked.time, expected)
        bad = self.account is not None and bool(set(self.account) & set(" \t\n\"'"))
        require(not bad, "launch.slurm.account", self.account, "a word without spaces")
        require(self.retries >= 0, "launch.slurm.retries", self.retries, "0 or more")
        require(self.mpi != "", "launch.slurm.mpi", self.mpi, "an interface that `srun --mpi=list` names")
        unknown = sorted(set(self.steps) - set(SLURM_VERBS))
        require(not unknown, "launch.slurm.steps", ", ".join(unknown), f"some of {', '.join(SLURM_VERBS)}")


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How many processes the distributed steps use, and where."""

    processes: int = 1
    """Processes (ranks) that `mates run` starts for pretrain (through the deepspeed launcher), probe, fit, score and evaluate: one for
    each GPU, or a share of the cores on a machine without. Under SLURM this counts the ranks of all nodes together."""
    nodes: int = 1
    """Nodes that these ranks are spread over, in equal shares. On one machine it is 1."""
    threads: int = 0
    """CPU threads of a process; 0 divides the machine's cores by the processes."""
    timeout_minutes: float = 30.0
    """Minutes that a rank may be silent (stopped, swapped out, cut off) before the step fails, which names it."""
    peak_tflops: float | None = None
    """Peak rate of one device in TFLOP/s (of its data sheet, dense, in ``pretrain.precision``) that the model FLOPs utilisation in the
    metrics is a share of; null measures the rate of a large matrix product at the start."""
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    """Where metrics go beside metrics.jsonl, through DeepSpeed's monitor: ``run_dir``/tensorboard, or Weights & Biases. Each needs its
    package (`pip install mates[tensorboard]`)."""
    deepspeed: dict[str, object] = field(default_factory=dict)
    """Further keys of the DeepSpeed configuration, passed through as they are."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """Jobs under SLURM."""

    def __post_init__(self) -> None:
        require(self.processes >= 1, "launch.processes", self.processes, "at least 1")
        require(self.nodes >= 1, "launch.nodes", self.nodes, "at least 1")
        whole = self.processes % self.nodes == 0
        require(whole, "launch.processes", self.processes, f"a multiple of launch.nodes = {self.nodes}, since nodes take equal shares")
        require(self.threads >= 0, "launch.threads", self.threads, "0 or more")
        require(self.timeout_minutes > 0, "launch.timeout_minutes", self.timeout_minutes, "above 0")
        require(self.peak_tflops is None or self.peak_tflops > 0, "launch.peak_tflops", self.peak_tflops, "null or above 0")
        for key, place in OWNED_BY_RECIPE.items():
            require(key not in self.deepspeed, f"launch.deepspeed.{key}", self.deepspeed.get(key), f"nothing: {place} says it")
        for key in ("zero_optimization", "tensorboard", "wandb"):
            value = self.deepspeed.get(key, {})
            require(isinstance(value, dict), f"launch.deepspeed.{key}", value, "a mapping")
        zero = self.deepspeed.get("zero_optimization", {})
        for key, place in OWNED_OF_ZERO.items():
            owned = key in zero  # type: ignore[operator]
            require(not owned, f"launch.deepspeed.zero_optimization.{key}", zero, f"nothing: {place} says it")


def check_batches(config: PretrainConfig, ranks: int, whose: str) -> None:
    """Raise RecipeError unless a batch can be shared out to so many ranks, and each one's part cut into micro-batches. ``whose`` number it
    is stands in the message."""
    per_rank, rest = divmod(config.batch_size, ranks)
    require(rest == 0, "pretrain.batch_size", config.batch_size, f"a multiple of {whose} = {ranks}")
    fits = per_rank % min(per_rank, config.micro_batch_size) == 0
    require(fits, "pretrain.micro_batch_size", config.micro_batch_size, f"a divisor of batch_size / processes = {per_rank}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a run depends on."""

    run_dir: str = "runs/default"
    """Folder of the run: all its artifacts, logs and the report."""
    data_dir: str | None = None
    """Folder of tokenizer, corpora and reference; null is ``run_dir``/data. Runs that differ in seed or method can share one."""
    seed: int = 0
    """Key of every random choice of the run."""
    methods: list[Method] = field(default_factory=lambda: ["random", "mates"])
    """Selection methods that are run, each from the same stage-0 checkpoint: uniform ``random``; ``mates`` (Gumbel-top-k on predicted
    influences); ``mates-topk`` (plain top-k on them); ``mates-static`` (Gumbel-top-k by the influence model of stage 1 at all stages);
    and to compare with ``dsir`` (importance resampling on hashed n-grams towards the reference), ``semdedup`` (semantic deduplication),
    ``quality`` (a classifier of good text), ``perplexity`` and ``ratings`` (a file of yours); see ``baselines``."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """Text and how it is split."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Tokenizer of the language model."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """Reference tasks."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Language model."""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """Training."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """Oracle influences."""
    fit: FitConfig = field(default_factory=FitConfig)
    """Influence model."""
    score: ScoreConfig = field(default_factory=ScoreConfig)
    """Scoring."""
    select: SelectConfig = field(default_factory=SelectConfig)
    """Selection."""
    baselines: BaselinesConfig = field(default_factory=BaselinesConfig)
    """Methods to compare with."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Evaluation."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Processes."""

    def __post_init__(self) -> None:
        from mates.engine.pretrain.shapes import resolve_shape

        require(self.run_dir != "", "run_dir", self.run_dir, "a folder")
        for section in section_names():
            for name, value in vars(getattr(self, section)).items():
                require(not isinstance(value, float) or math.isfinite(value), f"{section}.{name}", value, "a finite number")
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 4294967295")
        require(len(self.methods) > 0, "methods", self.methods, "at least one method")
        require(len(set(self.methods)) == len(self.methods), "methods", self.methods, "each method once")
        knows_tokenizer = self.tokenizer.path is not None or self.corpus.union
        require(
            self.model.weights is None or bool(knows_tokenizer),
            "tokenizer.path",
            self.tokenizer.path,
            f"the tokenizer that model.weights was trained with, perhaps {self.model.weights} itself",
        )
        shape = resolve_shape(self.model)
        length = self.pretrain.sequence_length
        require(
            length <= shape.max_positions,
            "pretrain.sequence_length",
            length,
            f"at most the model's max_positions = {shape.max_positions}",
        )
        require(
            "ratings" not in self.methods or self.baselines.ratings is not None,
            "baselines.ratings",
            self.baselines.ratings,
            "a file of scores, since ratings is among the methods",
        )
        middle = "perplexity" in self.methods and self.baselines.perplexity_keep == "middle"
        require(
            not (middle and (self.select.floors or self.select.caps)),
            "baselines.perplexity_keep",
            self.baselines.perplexity_keep,
            "low or high where select.floors or select.caps are set",
        )
        known = self.corpus.metadata_fields
        for name, value, nothing in (("select.domains", self.select.domains, ""), ("evaluate.by", self.evaluate.by, "null or ")):
            is_kept = value is None or value in known or bool(self.corpus.union)
            require(is_kept, name, value, f"{nothing}one of corpus.metadata_fields: {', '.join(known)}")
        check_batches(self.pretrain, self.launch.processes, "launch.processes")
        require(
            self.evaluate.decay_steps <= self.pretrain.steps_per_stage,
            "evaluate.decay_steps",
            self.evaluate.decay_steps,
            f"at most pretrain.steps_per_stage = {self.pretrain.steps_per_stage}: the branch re-reads the stage's last samples",
        )
        require(
            not self.probe.after_decay or self.evaluate.decay_steps > 0,
            "evaluate.decay_steps",
            self.evaluate.decay_steps,
            "above 0 where probe.after_decay asks for the branch",
        )
        require(
            self.fit.model == "ngram"
            or self.fit.encoder is not None
            or self.fit.chunk_tokens * self.fit.max_chunks >= self.pretrain.sequence_length,
            "fit.chunk_tokens x fit.max_chunks",
            self.fit.chunk_tokens * self.fit.max_chunks,
            f"at least pretrain.sequence_length = {length}, or the encoder would not see whole samples",
        )

    def path(self) -> Path:
        """The run's folder."""
        return Path(self.run_dir)


def require_packages(recipe: Recipe) -> None:
    """RecipeError where an optional package that the recipe asks for is not installed."""
    wanted: list[tuple[str, str, str]] = [("launch.trackers", name, name) for name in recipe.launch.trackers]
    if recipe.pretrain.fused_loss == "always":
        wanted.append(("pretrain.fused_loss", "liger_kernel", "liger-kernel"))
    if recipe.evaluate.tasks:
        wanted += [("evaluate.tasks", module, "mates[eval]") for module in ("lm_eval", "accelerate")]
    for name, module, package in wanted:
        if not is_installed(module):
            missing = module if "[" in package else package
            raise RecipeError(f"{name}: the package {missing} is not installed; run `pip install {package}` or leave it out")


def is_installed(module: str) -> bool:
    """Whether a package can be imported; a mere folder of its name, as wandb writes one, is none."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def section_names() -> list[str]:
    """Names of the recipe's sections (fields that are dataclasses), in order."""
    scalars = {"run_dir", "data_dir", "seed", "methods"}
    return [item.name for item in fields(Recipe) if item.name not in scalars]
