"""``mates launch``: one step over several ranks, through whichever launcher a machine or a cluster has."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, cast, get_args

from mates.engine.config import Recipe, RecipeError, ResourcesConfig, SlurmLauncher, require
from mates.engine.loop import Step, check_needed, step_request
from mates.engine.progress import say
from mates.engine.ranks import PROMISED_WORLD_SIZE, LaunchError, first_host, free_port
from mates.launchers.jobs import MPI_VERBS, SHARED_OUT, Job, Resources, job_script, jobs_folder, resources_of, step_arguments, step_name
from mates.launchers.local import console_script, run_command, run_ranks, step_environment
from mates.launchers.locks import hold_run, run_lock
from mates.launchers.recipe import write_recipe
from mates.launchers.slurm import SlurmError, alive_jobs, submit, wait_for
from mates.preprocess.artifact import atomic_file

Mode = Literal["local", "deepspeed", "slurm", "mpi"]
MODES: tuple[Mode, ...] = get_args(Mode)
BATCH_VERBS = ("pretrain", "evaluate")
"""Their ranks share training batches."""
SSH = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15"]


@dataclass(frozen=True)
class Host:
    """A machine and the number of ranks that it takes."""

    name: str
    slots: int


def with_ranks(recipe: Recipe, step: Step, nodes: int | None, gpus_per_node: int | None, processes_per_node: int | None) -> Recipe:
    """The recipe with the ranks that the command line asks for. RecipeError where the step or its batches cannot be shared so."""
    per_node = processes_per_node if processes_per_node is not None else gpus_per_node
    if nodes is None and per_node is None:
        return recipe
    asked = resources_of(recipe, step)
    nodes, per_node = nodes or asked.nodes, per_node or asked.processes
    require(nodes >= 1, "--nodes", nodes, "at least 1")
    option = "--gpus-per-node" if processes_per_node is None else "--processes-per-node"
    require(per_node >= 1, option, per_node, "at least 1")
    if step.verb not in SHARED_OUT:
        require(nodes * per_node == 1, f"--nodes x {option}", nodes * per_node, f"1, since {step.verb} is the work of one process")
    slurm = recipe.launch.slurm
    own = replace(slurm.steps.get(step.verb, ResourcesConfig()), nodes=nodes, processes=per_node)
    if gpus_per_node is not None or processes_per_node is not None:
        own = replace(own, gpus_per_node=gpus_per_node or 0)
    launch = replace(recipe.launch, slurm=replace(slurm, steps={**slurm.steps, step.verb: own}))
    if step.verb in BATCH_VERBS:
        launch = replace(launch, processes=nodes * per_node, nodes=nodes)
    return replace(recipe, launch=launch)


def recipe_path(recipe: Recipe, step: Step) -> Path:
    """Where the recipe that a launched step reads is kept."""
    return recipe.path() / "launch" / f"{step_name(step)}.yaml"


# --- one machine ---------------------------------------------------------------------------------------------------


def local_command(recipe: Recipe, step: Step) -> list[str]:
    """A step's command line on this machine."""
    return [console_script("mates"), *step_arguments(step, recipe_path(recipe, step).absolute())]


def launch_local(recipe: Recipe, step: Step, resources: Resources) -> None:
    """Start the ranks of a step on this machine."""
    command = local_command(recipe, step)
    with run_lock(recipe.path()) as note:
        note(step)
        write_recipe(recipe_path(recipe, step), recipe)
        run_ranks(recipe, step, command, resources.ranks)


# --- several machines ----------------------------------------------------------------------------------------------


def read_hosts(path: Path | None, per_node: int, nodes: int | None) -> list[Host]:
    """The machines to use: of a hostfile, or of the SLURM allocation around this process; otherwise this machine.

    Lines of a hostfile are ``name``, ``name slots=8`` (deepspeed, Open MPI) or ``name:8`` (MPICH); what follows a # is not read.

    Raises:
        RecipeError: a line that is none of these, a machine that is there twice, or fewer machines than ``nodes``.
    """
    if path is not None:
        hosts = _parse_hostfile(path, per_node)
    elif "SLURM_JOB_NODELIST" in os.environ:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]], capture_output=True, text=True, check=False
        ).stdout.split()
        hosts = [Host(name, per_node) for name in listed or [first_host(os.environ["SLURM_JOB_NODELIST"])]]
    else:
        hosts = [Host(socket.gethostname(), per_node)]
    where = str(path) if path else "this machine" if "SLURM_JOB_NODELIST" not in os.environ else "the SLURM allocation"
    if nodes is not None and nodes > len(hosts):
        raise RecipeError(f"--nodes: found {nodes}, but {where} has {len(hosts)}: {', '.join(host.name for host in hosts)}; see --hostfile")
    chosen = hosts[:nodes]
    small = [f"{host.name} ({host.slots})" for host in chosen if host.slots < per_node]
    if small:
        raise RecipeError(f"{where}: {per_node} ranks a node are asked for, and fewer slots are there on {', '.join(small)}")
    return [Host(host.name, per_node) for host in chosen]


def _parse_hostfile(path: Path, per_node: int) -> list[Host]:
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read as a hostfile: {error.strerror}") from error
    hosts: list[Host] = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        found = re.fullmatch(r"([^\s:=]+)(?:\s+slots\s*=\s*(\d+)|:(\d+))?", words)
        if not found:
            raise RecipeError(f"{path}, line {number}: found {line!r}, expected `name`, `name slots=8` or `name:8`")
        if found[1] in {host.name for host in hosts}:
            raise RecipeError(f"{path}, line {number}: {found[1]} is there twice; give it more slots instead")
        hosts.append(Host(found[1], int(found[2] or found[3] or per_node)))
    if not hosts:
        raise RecipeError(f"{path}: no machine in it, expected a line for each, such as `node1 slots=8`")
    return hosts


def check_hosts(hosts: Sequence[Host]) -> None:
    """LaunchError, naming the machines, where one has no address or does not let this user in by ssh without a password."""
    unknown = []
    nowhere = [host.name for host in hosts if len(hosts) > 1 and host.name.startswith(("localhost", "127."))]
    if nowhere:
        raise LaunchError(f"{', '.join(nowhere)}: each machine takes it for itself; the hostfile needs names by which all find each other")
    for host in hosts:
        try:
            socket.getaddrinfo(host.name, None)
        except OSError as error:
            unknown.append(f"{host.name} ({error.strerror or error})")
    if unknown:
        raise LaunchError(f"no such machine: {', '.join(unknown)}; check the hostfile")
    if shutil.which("ssh") is None:
        raise LaunchError("ssh: not on this machine's path; ranks elsewhere are started by it. Under SLURM use `mates launch slurm`")
    with ThreadPoolExecutor(64) as threads:
        refused = [message for message in threads.map(_try_ssh, hosts) if message]
    if refused:
        raise LaunchError(
            f"ssh without a password is needed to start ranks, and fails: {'; '.join(refused)}; `mates launch slurm` needs none"
        )


def _try_ssh(host: Host) -> str | None:
    if host.name in (socket.gethostname(), "localhost"):
        return None
    done = subprocess.run([*SSH, host.name, "true"], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    said = done.stderr.strip().splitlines()
    return f"{host.name}: {said[-1] if said else f'exit code {done.returncode}'}" if done.returncode else None


def deepspeed_command(recipe: Recipe, step: Step, hosts: Sequence[Host], hostfile: Path, launcher: str) -> list[str]:
    """The deepspeed launcher's command line for ranks on several machines, which it reaches by ssh (through pdsh)."""
    return [
        console_script("deepspeed"),
        f"--hostfile={hostfile.absolute()}",
        f"--num_nodes={len(hosts)}",
        f"--num_gpus={hosts[0].slots}",
        f"--launcher={launcher}",
        f"--master_addr={hosts[0].name}",
        f"--master_port={free_port()}",
        "--quiet",
        "--no_python",
        "--no_local_rank",
        *local_command(recipe, step),
    ]


def launch_deepspeed(recipe: Recipe, step: Step, hosts: Sequence[Host], launcher: str, *, dry_run: bool) -> None:
    """Start the ranks of a step on several machines by the deepspeed launcher. StepFailedError where one fails."""
    ranks = sum(host.slots for host in hosts)
    folder = recipe_path(recipe, step).parent
    hostfile, variables = folder / f"{step_name(step)}.hostfile", folder / f"{step_name(step)}.env"
    command = deepspeed_command(recipe, step, hosts, hostfile, launcher)
    environment = shared_variables(ranks)
    lines = "".join(f"{host.name} slots={host.slots}\n" for host in hosts)
    if dry_run:
        print(f"# {hostfile}:\n{lines}# {variables} (DS_ENV_FILE):\n{_as_lines(environment)}{shlex.join(command)}")
        return
    check_hosts(hosts)
    if launcher == "pdsh" and shutil.which("pdsh") is None:
        raise LaunchError("pdsh: not on this machine's path; install it (Debian: `apt-get install pdsh`), or use another mode of launch")
    files = {hostfile: lines, variables: _as_lines(environment)}
    environment = step_environment(ranks, follows=False) | {"DS_ENV_FILE": str(variables.absolute()), "PDSH_RCMD_TYPE": "ssh"}
    with run_lock(recipe.path()) as note:
        note(step)
        write_recipe(recipe_path(recipe, step), recipe)
        for path, text in files.items():
            with atomic_file(path) as handle:
                handle.write(text.encode())
        run_command(command, environment, partial(ask_hosts, hosts, local_command(recipe, step)))


def shared_variables(ranks: int) -> dict[str, str]:
    """Variables that every rank needs; launchers over ssh pass on those alone which they are told of."""
    environment = step_environment(ranks, follows=False)
    names = [PROMISED_WORLD_SIZE, "PYTHONSAFEPATH", "PYTHONWARNINGS", "TOKENIZERS_PARALLELISM", "OMP_WAIT_POLICY", "PATH"]
    names += ["TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HOME", "LD_LIBRARY_PATH"]
    names += ["DS_ACCELERATOR"] if "DS_ACCELERATOR" in os.environ else []  # otherwise each rank looks what its machine has
    names += [name for name in os.environ if name.startswith(("NCCL_", "GLOO_", "TORCH_", "TRITON_", "UCX_"))]
    found = {name: environment[name] for name in names if environment.get(name)}
    return {name: value for name, value in found.items() if not set(value) & set(" \t\n;\"'$&|()<>`\\")}  # launchers pass them on unquoted


def _as_lines(environment: Mapping[str, str]) -> str:
    return "".join(f"{name}={value}\n" for name, value in environment.items())


def ask_hosts(hosts: Sequence[Host], command: Sequence[str]) -> None:
    """Hand a request to stop (SIGUSR2) to the ranks on all machines, which launchers over ssh keep from them."""
    program = re.escape(shlex.join(command).replace("'", ""))
    ask = f"pkill -USR2 -f {shlex.quote(f'^[^ ]*python[^ ]* {program}$')}"  # the launcher has other words before the program's

    def at(host: Host) -> None:
        reach = ["sh", "-c"] if host.name == socket.gethostname() else [*SSH, host.name]
        subprocess.run([*reach, ask], check=False, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    with ThreadPoolExecutor(64) as threads:
        list(threads.map(at, hosts))


def mpi_command(recipe: Recipe, step: Step, hosts: Sequence[Host], *, remote: bool) -> list[str]:
    """mpirun's command line, as MPICH's or Open MPI's wants it. LaunchError where there is none."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise LaunchError("mpirun: not on this machine's path; install an MPI library (`pip install mpich`) or load your cluster's module")
    told = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    is_open = "Open MPI" in told or "OpenRTE" in told
    ranks, per_node = sum(host.slots for host in hosts), hosts[0].slots
    command = [found, "-n", str(ranks)]
    if is_open:
        command += ["--map-by", f"ppr:{per_node}:node", "--bind-to", "none"]
        command += ["--allow-run-as-root"] if os.geteuid() == 0 else []
    else:
        command += ["-ppn", str(per_node)]
    if remote:
        command += ["--host" if is_open else "-hosts", ",".join(f"{host.name}:{host.slots}" for host in hosts)]
    variables = shared_variables(ranks)
    if step.verb not in MPI_VERBS:
        master = hosts[0].name if remote else "127.0.0.1"
        variables |= {"MASTER_ADDR": master, "MASTER_PORT": str(free_port())}
    else:
        del variables[PROMISED_WORLD_SIZE]
    for name, value in variables.items():
        command += ["-x", f"{name}={value}"] if is_open else ["-genv", name, value]
    return [*command, *local_command(recipe, step)]


def launch_mpi(recipe: Recipe, step: Step, hosts: Sequence[Host], *, dry_run: bool) -> None:
    """Start the ranks of a step by mpirun. StepFailedError where one fails."""
    remote = [host.name for host in hosts] != [socket.gethostname()]
    command = mpi_command(recipe, step, hosts, remote=remote)
    if dry_run:
        print(shlex.join(command))
        return
    if remote and "SLURM_JOB_ID" not in os.environ:  # inside an allocation mpirun uses srun
        check_hosts(hosts)
    environment = step_environment(sum(host.slots for host in hosts), follows=False)
    with run_lock(recipe.path()) as note:
        note(step)
        write_recipe(recipe_path(recipe, step), recipe)
        run_command(command, environment, partial(ask_hosts, hosts, local_command(recipe, step)) if remote else None)


def slurm_job(recipe: Recipe, step: Step, launcher: str | None) -> Job:
    """A step as a job for SLURM."""
    if launcher is not None:
        recipe = replace(recipe, launch=replace(recipe.launch, slurm=replace(recipe.launch.slurm, launcher=cast(SlurmLauncher, launcher))))
    return Job(recipe, step, recipe_path(recipe, step), resources_of(recipe, step))


def run_in_allocation(job: Job) -> None:
    """Run a step's job script in the allocation that this process is in. StepFailedError where it fails."""
    script = jobs_folder(job.recipe.path()) / f"{job.name}.sh"
    with atomic_file(script) as handle:
        handle.write(job_script(job, requeues=False).encode())
    run_command(["bash", str(script)], dict(os.environ), handles_stops=True)


@dataclass(frozen=True)
class Options:
    """What `mates launch` was asked for beside the step: see its help."""

    nodes: int | None
    hostfile: str | None
    launcher: str | None
    dry_run: bool
    wait: bool


def start(mode: Mode, recipe: Recipe, step: Step, options: Options) -> None:
    """Start a step's ranks, or print how they would be started.

    Raises:
        LaunchError: machines that cannot be reached, or commands that are not there. StepFailedError: the step failed.
        SlurmError: SLURM refuses the job, or with ``wait`` it failed. ArtifactError: what the step needs is not there.
    """
    resources = resources_of(recipe, step)
    if mode == "local":
        require(resources.nodes == 1, "--nodes", resources.nodes, "1 for local; deepspeed, slurm and mpi reach other machines")
        if step.verb in MPI_VERBS and resources.ranks > 1:
            raise RecipeError(f"found {resources.ranks} ranks, expected 1: on one machine the processes of {step.verb} are corpus.workers")
    if mode == "deepspeed" and step.verb in MPI_VERBS:
        raise RecipeError(f"{step.verb}: its ranks meet through MPI; use `mates launch mpi` or `mates launch slurm`")
    if step.method is not None and not options.dry_run:
        check_needed(recipe, step)
        if step_request(recipe, step).find():
            say(f"launch: {step} is done")
            return
    if mode == "local" and options.dry_run:
        how = "the deepspeed launcher" if step.verb == "pretrain" else "mates"
        print(f"# {resources.ranks} ranks of this machine, started by {how}:\n{shlex.join(local_command(recipe, step))}")
        return
    if mode == "local":
        launch_local(recipe, step, resources)
        return
    if mode == "slurm":
        _start_slurm(slurm_job(recipe, step, options.launcher), options)
        return
    hosts = read_hosts(Path(options.hostfile) if options.hostfile else None, resources.processes, options.nodes or resources.nodes)
    if mode == "deepspeed":
        launch_deepspeed(recipe, step, hosts, options.launcher or "pdsh", dry_run=options.dry_run)
    else:
        launch_mpi(recipe, step, hosts, dry_run=options.dry_run)


def _start_slurm(job: Job, options: Options) -> None:
    inside = "SLURM_JOB_ID" in os.environ
    if options.dry_run:
        print(job_script(job, requeues=not inside))
        return
    run_dir = job.recipe.path()
    with hold_run(run_dir):
        for alive in alive_jobs(run_dir):
            if alive.name == job.name:
                raise SlurmError(f"{job.step} is in SLURM's queue already, as job {alive.job}; see `mates status {run_dir}`")
        write_recipe(job.recipe_file, job.recipe)
        made = None if inside else submit(job)
    if made is None:
        run_in_allocation(job)
        return
    say(f"launch: {job.step} is job {made.job}; its log is {made.log}")
    if options.wait:
        wait_for(made, job)
