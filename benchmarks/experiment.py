"""Arms × seeds × stages of a tier: which runs there are, in which folders, and how they are brought to their end.

A tier is a YAML file of ``benchmarks/tiers``::

    extends: cpu                # optional: another tier, of which this one says only the differences
    workers: 2                  # runs side by side, each a process with its share of the cores
    prune: false                # drop the checkpoints of a run once it has been measured
    recipe: {...}               # as for `mates run`; a path may begin with SHARED_DATA/
    arms:                       # name: the method (by default the name), and recipe values of the arm's own by dotted name
      mates: {}
      mates-exact: {method: mates, probe.method: exact}

Runs lie in ``OUT/seed-K/ARM``. Stage 0 is made once a seed, in ``OUT/seed-K/shared-run``, and each arm's folder has a symbolic link to it:
the steps find its artifacts there by their fingerprints, and do nothing again. So an arm may change what comes after stage 0 only.
Tokenizer, corpora and reference in ``OUT/data`` are shared by all seeds.

Data that `pieces.py` has unpacked there is taken as it is: the text that it was made from need not be on the machine.

A run is one process of one rank, in which all steps follow each other: with models this small, a start of the libraries for each step would
be a large part of the time. It ends when the process that started it does.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pieces
import yaml
from comparison import BASELINE, Arm, measure_arm, missing_stages
from exits import exit_code
from surroundings import REPOSITORY, SHARED_DATA, surroundings, without_paths

from mates.engine.config import Method, Recipe, RecipeError, require
from mates.engine.layout import SHARED, layout_of
from mates.engine.ledger import collect
from mates.engine.loop import DATA_VERBS, Step, stage_steps, step_request
from mates.engine.pretrain.vigilance import STOPPED
from mates.engine.progress import say
from mates.launchers.recipe import load_recipe, parse_with, recipe_parser, write_recipe
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError

TIERS = REPOSITORY / "benchmarks" / "tiers"
OF_ARMS = ("probe", "fit", "score", "select", "baselines")
"""Sections that an arm may have values of its own in."""
ALSO_OF_ARMS, NOT_OF_ARMS = ("reference.loss_over",), ("probe.after_decay", "select.materialize")
OF_RUNS = ("methods", "run_dir", "data_dir")
"""Recipe values that follow from arms, seeds and --out."""
ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
STAGE0 = "shared-run"
MEASURED = "measured.json"
RUN_RECIPE = "recipe.yaml"


@dataclass(frozen=True, kw_only=True)
class ArmOf:
    """An arm of a tier: its method, and recipe values of its own by dotted name."""

    name: str
    method: Method
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Tier:
    """What is run: see the module's docstring."""

    name: str
    recipe: Mapping[str, Any]
    arms: Mapping[str, ArmOf]
    workers: int = 1
    prune: bool = False

    @property
    def results_name(self) -> str:
        """What the files of its results, without suffixes, and the folder of its runs are called."""
        return f"flops_to_accuracy_{self.name}"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One arm of one seed, or with no arm the seed's stage 0."""

    recipe: Recipe
    arm: ArmOf | None = None

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.recipe.path()

    def __str__(self) -> str:
        return f"seed {self.recipe.seed} {self.arm.name if self.arm else 'stage 0'}"

    def steps(self) -> Iterator[Step]:
        """Its steps: the data's and stage 0's, or those of the arm's own stages."""
        if self.arm is None:
            yield from (Step(verb) for verb in DATA_VERBS)
            yield from stage_steps(self.recipe, SHARED, 0)
        else:
            for stage in range(1, self.recipe.pretrain.stages):
                yield from stage_steps(self.recipe, self.arm.method, stage)
            yield Step("report")


# --- tiers and their runs ------------------------------------------------------------------------------------------


def load_tier(name: str) -> Tier:
    """A tier by its name, or a YAML file. RecipeError where it cannot be one."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else TIERS / f"{name}.yaml"
    known = ", ".join(sorted(found.stem for found in TIERS.glob("*.yaml")))
    require(path.is_file(), "--tier", name, f"one of {known}, or a YAML file")
    raw = _placed(_merged_tier(path))
    unknown = sorted(set(raw) - {"workers", "prune", "recipe", "arms"})
    require(not unknown, str(path), ", ".join(unknown), "extends, workers, prune, recipe and arms")
    for section in ("recipe", "arms"):
        require(isinstance(raw.get(section), dict), f"{path}: {section}", raw.get(section), "a mapping, here or in the tier it extends")
    arms = {arm: _arm_of(path, arm, values) for arm, values in raw["arms"].items()}
    require(BASELINE in arms, f"{path}: arms", ", ".join(arms), f"{BASELINE} among them, which others are held against")
    for name in OF_RUNS:
        require(name not in raw["recipe"], f"{path}: recipe.{name}", raw["recipe"].get(name), "nothing: arms, seeds and --out say it")
    workers, prunes = raw.get("workers", 1), raw.get("prune", False)
    require(type(workers) is int, f"{path}: workers", workers, "a whole number")
    require(type(prunes) is bool, f"{path}: prune", prunes, "true or false")
    return Tier(name=path.stem, recipe=raw["recipe"], arms=arms, workers=workers, prune=prunes)


def _merged_tier(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    require(path not in extending, f"{path}: extends", path.stem, "a tier that does not extend this one")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: cannot be read as a tier: {error}") from error
    require(isinstance(raw, dict), str(path), type(raw).__name__, "a mapping with extends, workers, prune, recipe and arms")
    base = raw.pop("extends", None)
    if not base:
        return dict(raw)
    found = [folder / f"{base}.yaml" for folder in (path.parent, TIERS) if (folder / f"{base}.yaml").is_file()]
    require(bool(found), f"{path}: extends", base, f"a tier beside it or in {TIERS}")
    merged: dict[str, Any] = _merged(_merged_tier(found[0], (*extending, path)), raw)
    return merged


def _merged(base: Any, over: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return base | {key: _merged(base.get(key), value) for key, value in over.items()}


def _placed(value: Any) -> Any:
    """SHARED_DATA/ at the beginning of a path becomes the shared data folder beside the checkout."""
    if isinstance(value, dict):
        return {key: _placed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_placed(item) for item in value]
    return str(SHARED_DATA / value.removeprefix("SHARED_DATA/")) if isinstance(value, str) and value.startswith("SHARED_DATA/") else value


def _arm_of(path: Path, name: Any, raw: Any) -> ArmOf:
    good_name = isinstance(name, str) and ARM_NAME.fullmatch(name) and name not in (STAGE0, "data")
    require(bool(good_name), f"{path}: arms", name, "a name of letters, digits, dots, dashes and underscores")
    require(raw is None or isinstance(raw, dict), f"{path}: arms.{name}", raw, "a mapping of values by dotted names, such as probe.method")
    values = dict(raw or {})
    method, known = values.pop("method", name), get_args(Method)
    require(method in known, f"{path}: arms.{name}", method, f"a method: {', '.join(known)}")
    allowed = ", ".join([*OF_ARMS, *ALSO_OF_ARMS])
    for key in values:
        section, dot, _ = str(key).partition(".")
        good = key in ALSO_OF_ARMS or (section in OF_ARMS and dot and key not in NOT_OF_ARMS)
        expected = f"values of {allowed} only, by dotted names, without {', '.join(NOT_OF_ARMS)}: all arms share stage 0"
        require(bool(good), f"{path}: arms.{name}", key, expected)
    return ArmOf(name=name, method=method, changes=values)


@cache
def parse_recipe(values: str, overrides: tuple[str, ...]) -> Recipe:
    """A recipe from a tier's values, in YAML, and dotted overrides. RecipeError as `mates run`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tier.yaml"
        path.write_text(values, encoding="utf-8")
        return parse_with(_parser(), [str(path), *overrides])[0]


@cache
def _parser() -> Any:
    """One for all arms: making it takes most of a second."""
    return recipe_parser("run", "")


def runs_of(tier: Tier, arms: Sequence[str], seeds: int, out: Path, overrides: Sequence[str] = ()) -> list[Run]:
    """All runs, seed by seed: stage 0 of a seed before its arms; seeds are counted up from the recipe's own."""
    values = yaml.safe_dump(dict(tier.recipe))
    shared = replace(parse_recipe(values, tuple(overrides)), data_dir=str(out / "data"))
    for name in OF_RUNS:
        given = [word for word in overrides if word.partition("=")[0] == f"--{name}"]
        require(not given, f"--{name}", " ".join(given), "--arms and --out instead")
    processes = shared.launch.processes
    require(processes == 1, "launch.processes", processes, "1: runs of a tier are single processes, several side by side (workers)")
    own = []
    for name in arms:
        arm = tier.arms[name]
        changed = [f"--{key}={value if isinstance(value, str) else json.dumps(value, default=str)}" for key, value in arm.changes.items()]
        recipe = parse_recipe(values, (*overrides, *changed))
        own.append((arm, replace(recipe, methods=[arm.method], data_dir=shared.data_dir)))
    runs = []
    for seed in range(shared.seed, shared.seed + seeds):
        folder = out / f"seed-{seed}"
        runs.append(Run(recipe=replace(shared, seed=seed, methods=["random"], run_dir=str(folder / STAGE0))))
        runs += [Run(arm=arm, recipe=replace(recipe, seed=seed, run_dir=str(folder / arm.name))) for arm, recipe in own]
    return runs


# --- what is there -------------------------------------------------------------------------------------------------


def measured(run: Run) -> Arm:
    """An arm of a seed as far as its artifacts are complete; as it was measured, where it has been complete before."""
    assert run.arm is not None
    path, method = run.folder / MEASURED, run.arm.method
    identity = of_this_version(_identity(run.recipe), method)
    if path.is_file():
        try:
            kept = artifact.read_json(path)
            with contextlib.suppress(RecipeError):  # of a version that had other fields
                if of_this_version(kept["recipe"], method) == identity:
                    return Arm.from_json(kept["arm"])
        except (ArtifactError, AttributeError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path}: cannot be read ({error}); remove it, and the run is measured again") from error
    link_stage0(run)
    arm = measure_arm(run.recipe, collect(run.recipe), run.arm.name, run.arm.method)
    if not missing_stages(arm, run.recipe.pretrain.stages):
        arm = replace(arm, surroundings=surroundings())
        artifact.write_json(path, {"recipe": artifact.normalise(_identity(run.recipe)), "arm": arm.as_json()})
    return arm


def _identity(recipe: Recipe) -> dict[str, Any]:
    """What a measured run depends on: not where it or its text lies, nor what its processes were."""
    found = {key: value for key, value in asdict(recipe).items() if key not in ("run_dir", "data_dir", "launch")}
    return dict(without_paths(found))


def of_this_version(values: Mapping[str, Any], method: str | None = None) -> Mapping[str, Any]:
    """A recipe that was kept, maybe by an earlier version, for comparisons: fields that are new since then have their defaults, and those
    that say nothing of a run of ``method`` are left out. RecipeError where it can no longer be read."""
    found: dict[str, Any] = artifact.normalise(_identity(parse_recipe(yaml.safe_dump(dict(values)), ())))
    if method == BASELINE:  # of how influences are found only the end of the decay branch, which they might be found at
        found = {key: value for key, value in found.items() if key not in ("fit", "score")} | {"probe": found["probe"]["after_decay"]}
    return found


def link_stage0(run: Run) -> None:
    """Let an arm's folder have the seed's stage 0, by a link that holds wherever OUT is moved."""
    link = run.folder / SHARED
    if not link.is_symlink():
        run.folder.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path("..") / STAGE0 / SHARED, target_is_directory=True)


def prune(run: Run) -> None:
    """Drop the weights of a measured run: nothing that comes later starts from them."""
    assert run.arm is not None
    for stage in range(1, run.recipe.pretrain.stages):
        layout = layout_of(run.recipe)
        shutil.rmtree(layout.checkpoint(run.arm.method, stage), ignore_errors=True)
        shutil.rmtree(layout.evaluation(run.arm.method, stage), ignore_errors=True)


# --- running -------------------------------------------------------------------------------------------------------


def bring_to_end(
    runs: Sequence[Run], *, workers: int, prunes: bool = False, budget_minutes: float | None = None, stage0: Mapping[int, str] | None = None
) -> tuple[int, list[str]]:
    """Run what is not complete, ``workers`` runs side by side.

    Args:
        runs: of :func:`runs_of`. workers: how many run at the same time.
        prunes: drop checkpoints of complete runs.
        budget_minutes: after which no further step is begun.
        stage0: of seeds with runs elsewhere, the fingerprint of their stage-0 checkpoint; arms of a seed whose own is another fail at once.

    Returns:
        How many runs were stopped for want of time, and the runs that failed.
    """
    until = None if budget_minutes is None else time.time() + 60 * budget_minutes
    left = [run for run in runs if run.arm is not None and missing_stages(measured(run), run.recipe.pretrain.stages)]
    first = [run for run in runs if run.arm is None and run.recipe.seed in {one.recipe.seed for one in left}]
    codes: dict[str, int] = {}

    def work(run: Run) -> None:
        if run.arm is not None and codes[str(replace(run, arm=None))]:  # its stage 0 is not there
            return
        if run.arm is not None and (expected := (stage0 or {}).get(run.recipe.seed)):
            found = artifact.load(layout_of(run.recipe).checkpoint(run.arm.method, 0), "checkpoint").fingerprint
            if found != expected:
                say(f"{run}: stage 0 here is {found[:12]}, that of the runs to be extended {expected[:12]}; it takes the same versions,")
                say(f"  kind of processor and threads (here {_threads(run, workers)}; --launch.threads)")
                codes[str(run)] = 1
                return
        codes[str(run)] = run_apart(run, workers, until)
        if prunes and run.arm is not None and not missing_stages(measured(run), run.recipe.pretrain.stages):
            prune(run)

    groups = [first[:1], first[1:], left]  # the data is made once
    with ThreadPoolExecutor(workers) as pool:
        for group in groups:
            list(pool.map(work, group))
    failed = [name for name, code in codes.items() if code not in (0, STOPPED)]
    return sum(code == STOPPED for code in codes.values()), failed


def run_apart(run: Run, workers: int, until: float | None) -> int:
    """Run in a process of its own, with its share of the cores; its exit code, STOPPED where time was up."""
    from mates.launchers.local import step_environment

    path = run.folder / RUN_RECIPE
    write_recipe(path, replace(run.recipe, launch=replace(run.recipe.launch, threads=_threads(run, workers))))
    environment = step_environment(1)
    environment.pop("PYTHONSAFEPATH")  # this file's own folder holds what it imports
    command = [sys.executable, __file__, str(path)] + (["--until", str(until)] if until is not None else [])
    if run.arm is not None:
        command += ["--arm", json.dumps(asdict(run.arm))]
    code = subprocess.run(command, env=environment, check=False).returncode
    if code < 0:
        say(f"{run}: ended by {signal.Signals(-code).name}; the same command goes on")
    return code


def other_settings(run: Run) -> str | None:
    """In which value a run's folder is of another recipe than now; None where it is of none, or of this one."""
    path = run.folder / RUN_RECIPE
    if not path.is_file():
        return None
    method = run.arm.method if run.arm else BASELINE
    made, asked = (of_this_version(artifact.normalise(_identity(one)), method) for one in (load_recipe(path), run.recipe))
    try:
        require(made["seed"] == asked["seed"], "seed", asked["seed"], f"{made['seed']}, which {run.folder} was made by")
        require_same(made, asked, f"which {run.folder} was made by")
    except RecipeError as error:
        return str(error)
    return None


def _threads(run: Run, workers: int) -> int:
    return run.recipe.launch.threads or max(1, len(os.sched_getaffinity(0)) // workers)


def make_data(recipe: Recipe) -> None:
    """Tokenizer, corpora and reference."""
    from mates.launchers.checks import check_paths
    from mates.launchers.steps import data_step

    check_paths(recipe)
    for verb in DATA_VERBS:
        data_step(verb, recipe)
    artifact.write_json(layout_of(recipe).data / pieces.RECIPE, data_recipe(recipe))


def require_text(recipe: Recipe) -> None:
    """RecipeError where a tier's text would be the shared data, and that is neither here nor in pieces."""
    gone = [path for path in (*recipe.corpus.inputs, recipe.reference.source) if Path(path).is_relative_to(SHARED_DATA)]
    if gone and not SHARED_DATA.is_dir() and not is_unpacked(recipe):
        expected = "that folder beside the checkout; or give text of your own (--corpus.inputs, --reference.source)"
        raise RecipeError(f"SHARED_DATA: no folder {SHARED_DATA} for {', '.join(gone)}; expected {expected}")


def data_recipe(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that data is made by, with the last parts of paths only."""
    sections = {name: asdict(getattr(recipe, name)) for name in ("corpus", "tokenizer", "reference", "model")}
    del sections["reference"]["loss_over"]
    found: dict[str, Any] = artifact.normalise(without_paths(sections))
    return found


def is_unpacked(recipe: Recipe) -> bool:
    """Whether a run's data came in pieces. RecipeError where it is that of another recipe."""
    data = layout_of(recipe).data
    if not (data / pieces.LIST).is_file():
        return False
    require_same(artifact.read_json(data / pieces.RECIPE), data_recipe(recipe), f"which the unpacked data in {data} was made by")
    return True


def require_same(made: Mapping[str, Any], asked: Mapping[str, Any], what: str, name: str = "") -> None:
    """RecipeError where a value is not that of ``made``, naming the first."""
    for key in sorted(made.keys() | asked.keys()):
        found, value, dotted = made.get(key), asked.get(key), f"{name}{key}"
        if isinstance(found, dict) and isinstance(value, dict):
            require_same(found, value, what, f"{dotted}.")
        else:
            require(found == value, dotted, value, f"{found!r}, {what}")


def run_here(run: Run, until: float | None) -> bool:
    """All steps that are not done, in this process; whether it came to the end before ``until`` (seconds of the epoch)."""
    from mates.engine.evaluate.report import write_report
    from mates.launchers.checks import check_paths, check_sizes
    from mates.launchers.locks import run_lock
    from mates.launchers.steps import data_step, joined, ranks_step

    recipe = run.recipe
    unpacked = is_unpacked(recipe)
    if run.arm is None and not unpacked:
        check_paths(recipe)
    with run_lock(recipe.path()) as note, joined(recipe) as world:
        for step in run.steps():
            if step.method is not None and step_request(recipe, step).find():
                continue
            if until is not None and time.time() >= until:
                say(f"{run}: time is up before {step}; the same command goes on")
                return False
            note(step)
            if step.verb == "report":
                write_report(recipe)
            elif step.method is None or step.stage is None:
                if not unpacked:
                    data_step(step.verb, recipe)
            else:
                if (step.verb, step.stage) in (("select", 0), ("probe", 1), ("score", 1)):
                    check_sizes(recipe)
                ranks_step(world, step.verb, recipe, step.method, step.stage)
                gc.collect()  # an engine and its optimizer refer to each other
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """A run's own process. Exit codes: as `mates run`."""
    parser = argparse.ArgumentParser(description="One run of a tier, started by flops_to_accuracy.py", allow_abbrev=False)
    parser.add_argument("recipe", type=Path, help="the run's recipe")
    parser.add_argument("--arm", type=json.loads, help="the arm, as JSON; without it the seed's stage 0")
    parser.add_argument("--until", type=float, help="when no further step is begun, in seconds of the epoch")
    options = parser.parse_args(arguments)
    run = Run(recipe=load_recipe(options.recipe), arm=ArmOf(**options.arm) if options.arm else None)
    return exit_code(str(run), lambda: 0 if run_here(run, options.until) else STOPPED)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as the verbs: the libraries' own threads were seen to abort a process that had finished
