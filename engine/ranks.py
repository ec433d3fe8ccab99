"""Which rank this process is: found in the variables of the launcher that started it.

Known are deepspeed and torchrun (RANK), Open MPI's mpirun (OMPI_COMM_WORLD_RANK), MPICH's mpirun and ``srun --mpi=pmi2`` (PMI_RANK), and
srun (SLURM_PROCID). Without any of them a process is alone.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import subprocess
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import psutil

PROMISED_WORLD_SIZE = "MATES_WORLD_SIZE"
NOBODY = "nobody"
LOWEST_PORT, PORTS = 15_000, 15_000  # below the ports that systems hand out by themselves


class LaunchError(RuntimeError):
    """The processes that were started are not the ones that were promised, or cannot find each other."""


@dataclass(frozen=True)
class Place:
    """A process among those of its step. ``launcher`` is who says so: torch (deepspeed, torchrun), openmpi, mpich, slurm or "nobody"."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    launcher: str


def find_place(environment: Mapping[str, str] = os.environ) -> Place:
    """The place that this process was given.

    Raises:
        LaunchError: a variable that is no number, or another number of ranks than was promised: with a wrong flag, launchers start N
            separate jobs of one rank, each of which would do the whole work.
    """
    place = _place(environment)
    if not 0 <= place.rank < place.size:
        raise LaunchError(f"rank {place.rank} of {place.size} ranks, by the variables of {place.launcher}; check the launch command")
    promised, who = _promised(environment)
    if promised is not None and place.size != promised:
        by = "no launcher's variables are set" if place.launcher == NOBODY else f"by the variables of {place.launcher}"
        raise LaunchError(
            f"rank {place.rank}: {who} promised {promised} ranks, this process finds {place.size} ({by}); "
            "check the launch command: these would be separate jobs, each doing all of the work"
        )
    return place


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise LaunchError(f"{name} is not set though other variables of the same launcher are; check the launch command")
    try:
        return int(text)
    except ValueError as error:
        raise LaunchError(f"{name}: found {text!r}, expected a number; check the launch command") from error


def _place(environment: Mapping[str, str]) -> Place:
    number = partial(_number, environment)
    if "RANK" in environment:
        size = number("WORLD_SIZE")
        local_size = number("LOCAL_WORLD_SIZE", number("LOCAL_SIZE", size))  # deepspeed's launcher says the second
        return Place(number("RANK"), size, number("LOCAL_RANK", 0), local_size, "torch")
    if "OMPI_COMM_WORLD_RANK" in environment:
        local_rank, local_size = number("OMPI_COMM_WORLD_LOCAL_RANK"), number("OMPI_COMM_WORLD_LOCAL_SIZE")
        return Place(number("OMPI_COMM_WORLD_RANK"), number("OMPI_COMM_WORLD_SIZE"), local_rank, local_size, "openmpi")
    if "PMI_RANK" in environment and "MPI_LOCALRANKID" in environment:  # srun sets the first too, and SLURM's own say more
        local_rank, local_size = number("MPI_LOCALRANKID"), number("MPI_LOCALNRANKS")
        return Place(number("PMI_RANK"), number("PMI_SIZE"), local_rank, local_size, "mpich")
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:  # a batch script has the second only, and is no rank
        size, tasks = number("SLURM_STEP_NUM_TASKS"), environment.get("SLURM_STEP_TASKS_PER_NODE", "")
        return Place(number("SLURM_PROCID"), size, number("SLURM_LOCALID"), _tasks_of_node(tasks, number("SLURM_NODEID", 0), size), "slurm")
    for name in ("PMI_SIZE", "MV2_COMM_WORLD_SIZE", "FLUX_JOB_SIZE", "PALS_SIZE"):
        if number(name, 1) > 1:
            raise LaunchError(
                f"{name} is {environment[name]}, of a launcher whose other variables are not known here; set RANK, WORLD_SIZE, LOCAL_RANK, "
                "LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each rank, or check the launch command"
            )
    return Place(0, 1, 0, 1, NOBODY)


def _tasks_of_node(tasks: str, node: int, size: int) -> int:
    """Tasks of a node, of what SLURM writes as ``8(x3),2``."""
    counts: list[int] = []
    for item in filter(None, tasks.split(",")):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if not found:
            raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE: found {tasks!r}, expected numbers such as 8(x3),2; check the launch command")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts[node] if node < len(counts) else size


def _promised(environment: Mapping[str, str]) -> tuple[int | None, str]:
    if PROMISED_WORLD_SIZE in environment:
        return _number(environment, PROMISED_WORLD_SIZE), "the launcher"
    if "SLURM_STEP_ID" in environment and environment.get("WORLD_SIZE") == "1":  # each task of srun a job of one rank
        return _number(environment, "SLURM_STEP_NUM_TASKS", 1), "srun"
    return None, ""


def announce(place: Place, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables by which torch and DeepSpeed know a place, with where rank 0 listens.

    MASTER_ADDR and MASTER_PORT are taken as they are where they are set. Otherwise ranks of one node meet on it; under srun they meet
    on the first node of the step; ranks of mpirun ask MPI.
    """
    own = {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.size),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_size),
    }
    if "MASTER_ADDR" in environment and "MASTER_PORT" in environment:
        return own
    if place.size == 1:
        return own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if place.launcher == "torch":
        raise LaunchError("RANK is set but not MASTER_ADDR and MASTER_PORT, at which ranks find each other; check the launch command")
    if place.launcher == "slurm":
        port = port_of_job(f"{environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}")
        host = environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"])
        return own | {"MASTER_ADDR": host, "MASTER_PORT": environment.get("MASTER_PORT", str(port))}
    host, free = _ask_mpi(place)
    return own | {"MASTER_ADDR": host, "MASTER_PORT": free}


def port_of_job(name: str) -> int:
    """A port that depends on a job's name alone, so that all its ranks know it and jobs on one node rarely share it."""
    return LOWEST_PORT + zlib.crc32(name.encode()) % PORTS


def first_host(nodes: str) -> str:
    """The first host of what SLURM writes as ``n[01-16,20],m3``. LaunchError where neither scontrol nor the list tells it."""
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=60, check=False)
        if done.returncode == 0 and done.stdout.split():
            return done.stdout.split()[0]
    except (OSError, subprocess.TimeoutExpired):
        pass  # not every image that a rank runs in has SLURM's commands
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    if not found:
        raise LaunchError(f"the first node of {nodes!r} cannot be told; set MASTER_ADDR")
    return found[1] + (found[2] or "") + (found[3] or "")


def _ask_mpi(place: Place) -> tuple[str, str]:
    """Rank 0's address and a free port of it, told to all ranks by MPI."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"{place.size} ranks of mpirun, and MPI cannot be loaded ({error}): install an MPI library (`pip install mpich`), or set "
            "MASTER_ADDR and MASTER_PORT, at which ranks find each other"
        ) from error
    world = MPI.COMM_WORLD
    if world.Get_size() != place.size:
        raise LaunchError(
            f"mpirun started {place.size} ranks, MPI finds {world.Get_size()}: mpirun and mpi4py are of different MPI libraries; use the "
            "mpirun of mpi4py's own, or set MASTER_ADDR and MASTER_PORT"
        )
    told = world.bcast((own_address(), str(free_port())) if place.rank == 0 else None)
    MPI.Finalize()  # of no more use; a rank that ends without it would be taken for one that crashed
    return str(told[0]), str(told[1])


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


# --- addresses -----------------------------------------------------------------------------------------------------


def resolved(host: str) -> str | None:
    """IPv4 address of a host as this machine sees it; None where it has none."""
    try:
        return socket.gethostbyname(host)
    except OSError:
        return None


def is_loopback(address: str | None) -> bool:
    """Whether an address cannot be reached from other machines."""
    return address is None or ipaddress.ip_address(address).is_loopback


def own_address(towards: str | None = None) -> str:
    """This machine's address as others see it: of the route to ``towards``, of its own name, or of its first interface."""
    routed = towards and _source_address(towards)
    if routed and not is_loopback(routed):
        return routed
    named = resolved(socket.gethostname())
    if named is not None and not is_loopback(named):
        return named
    interfaces = _interfaces()
    return interfaces[0][1] if interfaces else "127.0.0.1"


def interface_of(address: str) -> str | None:
    """Name of the network interface that has an address."""
    return next((name for name, own in _interfaces() if own == address), None)


def _interfaces() -> list[tuple[str, str]]:
    """Name and IPv4 address of interfaces that are up and lead to other machines; those of containers and bridges last."""
    states = psutil.net_if_stats()
    found = [
        (name, item.address)
        for name, items in psutil.net_if_addrs().items()
        for item in items
        if item.family == socket.AF_INET and states[name].isup and not is_loopback(item.address)
    ]
    return sorted(found, key=lambda item: item[0].startswith(("docker", "br-", "virbr", "veth", "cni")))


def _source_address(host: str) -> str | None:
    """The address from which this machine would reach a host; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def network_settings(place: Place, environment: Mapping[str, str]) -> dict[str, str]:
    """GLOO_SOCKET_IFNAME where it is needed and nobody has set it.

    gloo listens on the address that the machine's own name resolves to. Where that is a loopback alias (Debian's 127.0.1.1), ranks of
    other machines cannot reach it.
    """
    several = place.local_size < place.size
    if not several or "GLOO_SOCKET_IFNAME" in environment or not is_loopback(resolved(socket.gethostname())):
        return {}
    master = environment.get("MASTER_ADDR")
    interface = interface_of(own_address(None if master is None or is_loopback(resolved(master)) else master))
    if interface is None:
        raise LaunchError(f"{socket.gethostname()} has no network interface but loopback ones; other ranks cannot reach it")
    return {"GLOO_SOCKET_IFNAME": interface}
