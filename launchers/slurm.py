"""A run under SLURM: its steps as jobs that depend on each other, what has become of them, and how to end them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mates.engine.config import Recipe
from mates.engine.data.steps import uses_sample
from mates.engine.layout import layout_of
from mates.engine.loop import DATA_VERBS, Step, needed_steps, run_steps, step_request
from mates.engine.progress import say
from mates.launchers.jobs import CANCELLED, Job, finished_file, job_script, jobs_folder, resources_of, step_name
from mates.launchers.locks import step_at_work
from mates.preprocess.artifact import MANIFEST_NAME, ArtifactError, ArtifactMismatchError, atomic_file, read_json, write_json

JOBS_FILE = "jobs.json"
Answer = TypeVar("Answer")

POLL_SECONDS = 5.0
PATIENCE_SECONDS = 600.0
QUEUE_SECONDS = 60  # that a command of SLURM may take; its controller is slow at times
ALIVE = {"PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED", "RESIZING", "SIGNALING"}
LOG_LINES = 12
FOR_EVER = {
    "PartitionConfig": "more nodes, cores or memory than the partition has; see `scontrol show partition`",
    "PartitionNodeLimit": "more nodes than the partition allows; see `scontrol show partition`",
    "PartitionTimeLimit": "a longer time than the partition allows; see `scontrol show partition`",
    "BadConstraints": "no node has what launch.slurm's options ask for; see `sinfo -N -o '%N %f %G'`",
}
"""Reasons of waiting that do not pass by themselves, and what they mean."""
STACK_FRAME = re.compile(r"(\[rank\d+\]: )? {2}")  # those of ranks that failed after the first would hide its error


class SlurmError(RuntimeError):
    """A command of SLURM failed, or jobs of a run stand in the way."""


@dataclass(frozen=True)
class Submitted:
    """A job that was given to SLURM."""

    name: str
    job: int
    script: str

    @property
    def log(self) -> Path:
        """What the job has printed, all its attempts."""
        return Path(self.script).with_suffix(f".{self.job}.log")

    @property
    def attempts(self) -> Path:
        """JSON lines of what the job's script noted: begun, done, stopped, failed, lost, requeued."""
        return Path(self.script).with_suffix(f".{self.job}.attempts")

    @property
    def cancelled(self) -> Path:
        """A file that keeps the job from going back to the queue."""
        return Path(self.script).with_suffix(f".{self.job}.{CANCELLED}")


@dataclass(frozen=True)
class InQueue:
    """How SLURM speaks of a job: its state, the reason that it waits, and the nodes that it has."""

    state: str
    reason: str
    nodes: str


def _slurm(command: Sequence[str]) -> str:
    if shutil.which(command[0]) is None:
        raise SlurmError(f"{command[0]}: not on this machine's path; run this where SLURM's commands are, such as a login node")
    try:
        # SBATCH_TIMELIMIT and others would win over the script, and a job around this process says nothing of the new one
        own = {name: value for name, value in os.environ.items() if not name.startswith(("SBATCH_", "SLURM_")) or name == "SLURM_CONF"}
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=QUEUE_SECONDS, check=False, env=own)
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{' '.join(command)}: no answer in {QUEUE_SECONDS} s; is SLURM's controller up?") from error
    if done.returncode != 0:
        raise SlurmError(f"{' '.join(command)}: {done.stderr.strip() or f'exit code {done.returncode}'}{_hint(done.stderr)}")
    return done.stdout


def _hint(message: str) -> str:
    if "generic resource" in message:
        return "; SLURM knows of no such GPUs here: set launch.slurm.gpu.gpus_per_node, to 0 where GPUs are not asked for"
    if "node configuration is not available" in message or "More processors requested" in message:
        return "; no node is as large as launch.slurm asks for"
    if "partition" in message:
        return "; set launch.slurm.gpu.partition and launch.slurm.cpu.partition, `sinfo` lists them"
    return ""


# --- jobs of a run -------------------------------------------------------------------------------------------------


def submitted_jobs(run_dir: Path) -> dict[str, Submitted]:
    """The last job of each step, by the step's name."""
    path = jobs_folder(run_dir) / JOBS_FILE
    return {name: Submitted(**item) for name, item in read_json(path).items()} if path.exists() else {}


def queue(jobs: Sequence[Submitted]) -> dict[int, InQueue]:
    """What SLURM says of the jobs that it still knows: for some minutes also of those that have ended."""
    if not jobs:
        return {}
    asked = f"--jobs={','.join(str(job.job) for job in jobs)}"
    try:
        lines = _slurm(["squeue", asked, "--noheader", "--states=all", "--format=%i|%T|%r|%N"]).splitlines()
    except SlurmError as error:
        if "Invalid job id" in str(error):  # it knows none of them any more
            return {}
        raise
    rows = [line.split("|", 3) for line in lines]
    return {int(number): InQueue(state, reason, nodes) for number, state, reason, nodes in rows if number.isdigit()}


def alive_jobs(run_dir: Path) -> list[Submitted]:
    """Jobs of a run that wait or work, in the order in which they were submitted."""
    jobs = sorted(submitted_jobs(run_dir).values(), key=lambda job: job.job)
    known = queue(jobs)
    return [job for job in jobs if job.job in known and known[job.job].state in ALIVE]


def submit(job: Job, *, after: Sequence[int] = (), then: str = ":") -> Submitted:
    """Write a job's script and give it to SLURM, to begin when the jobs ``after`` have ended well. SlurmError where it is refused."""
    folder = jobs_folder(job.recipe.path())
    folder.mkdir(parents=True, exist_ok=True)
    script = (folder / f"{job.name}.sh").absolute()
    with atomic_file(script) as handle:
        handle.write(job_script(job, then=then).encode())
    dependency = [f"--dependency=afterok:{':'.join(map(str, after))}"] if after else []
    number = int(_slurm(["sbatch", "--parsable", *dependency, str(script)]).strip().partition(";")[0])
    made = Submitted(job.name, number, str(script))
    _write_jobs(job.recipe.path(), submitted_jobs(job.recipe.path()) | {job.name: made})
    return made


def _write_jobs(run_dir: Path, jobs: Mapping[str, Submitted]) -> None:
    write_json(jobs_folder(run_dir) / JOBS_FILE, {name: asdict(item) for name, item in jobs.items()})


def before(recipe: Recipe, step: Step) -> Iterator[Step]:
    """The steps that must have ended before a step of a run may begin."""
    if step.verb == "report":
        yield from (item for item in run_steps(recipe) if item.verb == "evaluate")
    elif step.verb in DATA_VERBS:
        yield from (Step(verb) for verb in DATA_VERBS[: DATA_VERBS.index(step.verb)])
    else:
        yield Step(DATA_VERBS[-1])
        yield from needed_steps(recipe, step)


def chain(recipe: Recipe, recipe_file: Path) -> list[Job]:
    """The jobs of all steps of a run, in an order in which each comes after what it needs."""
    return [Job(recipe, step, recipe_file, resources_of(recipe, step)) for step in steps_of(recipe)]


def steps_of(recipe: Recipe) -> list[Step]:
    """The steps of a run that have something to do."""
    return [step for step in run_steps(recipe) if step.verb != "sample-corpus" or uses_sample(recipe)]


def submit_chain(recipe: Recipe, recipe_file: Path, then: str) -> list[Submitted]:
    """Submit a job for each step that is not done; none where all are. ``then`` is run when the report, the last of them, is written.

    Raises:
        SlurmError: SLURM refuses a job; those before it are taken back.
    """
    todo: dict[Step, Job] = {}
    for job in chain(recipe, recipe_file):
        if job.step.verb == "report":
            is_left = bool(todo) or not layout_of(recipe).report.exists()
        else:
            is_left = any(step in todo for step in before(recipe, job.step)) or not is_done(recipe, job.step)
        if is_left:
            todo[job.step] = job
    known, made = submitted_jobs(recipe.path()), dict[Step, Submitted]()
    try:
        for step, job in todo.items():
            after = [made[item].job for item in before(recipe, step) if item in made]
            made[step] = submit(job, after=after, then=then if step.verb == "report" else ":")
    except BaseException:
        say(f"jobs submitted before that are cancelled: {len(made)}")
        _scancel(list(made.values()))
        _write_jobs(recipe.path(), known)
        raise
    return list(made.values())


def is_done(recipe: Recipe, step: Step) -> bool:
    """Whether a step's artifact is there as the recipe asks for it. ArtifactError where one of other settings is in its place."""
    if step.method is not None:
        return step_request(recipe, step).find() is not None
    path = finished_file(recipe, step)
    if path is None:
        return False
    layout = layout_of(recipe)
    beside = {"preprocess": [layout.corpus(split) for split in ("pool", "holdout")], "reference": [layout.reference("train")]}
    beside["reference"] += [layout.further_reference(task.name) for task in recipe.reference.more]
    return all(file.exists() for file in (path, *(folder / MANIFEST_NAME for folder in beside.get(step.verb, []))))


def cancel(run_dir: Path) -> list[Submitted]:
    """End all jobs of a run, so that none goes back to the queue. What their steps have saved stays. Returns what was cancelled."""
    jobs = alive_jobs(run_dir)
    for job in jobs:
        job.cancelled.touch()
    _scancel(jobs)
    return jobs


def _scancel(jobs: Sequence[Submitted]) -> None:
    for job in reversed(jobs):  # the last ones first, or those before them would let them begin
        _slurm(["scancel", "--quiet", str(job.job)])  # quiet where it has ended since


# --- what has become of it -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepState:
    """A step of a run: done, running, waiting, stopped, failed, cancelled, not begun, or unknown (SLURM does not answer); and what more to
    say."""

    step: str
    state: str
    detail: str = ""
    job: int | None = None
    log: str | None = None

    def lines(self) -> Iterator[str]:
        """For people; of a step that failed, the last lines of its log."""
        number = f"job {self.job}" if self.job is not None else ""
        yield f"{self.step:<28} {self.state:<11} {number:<12} {self.detail}".rstrip()
        if self.state == "failed" and self.log is not None and Path(self.log).exists():
            yield f"    {self.log}:"
            yield from (f"    | {line}" for line in last_lines(Path(self.log), without=STACK_FRAME))


def status(recipe: Recipe) -> list[StepState]:
    """What has become of each step of a run."""
    run_dir = recipe.path()
    jobs = submitted_jobs(run_dir)
    known: dict[int, InQueue] | None = None
    try:
        known = queue(list(jobs.values()))
    except SlurmError as error:
        say(f"{error}; what follows is from the run's folder alone")
    at_work = step_at_work(run_dir)
    return [_here(recipe, step, _state(recipe, step, jobs.get(step_name(step)), known), at_work) for step in steps_of(recipe)]


def _here(recipe: Recipe, step: Step, state: StepState, at_work: str | None) -> StepState:
    """What this machine's processes make of a step that no job has begun."""
    if state.state != "not begun":
        return state
    saved = ""
    if step.verb == "pretrain" and step.method is not None and step.stage is not None:
        partial_checkpoints = layout_of(recipe).partial_checkpoints(step.method, step.stage).glob(f"step-*/{MANIFEST_NAME}")
        steps = max((int(path.parent.name.removeprefix("step-")) for path in partial_checkpoints), default=0)
        saved = f"{steps}/{recipe.pretrain.steps_per_stage} steps saved" if steps else ""
    if at_work == str(step):
        return replace(state, state="running", detail=saved)
    return replace(state, state="stopped", detail=saved) if saved else state


def _state(recipe: Recipe, step: Step, job: Submitted | None, known: dict[int, InQueue] | None) -> StepState:
    name = str(step)
    noted = attempts_of(job) if job else []
    entry = known.get(job.job) if job and known is not None else None
    if step.verb == "report":
        is_finished = bool(noted) and noted[-1]["event"] == "done" if job else layout_of(recipe).report.exists()
    else:
        try:
            is_finished = is_done(recipe, step)
        except ArtifactMismatchError as error:
            return StepState(name, "failed", str(error).replace("\n", "\n    "), job.job if job else None, str(job.log) if job else None)
        except ArtifactError:  # what it is made from is not there yet
            is_finished = False
    if is_finished:
        return StepState(name, "done")
    if job is None:
        return StepState(name, "not begun")
    about: dict[str, Any] = {"job": job.job, "log": str(job.log)}
    if known is None:
        return StepState(name, "unknown", "; ".join(f"{item['event']} {item['detail']}, {item['time']}" for item in noted[-1:]), **about)
    tries = sum(item["event"] == "begun" for item in noted)
    again = f"attempt {tries + (entry is not None and entry.state == 'PENDING')}" if tries else ""
    if entry is not None and entry.state == "PENDING":
        reason = f"{entry.reason}: {FOR_EVER[entry.reason]}" if entry.reason in FOR_EVER else entry.reason
        why = ", ".join(filter(None, [reason if reason != "None" else "", again]))
        return StepState(name, "waiting", why, **about)
    if entry is not None and entry.state in ALIVE:
        said = last_lines(job.log, 1)
        where = f"on {entry.nodes}{f', {again}' if tries > 1 else ''}"
        return StepState(name, "running", f"{where}: {said[0]}" if said else where, **about)
    ended = [f"exit code {item['detail']} at {item['time']}" for item in noted if item["event"] in ("failed", "lost", "stopped")]
    state = entry.state if entry else _accounted(job)
    is_cancelled = state.startswith("CANCELLED") or job.cancelled.exists() or (not noted and not state)
    why = "; ".join(filter(None, [state.lower(), f"attempts: {len(ended)}, the last with {ended[-1]}" if ended else ""]))
    return StepState(name, "cancelled" if is_cancelled else "failed", why, **about)


def _accounted(job: Submitted) -> str:
    """The state of a job that has left the queue, from the accounting database where there is one."""
    try:
        return _slurm(["sacct", "--noheader", "--allocations", "--parsable2", "--format=State", f"--jobs={job.job}"]).strip()
    except SlurmError:
        return ""


def attempts_of(job: Submitted) -> list[dict[str, Any]]:
    """What a job's script has noted."""
    try:
        lines = job.attempts.read_text().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):  # a line that is being written
            found.append(json.loads(line))
    return found


def last_lines(path: Path, count: int = LOG_LINES, without: re.Pattern[str] | None = None) -> list[str]:
    """The last lines of a log that are not empty, nor begin with a pattern."""
    try:
        with path.open("rb") as handle:
            handle.seek(max(0, path.stat().st_size - 65_536))
            text = handle.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    lines = [line.rstrip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return [line for line in lines if without is None or not without.match(line)][-count:]


def wait_for(made: Submitted, job: Job) -> None:
    """Wait until a job has ended, telling of each change. SlurmError where it has failed or was cancelled."""
    told = ""
    while True:
        known = _patiently(partial(queue, [made]))
        state = _state(job.recipe, job.step, made, known)
        if state.state != told:
            told = state.state
            say(next(state.lines()))
        if made.job not in known or known[made.job].state not in ALIVE:
            break
        time.sleep(POLL_SECONDS)
    if state.state != "done":
        raise SlurmError("\n".join(state.lines()))


def follow(recipe: Recipe) -> None:
    """Wait until all jobs of a run have ended, telling of each change. SlurmError where one has failed or was cancelled."""
    told: dict[str, str] = {}
    while True:
        is_alive = bool(_patiently(partial(alive_jobs, recipe.path())))
        states = _patiently(partial(status, recipe))
        for item in states:
            if told.get(item.step) not in (item.state, None) or (item.step not in told and item.state != "waiting"):
                say(next(item.lines()))
            told[item.step] = item.state
        if not is_alive:
            break
        time.sleep(POLL_SECONDS)
    failed = [item for item in states if item.state in ("failed", "cancelled")]
    if failed:
        first = next((item for item in failed if item.state == "failed"), failed[0])
        raise SlurmError("\n".join([f"{recipe.path()}: steps that failed or were cancelled: {len(failed)}, first", *first.lines()]))


def _patiently(ask: Callable[[], Answer]) -> Answer:
    """An answer of SLURM, whose controller may be away for some minutes while jobs go on. SlurmError where it stays away."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return ask()
        except SlurmError as error:
            if time.monotonic() > deadline:
                raise
            say(f"{error}; asking again")
            time.sleep(POLL_SECONDS)
