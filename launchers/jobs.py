"""Job scripts for SLURM: what each step asks for, and the shell that runs it, stops it in time and sends it back to the queue."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mates.engine.baselines.scorers import OF_CHECKPOINT
from mates.engine.config import INFLUENCE_METHODS, Recipe, ResourcesConfig, require
from mates.engine.layout import layout_of
from mates.engine.loop import DISTRIBUTED_VERBS, Step
from mates.engine.pretrain.vigilance import BAD_STEP, STOPPED
from mates.engine.ranks import LOWEST_PORT, PORTS, PROMISED_WORLD_SIZE, LaunchError
from mates.preprocess.artifact import MANIFEST_NAME

CANCELLED = "cancelled"
"""Ending of the file beside a job's log that keeps the job from going back to the queue."""
MPI_VERBS = ("preprocess",)
SHARED_OUT = (*DISTRIBUTED_VERBS, "select", *MPI_VERBS)
"""Verbs that several ranks can share."""
WAIT_SECONDS = 30
"""Seconds that the last rank may end after the first; a rank that ended too early is noticed so."""
LONG_SECONDS = 3600
BAD_INPUT = 2


@dataclass(frozen=True)
class Resources:
    """What a job asks for; see :class:`~mates.engine.config.ResourcesConfig`."""

    nodes: int
    processes: int
    gpus_per_node: int
    cpus_per_process: int | None
    memory: str | None
    time: str | None
    partition: str | None
    options: tuple[str, ...]

    @property
    def ranks(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.processes


@dataclass(frozen=True)
class Job:
    """A step to run: its command, without what starts the ranks, and what it asks for."""

    recipe: Recipe
    step: Step
    recipe_file: Path
    resources: Resources

    @property
    def name(self) -> str:
        """A word for files and queues."""
        return step_name(self.step)

    @property
    def command(self) -> list[str]:
        """What each rank runs."""
        return [self.program("mates"), *step_arguments(self.step, self.recipe_file.absolute())]

    def program(self, name: str) -> str:
        """A command of this environment; where commands run in a container, of that. LaunchError where it is not installed."""
        if in_container(self.recipe):
            return name
        path = Path(sys.executable).parent / name
        if not path.exists():
            raise LaunchError(f"the command {name!r} is not installed beside {sys.executable}")
        return str(path)


def in_container(recipe: Recipe) -> bool:
    """Whether ranks run in an image, in which commands have other paths than here."""
    slurm = recipe.launch.slurm
    return bool(slurm.prefix) or any(option.startswith("--container-image") for option in slurm.srun_options)


def runs_model(recipe: Recipe, step: Step) -> bool:
    """Whether a step runs a transformer, and so wants GPUs."""
    if step.verb in ("fit", "score") and step.method in INFLUENCE_METHODS:
        return recipe.fit.model != "ngram"
    if step.verb == "score":
        return step.method in OF_CHECKPOINT
    return step.verb in ("pretrain", "probe", "evaluate")


def resources_of(recipe: Recipe, step: Step) -> Resources:
    """What the job of a step asks for: its verb's own wishes, then those of steps with or without a model, then defaults."""
    slurm, model = recipe.launch.slurm, runs_model(recipe, step)
    kind, own = slurm.gpu if model else slurm.cpu, slurm.steps.get(step.verb, ResourcesConfig())

    def chosen(name: str, default: Any = None) -> Any:
        values = (getattr(own, name), getattr(kind, name), default)
        return next((value for value in values if value is not None), None)

    launch = recipe.launch
    nodes = chosen("nodes", launch.nodes if model else 1)
    processes = chosen("processes", launch.processes // launch.nodes if model else 1)
    if step.verb not in SHARED_OUT:
        nodes = processes = 1
    return Resources(
        nodes=nodes,
        processes=processes,
        gpus_per_node=chosen("gpus_per_node", processes if model else 0),
        cpus_per_process=chosen("cpus_per_process"),
        memory=chosen("memory"),
        time=chosen("time"),
        partition=chosen("partition"),
        options=(*kind.options, *own.options),
    )


def step_name(step: Step) -> str:
    """A word for a step."""
    return step.verb if step.method is None else f"{step.verb}-{step.method}-{step.stage}"


def step_arguments(step: Step, recipe_file: Path) -> list[str]:
    """Arguments of `mates` that run a step."""
    arguments = [step.verb, "--recipe", str(recipe_file)]
    return arguments if step.method is None else [*arguments, "--method", step.method, "--stage", str(step.stage)]


def jobs_folder(run_dir: Path) -> Path:
    """Scripts, logs and records of a run's jobs."""
    return run_dir / "slurm"


def finished_file(recipe: Recipe, step: Step) -> Path | None:
    """The manifest that a step writes last; None for the report, which has none."""
    layout = layout_of(recipe)
    if step.method is None or step.stage is None:
        folders = {
            "sample-corpus": layout.sample_corpus,
            "tokenizer": layout.tokenizer,
            "preprocess": layout.corpus("train"),
            "reference": layout.reference("test"),
        }
        return folders[step.verb] / MANIFEST_NAME if step.verb in folders else None
    return layout.of_step(step.verb, step.method, step.stage) / MANIFEST_NAME


def job_script(job: Job, *, requeues: bool = True, then: str = ":") -> str:
    """A step's script for sbatch, or for bash inside an allocation.

    Args:
        job: the step.
        requeues: whether the job goes back to the queue when it was asked to stop or failed; an allocation that somebody uses does not.
        then: a command that is run when the step has ended well.
    """
    folder = jobs_folder(job.recipe.path()).absolute()
    require(not set(str(folder)) & set('"\\\n'), "run_dir", str(folder), "a folder whose name has no quotes, backslashes or line ends")
    finished = finished_file(job.recipe, job.step)
    return _SCRIPT.format(
        options="\n".join(f"#SBATCH {option}" for option in _options(job, folder)),
        step=job.step,
        run=job.recipe.path(),
        directory=shlex.quote(str(Path.cwd())),
        setup="\n".join(_setup(item) for item in job.recipe.launch.slurm.setup),
        environment="\n".join(_environment(job)),
        stem=shlex.quote(str(folder / job.name)),
        cancelled=CANCELLED,
        finished=shlex.quote(str(finished.absolute())) if finished else "",
        place=shlex.quote(str((finished or folder).absolute().parent.parent)),
        requeues="yes" if requeues else "",
        retries=job.recipe.launch.slurm.retries,
        long=LONG_SECONDS,
        command=_command(job, folder),
        then=then,
        stopped=STOPPED,
        bad_input=BAD_INPUT,
        bad_step=BAD_STEP,
    )


def _setup(item: str) -> str:
    failed = shlex.quote(f"mates: launch.slurm.setup failed: {item.strip().splitlines()[0]}")
    return f"{{\n{item.strip()}\n}} || {{ echo {failed} >&2; note failed {BAD_INPUT}; exit {BAD_INPUT}; }}"


def _options(job: Job, folder: Path) -> Iterator[str]:
    slurm, asked = job.recipe.launch.slurm, job.resources
    yield re.sub(r"[^\w.=-]", "_", f"--job-name=mates-{job.recipe.path().absolute().name}-{job.name}")
    yield f"--nodes={asked.nodes}"
    yield f"--ntasks-per-node={asked.processes}"
    named = {
        "cpus-per-task": asked.cpus_per_process,
        "gpus-per-node": asked.gpus_per_node or None,
        "mem": asked.memory,
        "time": asked.time,
        "partition": asked.partition,
        "account": slurm.account,
    }
    yield from (f"--{name}={value}" for name, value in named.items() if value is not None)
    yield '--output="{}.%j.log"'.format(str(folder / job.name).replace("%", "%%"))
    yield "--open-mode=append"
    yield "--requeue"
    yield "--kill-on-invalid-dep=yes"
    yield f"--signal=B:USR2@{slurm.stop_seconds}"
    yield from asked.options


def _environment(job: Job) -> Iterator[str]:
    yield "export SLURM_EXPORT_ENV=ALL"  # srun's tasks have what is set here, whatever sbatch was told of the login node's
    yield "export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_PROGRESS_BARS=1"
    yield "export PYTHONWARNINGS=${PYTHONWARNINGS-ignore} OMP_WAIT_POLICY=${OMP_WAIT_POLICY-PASSIVE}"
    yield "export TRANSFORMERS_VERBOSITY=${TRANSFORMERS_VERBOSITY-error}"
    if not in_container(job.recipe):  # two versions of ninja on the path make DeepSpeed rebuild its operators at every start
        yield f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
    yield "# what is compiled stays on each node: ranks of many nodes in one folder of a network disk wait for each other's locks"
    yield "cache=${TMPDIR:-/tmp}/mates-$(id -u)"
    for name in ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        yield f"export {name}=${{{name}-$cache/{name.lower()}}}"
    if job.step.verb not in MPI_VERBS:
        yield f"export {PROMISED_WORLD_SIZE}={job.resources.ranks}"


def _command(job: Job, folder: Path) -> str:
    """srun, and what it runs on each node. Ranks meet on the first node of srun's step, which may have fewer nodes than an allocation."""
    slurm, asked = job.recipe.launch.slurm, job.resources
    mpi = job.step.verb in MPI_VERBS
    launcher = "srun" if mpi or asked.ranks == 1 else slurm.launcher
    tasks = asked.processes if launcher == "srun" else 1
    # all three, or the numbers of the job or of an allocation around it win
    words = ["srun", f"--nodes={asked.nodes}", f"--ntasks={asked.nodes * tasks}", f"--ntasks-per-node={tasks}"]
    if asked.cpus_per_process is not None:  # srun does not take it from sbatch
        words.append(f"--cpus-per-task={asked.cpus_per_process * (asked.processes // tasks)}")
    elif tasks < asked.processes:  # or all ranks of a node might be bound to the cores of one task
        words.append("--cpu-bind=none")
    words += ["--kill-on-bad-exit=1", f"--wait={WAIT_SECONDS}", *slurm.srun_options]
    if mpi and asked.ranks > 1:
        words.append(f"--mpi={slurm.mpi}")
    if launcher == "srun":
        return shlex.join([*words, *slurm.prefix, *job.command])
    hosts = 'scontrol show hostnames "$SLURM_STEP_NODELIST"'
    on_node = f"address=$({hosts} | head -n 1); port=$(({LOWEST_PORT} + (SLURM_JOB_ID * 8 + SLURM_STEP_ID) % {PORTS})); "
    if launcher == "torchrun":
        options = f'--nnodes={asked.nodes} --nproc-per-node={asked.processes} --node-rank="$SLURM_NODEID" --no-python'
        options += ' --master-addr="$address" --master-port="$port"'
    else:
        stem = shlex.quote(str(folder / job.name))
        on_node += f"hosts={stem}.$SLURM_JOB_ID.$SLURM_STEP_ID.hosts; own=$hosts.$SLURM_NODEID; "
        on_node += f'{hosts} | sed "s/$/ slots={asked.processes}/" > "$own" && mv -f "$own" "$hosts"; '
        options = '--hostfile="$hosts" --no_ssh --node_rank="$SLURM_NODEID" --no_python --no_local_rank'
        options += ' --master_addr="$address" --master_port="$port"'
    forward = shlex.join([*slurm.prefix, job.program("mates"), "forward", "--"])
    on_node += f"exec {forward} {shlex.quote(job.program(launcher))} {options} {shlex.join(job.command)}"
    return f"{shlex.join(words)} bash -c {shlex.quote(on_node)}"


_SCRIPT = """#!/bin/bash
{options}
# {step} of {run}, written by mates. The same file can be submitted again: what is done is not done twice.

attempts={stem}.$SLURM_JOB_ID.attempts
note() {{
    printf '{{"time": "%s", "restart": %s, "event": "%s", "detail": "%s"}}\\n' \\
        "$(date -u +%FT%TZ)" "${{SLURM_RESTART_COUNT:-0}}" "$1" "$2" >> "$attempts"
    echo "mates: $(date -u +%FT%TZ) attempt $((${{SLURM_RESTART_COUNT:-0}} + 1)) of job $SLURM_JOB_ID: $1 $2"
}}
again() {{  # back to the queue; not where somebody has cancelled the job, nor where it is there or has begun again since
    if [ -z "{requeues}" ] || [ -e {stem}.$SLURM_JOB_ID.{cancelled} ]; then exit "$code"; fi
    read -r state restarts < <(squeue -h -j "$SLURM_JOB_ID" -O State:20,RestartCnt:20)
    if [ "$state $restarts" != "RUNNING ${{SLURM_RESTART_COUNT:-0}}" ]; then exit "$code"; fi
    note requeued "$1"
    scontrol requeue "$SLURM_JOB_ID"
    exit "$code"
}}

# Asked to stop, some time before the limit or when others need the nodes: the ranks save, and the job goes on when its turn comes.
asked=
step=
trap 'asked=yes; [ -z "$step" ] || kill -USR2 "$step" 2>/dev/null' USR2 TERM

note begun "$SLURM_JOB_NODELIST"
begun={stem}.$SLURM_JOB_ID.begun
touch "$begun"
cd {directory} || exit {bad_input}
{setup}
{environment}

{command} &
step=$!
[ -z "$asked" ] || kill -USR2 "$step"
wait "$step"
while kill -0 "$step" 2>/dev/null; do wait "$step"; done  # a signal ends the waiting, not the step
wait "$step"  # bash still knows its exit code; that of a wait which a signal ended is another
code=$?

finished={finished}
if [ "$code" = 0 ] && [ -n "$finished" ] && [ ! -e "$finished" ]; then
    echo "mates: the ranks have ended and $finished is not there: some ended too early, or were killed unnoticed" >&2
    code=1
fi
if [ "$code" = 0 ]; then
    {then}
    code=$?
fi
if [ "$code" = 0 ]; then
    note done
    exit 0
fi
if [ "$code" = {bad_input} ] || [ "$code" = {bad_step} ]; then  # the next attempt would end as this one
    note failed "$code"
    exit "$code"
fi
# An attempt that has saved something may be followed by any number of others, if it was asked to stop or was a long one.
saved=$(find {place} -newer "$begun" -type f ! -name '*.tmp' 2>/dev/null | head -n 1)
if [ -n "$saved" ] && {{ [ -n "$asked" ] || [ "$code" = {stopped} ]; }}; then
    note stopped "$code"
    again "asked to stop"
fi
if [ -n "$saved" ] && [ "$SECONDS" -ge {long} ]; then note lost "$code"; else note failed "$code"; fi
if [ "$(grep -c '"failed"' "$attempts")" -le {retries} ]; then again "exit code $code"; fi
exit "$code"
"""
