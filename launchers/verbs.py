"""What each verb does with its arguments. Heavy imports stay inside functions, so that help and bad recipes answer at once."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import jsonargparse

from mates.engine.config import EVALUATION_TASKS, Recipe, RecipeError, require, require_packages
from mates.engine.pretrain.vigilance import BAD_STEP, STOP_SIGNALS, STOPPED, BadStepError, StopRequestedError, StopSignals
from mates.engine.ranks import find_place
from mates.launchers.checks import check_paths
from mates.launchers.errors import STEP_FAILED, user_errors
from mates.launchers.recipe import load_recipe, parse_with, recipe_parser
from mates.launchers.run import ATTEMPT_FILE, RECIPE_FILE, run_on_slurm, run_recipe
from mates.launchers.steps import SCORING_VERBS, chosen_stage, data_step, selects_alone, stage_step

LOOK_SECONDS = 2
"""A rank that fails since another has died outlives it by more than a launcher takes to look: the first one's exit code says why."""


@dataclass(frozen=True)
class Verb:
    """A verb: one line about it, and what it does with the arguments after it."""

    summary: str
    run: Callable[[list[str]], int]


# --- data verbs ----------------------------------------------------------------------------------------------------


def _data_verb(name: str, summary: str) -> Verb:
    def run(arguments: list[str]) -> int:
        recipe, _ = parse_with(recipe_parser(name, summary), arguments)
        data_step(name, recipe)
        return 0

    return Verb(summary, run)


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
        return _run_stage(name, recipe, extra)

    return Verb(summary, run)


def _run_stage(name: str, recipe: Recipe, extra: dict[str, Any]) -> int:
    """One step of a stage from the verb's own options. Ends the process with the step's exit code."""
    method, stage = chosen_stage(recipe, name, extra["method"], extra["stage"])
    if selects_alone(name):
        stage_step(name, recipe, method, stage)
        return 0
    signals, is_first, code = StopSignals(at_once=name != "pretrain"), find_place().rank == 0, 0
    try:
        stage_step(name, recipe, method, stage, signals)
    except StopRequestedError as stop:
        code = STOPPED
        if is_first:
            print(stop)
    except BadStepError as error:
        code = BAD_STEP
        if is_first:  # the others know no more
            print(f"mates {name}: {error}", file=sys.stderr)
    except Exception as error:
        if isinstance(error, (RecipeError, OSError, *user_errors())):  # they are told in a line
            raise
        code = 1
        sys.excepthook(type(error), error, error.__traceback__)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        time.sleep(LOOK_SECONDS)
    # All is on disk, or lost. Interpreter shutdown beside the libraries' own threads was seen to abort a finished rank, and to take
    # seconds in which the others wait for one that failed; skip it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _evaluate(arguments: list[str]) -> int:
    """A stage of a run, or with ``--export`` a Hugging Face folder, for which no run is needed."""
    parser = _stage_parser("evaluate", VERBS["evaluate"].summary)
    parser.add_argument(
        "--export",
        type=str | None,
        default=None,
        help="A Hugging Face folder: its evaluate.tasks are measured, and no run is needed.",
    )
    parser.add_argument("--out", type=str | None, default=None, help="With --export: a JSON file for the results.")
    recipe, extra = parse_with(parser, arguments)
    if extra["export"] is None:
        require(extra["out"] is None, "--out", extra["out"], "--export beside it; a stage's results go into its evaluation")
        return _run_stage("evaluate", recipe, extra)
    folder, tasks = Path(extra["export"]), recipe.evaluate.tasks
    require((folder / "config.json").is_file(), "--export", extra["export"], "a Hugging Face folder with a config.json")
    require(len(tasks) > 0, "evaluate.tasks", tasks, f"at least one of {', '.join(EVALUATION_TASKS)}")
    require_packages(recipe)
    from mates.engine import distributed
    from mates.engine.evaluate.task_data import find_files
    from mates.engine.evaluate.zero_shot import evaluate_tasks, table
    from mates.preprocess.artifact import write_json

    for name in tasks:
        find_files(name, Path(recipe.evaluate.task_data or ""))
    world = distributed.join(timeout_minutes=recipe.launch.timeout_minutes, threads=recipe.launch.threads)
    try:
        results = evaluate_tasks(folder, world, recipe.evaluate, recipe.corpus.split_seed)
    finally:
        distributed.leave()
    if world.first:
        print("\n".join(table(results.found)))
        if extra["out"] is not None:
            write_json(Path(extra["out"]), results.found | {"model": str(folder), "cost": asdict(results.cost)})
    return 0


# --- the whole run -------------------------------------------------------------------------------------------------


def _run(arguments: list[str]) -> int:
    from mates.launchers.local import STOPPING

    parser = recipe_parser("run", VERBS["run"].summary)
    parser.add_argument("--on", type=Literal["local", "slurm"], default="local", help="This machine, or a chain of jobs under SLURM.")
    parser.add_argument("--wait", action="store_true", help="With --on slurm: stay until the last job has ended.")
    parser.add_argument("--dry-run", action="store_true", help="With --on slurm: print the jobs' scripts and submit nothing.")
    recipe, extra = parse_with(parser, arguments)
    if extra["on"] == "slurm":
        run_on_slurm(recipe, waits=extra["wait"], dry_run=extra["dry_run"])
        return 0
    for name in ("wait", "dry_run"):
        require(not extra[name], f"--{name.replace('_', '-')}", True, "--on slurm beside it; `mates plan` tells what a run will take")
    require(recipe.launch.nodes == 1, "launch.nodes", recipe.launch.nodes, "1 on this machine; `mates run --on slurm` uses several")
    STOPPING.listen()
    run_recipe(recipe)
    return 0


LAUNCH_HELP = """usage: {usage}

{summary}.

modes:
  local       this machine, as `mates run` does
  deepspeed   machines reached by ssh, through the deepspeed launcher and pdsh
  slurm       a job; inside an allocation at once
  mpi         mpirun of MPICH or Open MPI

verbs: {verbs}

options, beside those of the verb (`mates launch slurm pretrain --help` lists all):
  --nodes N                 machines
  --gpus-per-node G         ranks on each machine, each with a GPU
  --processes-per-node P    ranks on each machine, without asking for GPUs
  --hostfile FILE           deepspeed, mpi: the machines, a line for each (`name slots=8`)
  --launcher NAME           slurm: srun, torchrun or deepspeed; deepspeed: pdsh and others
  --wait                    slurm: stay until the job has ended
  --dry-run                 print the script or command, and start nothing"""


def _launch(arguments: list[str]) -> int:
    from mates.engine.config import SLURM_VERBS, SlurmLauncher
    from mates.engine.loop import STAGE_VERBS, Step
    from mates.launchers import launch
    from mates.launchers.local import STOPPING

    usage = "mates launch {local,deepspeed,slurm,mpi} VERB RECIPE [--nodes N] [--gpus-per-node G] [--dry-run] [options of the verb]"
    if len(arguments) < 2 or arguments[0] not in launch.MODES or arguments[1] not in SLURM_VERBS:
        if "-h" in arguments or "--help" in arguments:
            print(LAUNCH_HELP.format(usage=usage, summary=VERBS["launch"].summary, verbs=", ".join(SLURM_VERBS)))
            return 0
        raise RecipeError(f"usage: {usage}; verbs: {', '.join(SLURM_VERBS)}")
    mode, verb = arguments[:2]
    parser = _stage_parser(verb, VERBS[verb].summary) if verb in STAGE_VERBS else recipe_parser(verb, VERBS[verb].summary)
    parser.usage = usage
    parser.add_argument("--nodes", type=int | None, default=None, help="Machines; by default as many as the recipe says.")
    parser.add_argument("--gpus-per-node", type=int | None, default=None, help="Ranks on each machine, each with a GPU.")
    parser.add_argument("--processes-per-node", type=int | None, default=None, help="Ranks on each machine, without asking for GPUs.")
    parser.add_argument("--hostfile", type=str | None, default=None, help="deepspeed, mpi: the machines, a line for each (`name slots=8`).")
    parser.add_argument("--launcher", type=str | None, default=None, help="slurm: srun, torchrun or deepspeed; deepspeed: pdsh and others.")
    parser.add_argument("--dry-run", action="store_true", help="Print the exact script or command, and start nothing.")
    parser.add_argument("--wait", action="store_true", help="slurm: stay until the job has ended.")
    recipe, extra = parse_with(parser, arguments[2:])
    method, stage = None, None
    if verb in STAGE_VERBS:
        method, stage = chosen_stage(recipe, verb, extra["method"], extra["stage"])
    step = Step(verb, method, stage)
    recipe = launch.with_ranks(recipe, step, extra["nodes"], extra["gpus_per_node"], extra["processes_per_node"])
    if mode == "slurm":
        known = get_args(SlurmLauncher)
        require(extra["launcher"] in (None, *known), "--launcher", extra["launcher"], f"one of {', '.join(known)}")
    STOPPING.listen()
    launch.start(
        cast(launch.Mode, mode),
        recipe,
        step,
        launch.Options(**{name: extra[name] for name in ("nodes", "hostfile", "launcher", "dry_run", "wait")}),
    )
    return 0


def _forward(arguments: list[str]) -> int:
    from mates.launchers.local import STOPPING, run_command

    if arguments in (["-h"], ["--help"]):
        print(f"usage: mates forward -- COMMAND ...\n\n{VERBS['forward'].summary}")
        return 0
    require(len(arguments) > 1 and arguments[0] == "--", "arguments", " ".join(arguments), "`-- COMMAND ...`")
    STOPPING.listen()
    run_command(arguments[1:], os.environ)
    return 0


def _of_run(name: str, arguments: list[str]) -> tuple[Recipe, argparse.Namespace]:
    """The recipe of a run that is named by its folder or its recipe's file."""
    parser = argparse.ArgumentParser(prog=f"mates {name}", description=VERBS[name].summary)
    parser.add_argument("run", type=Path, help="a run's folder, or a recipe file")
    if name == "status":
        parser.add_argument("--json", action="store_true", help="print JSON, a list of steps")
    given = parser.parse_args(arguments)
    path: Path = given.run
    if not path.is_dir():
        return load_recipe(path), given
    launched = sorted(path.glob("launch/*.yaml"), key=lambda file: -file.stat().st_mtime)
    found = [file for file in (path / ATTEMPT_FILE, path / RECIPE_FILE, *launched) if file.exists()]
    require(bool(found), "RUN", str(path), f"the folder of a run, in which there is a {RECIPE_FILE}")
    recipe, folder = load_recipe(found[0]), path.absolute()
    below = len(recipe.path().parts)
    if not recipe.path().is_absolute() and folder.parts[-below:] == recipe.path().parts:
        os.chdir(folder.parents[below - 1])  # the recipe's paths are relative to where the run was begun
    elif recipe.path().resolve() != folder.resolve():  # moved, or copied: another run's jobs are not its own
        recipe = replace(recipe, run_dir=str(folder))
    return recipe, given


def _status(arguments: list[str]) -> int:
    from mates.launchers.slurm import status

    recipe, given = _of_run("status", arguments)
    states = status(recipe)
    if given.json:
        print(json.dumps([asdict(state) for state in states], indent=2))
    else:
        for state in states:
            print("\n".join(state.lines()))
    return 0


def _cancel(arguments: list[str]) -> int:
    from mates.launchers.slurm import cancel

    recipe, _ = _of_run("cancel", arguments)
    jobs = cancel(recipe.path())
    for job in jobs:
        print(f"cancelled {job.name} ({job.job})")
    goes_on = f"jobs cancelled: {len(jobs)}; `mates run --on slurm` goes on from what is saved"
    print(goes_on if jobs else "no jobs of this run are in the queue")
    return 0


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
    parser.add_argument("--devices", type=int, help="Devices that work at the same time (default: launch.processes).")
    recipe, extra = parse_with(parser, arguments)
    if extra["devices"] is None:
        extra["devices"] = recipe.launch.processes
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
    "run": Verb("run all steps of a recipe, here or under SLURM; finished ones are skipped, interrupted ones continued", _run),
    "launch": Verb("start one step over several ranks: on this machine, by deepspeed, SLURM or MPI", _launch),
    "status": Verb("tell which steps of a run are done, running, waiting or failed, and why", _status),
    "cancel": Verb("end all jobs of a run under SLURM", _cancel),
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
    "evaluate": Verb("measure a stage's checkpoint after a decay branch, or the zero-shot tasks of a Hugging Face folder", _evaluate),
    "report": Verb("write the ledger and report.html of a run", _report),
    "inspect": Verb("explain any artifact and verify every byte of it", _inspect),
    "forward": Verb("run another launcher's command on one node and pass stop signals on to its ranks (for job scripts)", _forward),
}
