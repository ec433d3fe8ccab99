"""All steps of a recipe, here or as jobs under SLURM."""

from __future__ import annotations

import shlex
import time
from dataclasses import replace

from mates.engine.config import Recipe
from mates.launchers.checks import check_paths, check_sizes
from mates.launchers.recipe import write_recipe
from mates.launchers.steps import data_step

RECIPE_FILE, ATTEMPT_FILE = "recipe.yaml", ".recipe.yaml"


def run_recipe(recipe: Recipe) -> None:
    """Run all steps of a recipe; finished ones are skipped.

    Raises:
        RunBusyError: another ``mates run`` works in the folder. StepFailedError: a step's processes failed.
    """
    from mates.engine.evaluate.report import write_report
    from mates.engine.layout import layout_of
    from mates.engine.loop import DISTRIBUTED_VERBS, check_needed, run_steps, step_request
    from mates.engine.progress import say
    from mates.engine.select.stage import select_stage
    from mates.launchers.jobs import step_arguments
    from mates.launchers.local import STOPPING, console_script, run_ranks
    from mates.launchers.locks import run_lock

    check_paths(recipe)
    with run_lock(recipe.path()) as note:
        path, said = recipe.path() / ATTEMPT_FILE, recipe.path() / RECIPE_FILE
        write_recipe(path, recipe)
        if not said.exists():  # that of finished work stays until this one has been through all steps
            write_recipe(said, recipe)
        started = time.perf_counter()
        for step in run_steps(recipe):
            note(step)
            if step.verb == "report":
                write_report(recipe)
            elif step.method is None or step.stage is None:
                data_step(step.verb, recipe)
                if step.verb == "preprocess":
                    check_sizes(recipe)
            elif step.verb == "select":
                check_needed(recipe, step)
                select_stage(recipe, step.method, step.stage)
            elif not step_request(recipe, step).find():
                command = [console_script("mates"), *step_arguments(step, path)]
                processes = recipe.launch.processes if step.verb in DISTRIBUTED_VERBS else 1
                run_ranks(recipe, step, command, processes)
            STOPPING.stop()
        path.replace(said)
        say(f"run: done in {time.perf_counter() - started:.0f} s; open {layout_of(recipe).report}")


def run_on_slurm(recipe: Recipe, *, waits: bool, dry_run: bool) -> None:
    """Submit the steps of a recipe that are not done as jobs that depend on each other.

    Raises:
        RunBusyError: a run or jobs of it work in the folder already. SlurmError: SLURM refuses a job, or with ``waits`` a step failed.
    """
    from mates.engine.layout import layout_of
    from mates.engine.loop import Step
    from mates.engine.progress import say
    from mates.launchers.jobs import job_script, jobs_folder, resources_of, step_name
    from mates.launchers.locks import run_lock
    from mates.launchers.slurm import before, chain, follow, is_done, steps_of, submit_chain

    check_paths(recipe)
    for verb in ("pretrain", "evaluate"):  # the recipe's own checks of batches, with the ranks that the jobs will have
        asked = resources_of(recipe, Step(verb, "shared", 0))
        replace(recipe, launch=replace(recipe.launch, processes=asked.ranks, nodes=asked.nodes))
    path, said = recipe.path() / ATTEMPT_FILE, recipe.path() / RECIPE_FILE
    made, kept = shlex.quote(str(path.absolute())), shlex.quote(str(said.absolute()))
    then = f"cp {made} {kept}.new && mv -f {kept}.new {kept}"  # both stay: a job that goes back to the queue finds its recipe
    if dry_run:
        for job in chain(recipe, path):
            after = ", ".join(step_name(step) for step in before(recipe, job.step))
            script = job_script(job, then=then if job.step.verb == "report" else ":")
            print(f"# --- {job.name}.sh{f', after {after}' if after else ''}\n{script}")
        return
    with run_lock(recipe.path()):
        write_recipe(path, recipe)
        if not said.exists():
            write_recipe(said, recipe)
        for step in steps_of(recipe):
            if step.method is None and is_done(recipe, step):
                data_step(step.verb, recipe)  # takes seconds; refuses data of other settings
        jobs = submit_chain(recipe, path, then)
    if not jobs:
        say(f"run: all steps are done; open {layout_of(recipe).report}")
        return
    say(f"run: jobs {jobs[0].job} to {jobs[-1].job} submitted, {len(jobs)} in all; scripts and logs are in {jobs_folder(recipe.path())}")
    say(f"`mates status {recipe.path()}` tells what has become of them, `mates cancel {recipe.path()}` ends them")
    if waits:
        follow(recipe)
        say(f"run: done; open {layout_of(recipe).report}")
