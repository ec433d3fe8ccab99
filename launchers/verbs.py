"""What each verb does with its arguments. Heavy imports stay inside functions, so that help and bad recipes answer at once."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jsonargparse

from mates.engine.config import INFLUENCE_METHODS, SAMPLE, Recipe, RecipeError, require, require_packages
from mates.engine.pretrain.vigilance import STOPPED, BadStepError, StopRequestedError, StopSignals
from mates.launchers.recipe import dump_recipe, parse_with, recipe_parser
from mates.preprocess.artifact import DiskFullError

INFLUENCE_VERBS = ("probe", "fit")
"""Verbs of methods that choose by influence."""
SCORING_VERBS = (*INFLUENCE_VERBS, "score")
"""Verbs of stages after the first."""
RUN_LOCK = ".run.lock"
RECIPE_FILE, ATTEMPT_FILE = "recipe.yaml", ".recipe.yaml"


@dataclass(frozen=True)
class Verb:
    """A verb: one line about it, and what it does with the arguments after it."""

    summary: str
    run: Callable[[list[str]], int]


def user_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is all that a user needs."""
    from mates.engine.data.blocks import CorpusTooSmallError
    from mates.engine.distributed import LaunchError
    from mates.launchers.local import StepFailedError
    from mates.preprocess.artifact import ArtifactError
    from mates.preprocess.corpus import CorpusError
    from mates.preprocess.inputs import InputError
    from mates.preprocess.ranks import RanksError
    from mates.preprocess.tokenizer import TokenizerError
    from mates.preprocess.workers import WorkerDiedError

    errors: list[type[Exception]] = [
        ArtifactError,
        InputError,
        TokenizerError,
        CorpusTooSmallError,
        StepFailedError,
        LaunchError,
        RunBusyError,
        CorpusError,
        RanksError,
        WorkerDiedError,
        BadStepError,
    ]
    return tuple(errors)


STEP_FAILED = (RuntimeError, DiskFullError)
"""Errors that are no fault of recipe, argument or input: exit code 1 instead of 2."""


class RunBusyError(RuntimeError):
    """Another process works in the same run folder."""


# --- data verbs ----------------------------------------------------------------------------------------------------


def _data_verb(name: str, summary: str) -> Verb:
    def run(arguments: list[str]) -> int:
        recipe, _ = parse_with(recipe_parser(name, summary), arguments)
        data_step(name, recipe)
        return 0

    return Verb(summary, run)


def data_step(name: str, recipe: Recipe) -> None:
    """Run one of the data steps."""
    from mates.engine.data import steps

    work: dict[str, Callable[[Recipe], Any]] = {
        "sample-corpus": steps.sample_corpus_step,
        "tokenizer": steps.tokenizer_step,
        "preprocess": steps.preprocess_step,
        "reference": steps.reference_step,
    }
    work[name](recipe)


def _preprocess(arguments: list[str]) -> int:
    """As one of however many ranks mpirun or srun started. What is wrong is said once; all ranks end with the same exit code."""
    from mates.engine.data.steps import preprocess_step
    from mates.preprocess.ranks import MpiRanks, find_ranks, is_agreed, on_all

    def parse() -> Recipe | None:
        try:
            return parse_with(recipe_parser("preprocess", VERBS["preprocess"].summary), arguments)[0]
        except SystemExit as stop:  # help, or a word that the parser has said already
            if stop.code:
                raise RecipeError(f"rank {ranks.rank}: the arguments cannot be read") from None
            return None

    ranks = find_ranks()  # first of all, since a rank that ends before MPI has started is waited for
    if not isinstance(ranks, MpiRanks):
        preprocess_step(parse_with(recipe_parser("preprocess", VERBS["preprocess"].summary), arguments)[0])
        return 0
    try:
        recipes = on_all(ranks, parse)
        recipe = recipes[0]
        if recipe is not None and all(recipes):
            preprocess_step(recipe, ranks)
    except KeyboardInterrupt:
        print("mates preprocess: interrupted; the same command continues where this one stopped", file=sys.stderr, flush=True)
        ranks.abort(130)
    except Exception as error:
        if not is_agreed(error):  # the other ranks know nothing of it
            traceback.print_exc()
            ranks.abort(1)
        if ranks.rank == 0:
            raise
        return 1 if isinstance(error, STEP_FAILED) else 2
    return 0


def _sample_corpus(arguments: list[str]) -> int:
    """``mates sample-corpus`` alone writes to a folder; with a recipe it writes where the recipe's run looks for it."""
    parser = recipe_parser("sample-corpus", VERBS["sample-corpus"].summary)
    parser.add_argument("--out", type=str | None, default=None, help="Folder for the shards, instead of the run's own.")
    recipe, extra = parse_with(parser, arguments)
    if extra["out"] is None:
        data_step("sample-corpus", recipe)
        return 0
    from mates.engine.progress import say
    from mates.preprocess.sample_corpus import write_sample_corpus

    write_sample_corpus(Path(extra["out"]), seed=recipe.corpus.split_seed, max_text_bytes=recipe.corpus.sample_bytes, progress=say)
    return 0


# --- stage verbs ---------------------------------------------------------------------------------------------------


def _stage_parser(name: str, summary: str) -> jsonargparse.ArgumentParser:
    parser = recipe_parser(name, summary)
    parser.add_argument(
        "--method",
        type=str | None,
        default=None,
        help="The run's method that the stage belongs to; stage 0 belongs to `shared`. By default the only one that it can be.",
    )
    first = 1 if name in SCORING_VERBS else 0
    parser.add_argument("--stage", type=int, default=first, help=f"The stage, from {first}.")
    return parser


def _stage_verb(name: str, summary: str) -> Verb:
    def run(arguments: list[str]) -> int:
        recipe, extra = parse_with(_stage_parser(name, summary), arguments)
        method, stage = chosen_stage(recipe, name, extra["method"], extra["stage"])
        if name == "select" and int(os.environ.get("WORLD_SIZE", "1")) == 1:
            stage_step(name, recipe, method, stage)
            return 0
        signals, is_first, code = StopSignals(at_once=name != "pretrain"), os.environ.get("RANK", "0") == "0", 0
        try:
            stage_step(name, recipe, method, stage, signals)
        except StopRequestedError as stop:
            code = STOPPED
            if is_first:
                print(stop)
        except BadStepError as error:
            code = 1
            if is_first:  # the others know no more
                print(f"mates {name}: {error}", file=sys.stderr)
        # All is on disk. Interpreter shutdown beside the libraries' own threads was seen to abort a finished rank; skip it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    return Verb(summary, run)


def chosen_stage(recipe: Recipe, verb: str, method: str | None, stage: int) -> tuple[str, int]:
    """The method and stage that are meant. RecipeError for what the recipe does not have."""
    stages = list(range(1 if verb in SCORING_VERBS else 0, recipe.pretrain.stages))
    require(stage in stages, "--stage", stage, f"one of {stages} for {verb}")
    if stage == 0:
        require(method in (None, "shared"), "--method", method, "shared, which stage 0 belongs to")
        return "shared", 0
    known, why = list(recipe.methods), ""
    if verb in INFLUENCE_VERBS:
        known, why = [name for name in known if name in INFLUENCE_METHODS], " that choose by influence"
    elif verb == "score":
        known, why = [name for name in known if name != "random"], " that choose by scores"
    if method in recipe.methods:
        why += f" ({method} needs no {verb})"
    if method is None and len(known) == 1:
        return known[0], stage
    hint = "; how influences are measured is --probe.method" if verb == "probe" else ""
    require(method in known, "--method", method, f"one of the recipe's methods{why}: {', '.join(known)}{hint}")
    assert method is not None
    return method, stage


def stage_step(name: str, recipe: Recipe, method: str, stage: int, signals: StopSignals | None = None) -> None:
    """Run one step of a stage in this process, as one rank of however many the launcher started."""
    from mates.engine.loop import Step, check_needed

    step = Step(name, method, stage)
    if name == "select" and int(os.environ.get("WORLD_SIZE", "1")) == 1:  # no process group for what takes seconds
        from mates.engine.select.stage import select_stage

        check_needed(recipe, step)
        select_stage(recipe, method, stage)
        return
    from mates.engine import distributed
    from mates.preprocess.workers import hold_worker_lock

    lock = hold_worker_lock(recipe.path())
    world = distributed.join(timeout_minutes=recipe.launch.timeout_minutes, threads=recipe.launch.threads)
    try:
        world.same(lambda: check_needed(recipe, step))
        _stage_work(name, signals)(recipe, world, method, stage)
    finally:
        distributed.leave()
        lock.close()


def _stage_work(name: str, signals: StopSignals | None) -> Callable[..., Any]:
    if name == "pretrain":
        from mates.engine.pretrain.stage import pretrain_stage

        return partial(pretrain_stage, signals=signals)
    if name == "probe":
        from mates.engine.probe.stage import probe_stage

        return probe_stage
    if name == "fit":
        from mates.engine.influence.fit import fit_stage

        return fit_stage
    if name == "score":
        from mates.engine.influence.score import score_stage

        return score_stage
    if name == "select":
        from mates.engine.select.stage import select_stage

        def select(recipe: Recipe, world: Any, method: str, stage: int) -> Any:
            return select_stage(recipe, method, stage, world)

        return select
    from mates.engine.evaluate.stage import evaluate_stage

    return evaluate_stage


# --- the whole run -------------------------------------------------------------------------------------------------


def _run(arguments: list[str]) -> int:
    from mates.launchers.local import STOPPING

    recipe, _ = parse_with(recipe_parser("run", VERBS["run"].summary), arguments)
    STOPPING.listen()
    run_recipe(recipe)
    return 0


def run_recipe(recipe: Recipe) -> None:
    """Run all steps of a recipe; finished ones are skipped.

    Raises:
        RunBusyError: another ``mates run`` works in the folder. StepFailedError: a step's processes failed.
    """
    from mates.engine.evaluate.report import write_report
    from mates.engine.layout import layout_of
    from mates.engine.loop import DISTRIBUTED_VERBS, run_steps, step_request
    from mates.engine.progress import say
    from mates.launchers.local import console_script, run_plain, run_with_deepspeed

    check_paths(recipe)
    with run_lock(recipe.path()):
        path, said = recipe.path() / ATTEMPT_FILE, recipe.path() / RECIPE_FILE
        write_recipe(path, recipe)
        if not said.exists():  # that of finished work stays until this one has been through all steps
            write_recipe(said, recipe)
        started = time.perf_counter()
        for step in run_steps(recipe):
            if step.verb == "report":
                write_report(recipe)
            elif step.method is None or step.stage is None:
                data_step(step.verb, recipe)
                if step.verb == "preprocess":
                    check_sizes(recipe)
            elif step.verb == "select":
                stage_step("select", recipe, step.method, step.stage)
            elif not step_request(recipe, step).find():
                command = [
                    console_script("mates"),
                    step.verb,
                    "--recipe",
                    str(path),
                    "--method",
                    step.method,
                    "--stage",
                    str(step.stage),
                ]
                processes = recipe.launch.processes if step.verb in DISTRIBUTED_VERBS else 1
                if step.verb == "pretrain":
                    run_with_deepspeed(command, processes)
                else:
                    run_plain(command, processes)
        path.replace(said)
        say(f"run: done in {time.perf_counter() - started:.0f} s; open {layout_of(recipe).report}")


def write_recipe(path: Path, recipe: Recipe) -> None:
    """Write a recipe as YAML."""
    from mates.preprocess.artifact import atomic_file

    with atomic_file(path) as handle:
        handle.write(dump_recipe(recipe).encode())


def check_paths(recipe: Recipe) -> None:
    """Refuse files that are not there before the hours of work that come before their use."""
    from mates.engine.flops import shape_of
    from mates.engine.layout import union_layouts
    from mates.preprocess.artifact import MANIFEST_NAME, read_json
    from mates.preprocess.inputs import find_inputs
    from mates.preprocess.tokenizer import load_encoder_tokenizer, load_tokenizer, looks_like_path

    require_packages(recipe)
    check_model(recipe)
    find_inputs([item for item in recipe.corpus.inputs if item != SAMPLE])
    for part in union_layouts(recipe):
        there = (part.corpus("train") / MANIFEST_NAME).is_file()
        require(there, "corpus.union", str(part.data), "a data folder in which `mates preprocess` has finished")
    reference = recipe.reference
    sources = [] if reference.source == SAMPLE else [("reference.source", Path(reference.source))]
    sources += [(f"reference.more ({task.name}).source", Path(task.source)) for task in reference.more]
    sources += [("reference.avoid", path) for _, path in reference.avoided()]
    for name, path in sources:
        require(path.is_file(), name, str(path), "a file that is there")
    if recipe.tokenizer.path is not None and looks_like_path(recipe.tokenizer.path):
        load_tokenizer(Path(recipe.tokenizer.path), recipe.tokenizer.end_of_document, recipe.corpus.special_token_text)
    if recipe.corpus.scorer_tokenizer is not None:
        load_encoder_tokenizer(Path(recipe.corpus.scorer_tokenizer))
    if "ratings" in recipe.methods:
        ratings = recipe.baselines.ratings
        require(ratings is not None and Path(ratings).is_file(), "baselines.ratings", ratings, "a file that is there")
    if "quality" in recipe.methods:
        find_inputs(recipe.baselines.quality_sources)
    encoder = recipe.fit.encoder
    if encoder is not None and looks_like_path(encoder):
        config = Path(encoder) / "config.json"
        require(config.is_file(), "fit.encoder", encoder, "a Hugging Face folder with a config.json")
        raw = read_json(config)
        try:
            shape_of(raw)
        except KeyError as error:
            raise RecipeError(f"fit.encoder: {config} has {error.args[0]}, expected the shape of a transformer encoder") from error
        positions = raw.get("max_position_embeddings") or recipe.fit.chunk_tokens
        require(recipe.fit.chunk_tokens <= positions, "fit.chunk_tokens", recipe.fit.chunk_tokens, f"at most the {positions} of {encoder}")


def check_model(recipe: Recipe) -> None:
    """Refuse a transformers configuration, weights or their tokenizer that training could not start from, before anything is made."""
    from mates.engine.layout import union_layouts
    from mates.engine.pretrain.shapes import config_file, resolve_shape

    file = config_file(recipe.model)
    if file is None:
        return
    import torch

    from mates.engine.pretrain.model import build_empty, check_weights, model_config, padded_vocabulary
    from mates.preprocess.artifact import ArtifactError, read_json
    from mates.preprocess.tokenizer import HuggingFaceTokenizer, load_tokenizer

    shape = resolve_shape(recipe.model)
    try:
        build_empty(model_config(shape, 64, 0), torch.float32, torch.device("cpu"))
    except RecipeError as error:
        raise RecipeError(f"{file}: {error}") from error
    if recipe.model.weights is None:
        return
    folder = Path(recipe.model.weights)
    check_weights(folder)
    used = union_layouts(recipe)[0].tokenizer if recipe.corpus.union else Path(recipe.tokenizer.path or "")
    if not used.exists():  # a name on the model hub
        return
    tokenizer = load_tokenizer(used, recipe.tokenizer.end_of_document)
    rows, held = padded_vocabulary(tokenizer.vocab_size, recipe.model.vocab_multiple), read_json(file).get("vocab_size")
    multiple = recipe.model.vocab_multiple
    require(rows == held, "model.vocab_multiple", multiple, f"one that makes {held} rows of {tokenizer.vocab_size} token ids, not {rows}")
    if (folder / "tokenizer.json").exists() and isinstance(tokenizer, HuggingFaceTokenizer):
        own = load_tokenizer(folder / "tokenizer.json", recipe.tokenizer.end_of_document)
        assert isinstance(own, HuggingFaceTokenizer)
        if own.library.get_vocab() != tokenizer.library.get_vocab():
            raise ArtifactError(f"{used}: not the tokenizer that {folder} was trained with; set tokenizer.path to {folder}")


def check_sizes(recipe: Recipe) -> None:
    """Refuse corpora that are too small for a later step of the recipe, as soon as their sizes are known."""
    from mates.engine.data.blocks import block_sizes, make_blocks
    from mates.engine.data.corpus import open_corpus
    from mates.engine.influence.features import unprobed_samples
    from mates.engine.influence.fit import check_parts, split_labels
    from mates.engine.layout import layout_of
    from mates.engine.probe.stage import probed_samples
    from mates.engine.select.methods import needs_influences

    length = recipe.pretrain.sequence_length
    train, pool = (open_corpus(layout_of(recipe).corpus(split), length) for split in ("train", "pool"))
    make_blocks(recipe, train.samples)
    for stage in range(recipe.pretrain.stages):
        if any(needs_influences(method, stage) for method in recipe.methods):
            check_parts(split_labels(probed_samples(recipe, pool.samples, stage), recipe.fit, recipe.seed))
            if recipe.fit.features:
                unprobed_samples(recipe, pool, stage)
    clusters = recipe.baselines.semdedup_clusters
    if "semdedup" in recipe.methods and clusters is not None and recipe.pretrain.stages > 1:
        count = block_sizes(recipe)[1]
        require(clusters <= count, "baselines.semdedup_clusters", clusters, f"at most the {count} candidates of a stage")
    if "ratings" in recipe.methods and recipe.baselines.ratings is not None:
        from mates.engine.baselines.ratings import read_ratings

        read_ratings(Path(recipe.baselines.ratings), train.samples)
    if recipe.select.domains is not None and recipe.pretrain.stages > 1:
        from mates.engine.select.domains import Domains

        Domains(train, recipe.select)


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the run's folder: one ``mates run`` at a time, and none while processes of an earlier one are still ending."""
    from mates.preprocess.workers import WORKERS_LOCK, try_lock

    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / RUN_LOCK).open("ab") as own:
        if not try_lock(own, 0):
            raise RunBusyError(f"{run_dir}: another `mates run` is working here; wait for it, or choose another run_dir")
        with (run_dir / WORKERS_LOCK).open("ab") as workers:
            if not try_lock(workers, 60):
                raise RunBusyError(f"{run_dir}: processes of an earlier run are still working here; end them first")
        yield


# --- telling -------------------------------------------------------------------------------------------------------


def _report(arguments: list[str]) -> int:
    from mates.engine.evaluate.report import write_report
    from mates.engine.progress import say

    recipe, _ = parse_with(recipe_parser("report", VERBS["report"].summary), arguments)
    require(recipe.path().is_dir(), "run_dir", recipe.run_dir, "the folder of a run: nothing has been run there")
    say(f"report: {write_report(recipe)}")
    return 0


def _plan(arguments: list[str]) -> int:
    parser = recipe_parser("plan", VERBS["plan"].summary)
    parser.add_argument(
        "--peak_tflops",
        type=float,
        default=989.0,
        help="Dense bf16 TFLOP/s of one device (989: an H100 or H200 by its datasheet).",
    )
    parser.add_argument("--utilisation", type=float, default=0.4, help="Share of the peak that is reached (0 to 1).")
    parser.add_argument("--devices", type=int, default=8, help="Devices that work at the same time.")
    recipe, extra = parse_with(parser, arguments)
    require(extra["peak_tflops"] > 0, "--peak_tflops", extra["peak_tflops"], "above 0")
    require(0 < extra["utilisation"] <= 1, "--utilisation", extra["utilisation"], "above 0 and at most 1")
    require(extra["devices"] >= 1, "--devices", extra["devices"], "at least 1")
    from mates.engine.plan import Device, describe
    from mates.preprocess.artifact import ArtifactError
    from mates.preprocess.inputs import InputError
    from mates.preprocess.tokenizer import TokenizerError

    try:
        check_paths(recipe)
    except (ArtifactError, InputError, RecipeError, TokenizerError) as error:
        print(f"missing     {error}")
    for line in describe(recipe, Device(extra["peak_tflops"] * 1e12, extra["utilisation"], extra["devices"])):
        print(line)
    return 0


def _inspect(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="mates inspect", description="Explain any artifact, and verify every byte of it.")
    parser.add_argument("path", type=Path, help="an artifact's folder or a file in it, or a folder of artifacts such as a run")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="hash every byte and compare with the manifest, on all cores; --no-verify checks sizes and formats only",
    )
    from mates.engine.inspect import artifacts_below, describe
    from mates.preprocess.artifact import ArtifactError

    given = parser.parse_args(arguments)
    damaged = 0
    for directory in artifacts_below(given.path):
        try:
            print("\n".join(describe(directory, verify=given.verify)))
        except ArtifactError as error:
            damaged += 1
            print(f"{directory}: DAMAGED\n  {error}")
    return 1 if damaged else 0


VERBS: dict[str, Verb] = {
    "run": Verb("run all steps of a recipe; finished ones are skipped, interrupted ones continued", _run),
    "plan": Verb("say what a run will take, before anything runs: tokens, FLOPs, hours, disk, memory", _plan),
    "sample-corpus": Verb("write the embedded corpus of real English and its reference task", _sample_corpus),
    "tokenizer": _data_verb("tokenizer", "take or train the tokenizer"),
    "preprocess": Verb("tokenize documents into memory-mapped indexed corpora", _preprocess),
    "reference": _data_verb("reference", "pack the reference tasks into tokens and labels"),
    "pretrain": _stage_verb("pretrain", "train one stage on its selection index"),
    "probe": _stage_verb("probe", "measure oracle influences on the checkpoint before a stage"),
    "fit": _stage_verb("fit", "fit the influence model of a stage to its oracle influences"),
    "score": _stage_verb("score", "score a stage's candidates with its influence model"),
    "select": _stage_verb("select", "choose a stage's data from its candidates"),
    "evaluate": _stage_verb("evaluate", "measure a stage's checkpoint after a decay branch"),
    "report": Verb("write the ledger and report.html of a run", _report),
    "inspect": Verb("explain any artifact and verify every byte of it", _inspect),
}
