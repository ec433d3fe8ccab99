"""Ranks are found in the variables of every launcher, and what cannot be is said."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mates.engine import ranks
from mates.engine.ranks import LaunchError, Place, announce, find_place, first_host, network_settings, port_of_job

SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "17",
    "SLURM_STEP_NUM_TASKS": "18",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),2",
    "SLURM_STEP_NODELIST": "n[01-02,07]",
}
BATCH_SCRIPT = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_NTASKS": "18", "SLURM_LOCALID": "0"}
TORCH = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "3", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}
SRUN_PMI2 = SRUN | {"PMI_RANK": "17", "PMI_SIZE": "18"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place(0, 1, 0, 1, "nobody")),
        (BATCH_SCRIPT, Place(0, 1, 0, 1, "nobody")),
        (SRUN, Place(17, 18, 1, 2, "slurm")),
        (SRUN_PMI2, Place(17, 18, 1, 2, "slurm")),
        (SRUN | TORCH, Place(3, 4, 1, 2, "torch")),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"} | OPEN_MPI, Place(5, 8, 1, 4, "openmpi")),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"} | MPICH, Place(2, 3, 0, 1, "mpich")),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, Place(1, 2, 1, 2, "torch")),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}, Place(1, 2, 0, 1, "torch")),
    ],
)
def test_the_place_is_found(environment: dict[str, str], place: Place) -> None:
    assert find_place(environment) == place
    assert find_place(environment | {"MATES_WORLD_SIZE": str(place.size)}) == place


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (TORCH | {"MATES_WORLD_SIZE": "8"}, "rank 3: the launcher promised 8 ranks, this process finds 4"),
        ({"MATES_WORLD_SIZE": "2"}, "the launcher promised 2 ranks, this process finds 1"),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "1"}, "srun promised 18 ranks, this process finds 1"),
        (TORCH | {"WORLD_SIZE": "three"}, "WORLD_SIZE: found 'three', expected a number"),
        (TORCH | {"RANK": "4"}, "rank 4 of 4 ranks"),
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "eight"}, "SLURM_STEP_TASKS_PER_NODE: found 'eight'"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "PMI_SIZE is 2, of a launcher whose other variables are not known"),
        ({"MV2_COMM_WORLD_SIZE": "4"}, "MV2_COMM_WORLD_SIZE is 4, of a launcher"),
        ({"MATES_WORLD_SIZE": "two"}, "MATES_WORLD_SIZE: found 'two', expected a number"),
    ],
)
def test_what_cannot_be_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError) as caught:
        find_place(environment)
    assert message in str(caught.value)
    assert "check the launch command" in str(caught.value)


def test_runs_side_by_side_in_one_job_step_are_no_mistake() -> None:
    """Each task of srun its own `mates run`, which promises its own ranks."""
    assert find_place(SRUN | {"RANK": "0", "WORLD_SIZE": "1", "MATES_WORLD_SIZE": "1"}).size == 1


def test_srun_ranks_meet_on_the_first_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no scontrol
    found = announce(find_place(SRUN), SRUN)
    assert found["MASTER_ADDR"] == "n01"
    assert found["MASTER_PORT"] == str(port_of_job("77.0"))
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == ("17", "18", "1", "2")
    other = SRUN | {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
    assert announce(find_place(other), other)["MASTER_PORT"] == found["MASTER_PORT"]


def test_what_a_launcher_says_of_the_meeting_place_is_kept() -> None:
    where = {"MASTER_ADDR": "there", "MASTER_PORT": "1234"}
    assert not set(where) & set(announce(find_place(SRUN | where), SRUN | where))
    with pytest.raises(LaunchError, match="RANK is set but not MASTER_ADDR"):
        announce(find_place(TORCH), TORCH)


def test_ports_of_jobs_differ_and_are_not_handed_out_by_the_system() -> None:
    ports = [port_of_job(f"{job}.0") for job in range(200)]
    assert min(ports) >= 15_000
    assert max(ports) < 30_000
    assert len(set(ports)) > 190


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("n[007-016,20],m3", "n007"),
        ("gpu[3,5]-ib", "gpu3-ib"),
        ("a,b", "a"),
        ("r1-n2.x.org", "r1-n2.x.org"),
    ],
)
def test_the_first_host(nodes: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert first_host(nodes) == first


def test_an_interface_is_named_only_where_the_host_name_is_a_loopback_alias(monkeypatch: pytest.MonkeyPatch) -> None:
    far, near = Place(0, 4, 0, 2, "slurm"), Place(0, 2, 0, 2, "slurm")
    monkeypatch.setattr(ranks, "_interfaces", lambda: [("eth7", "10.1.2.3")])
    monkeypatch.setattr(ranks, "_source_address", lambda host: "10.1.2.3")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1" if name == socket.gethostname() else "10.1.2.4")
    assert network_settings(far, {"MASTER_ADDR": "other"}) == {"GLOO_SOCKET_IFNAME": "eth7"}
    assert network_settings(far, {"MASTER_ADDR": socket.gethostname()}) == {"GLOO_SOCKET_IFNAME": "eth7"}
    assert network_settings(far, {"GLOO_SOCKET_IFNAME": "ib0"}) == {}
    assert network_settings(near, {}) == {}
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.1.2.3")
    assert network_settings(far, {"MASTER_ADDR": "other"}) == {}


def test_ranks_of_mpirun_find_each_other(tmp_path: Path) -> None:
    """Nothing but mpirun tells them who they are."""
    program = tmp_path / "program.py"
    program.write_text(
        "import pathlib, torch\n"
        "from mates.engine import distributed\n"
        "world = distributed.join(timeout_minutes=1, threads=1)\n"
        f"pathlib.Path({str(tmp_path)!r}, f'{{world.rank}}.sum').write_text(str(int(world.total(torch.tensor([world.rank + 1])))))\n"
        "distributed.leave()\n"
    )
    mpirun = Path(sys.executable).with_name("mpirun")
    done = subprocess.run([mpirun, "-n", "3", sys.executable, "-P", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"{rank}.sum").read_text() for rank in range(3)] == ["6"] * 3
