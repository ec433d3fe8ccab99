"""The cluster that the other tests use does what a real one does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from slurm.cluster import Cluster

JOB = "echo started; exec sleep 1000"


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return sorted(done.stdout.splitlines())


def running(cluster: Cluster, *options: str) -> int:
    """A job that runs on both nodes for as long as it is left to."""
    job = cluster.submit("--nodes=2", *options, f"--wrap={JOB}")
    cluster.wait_for(job, "RUNNING")
    return job


def in_view(cluster: Cluster, node: str, state: str, timeout: float = 60) -> None:
    """Wait until the controller sees a node so."""
    deadline = time.monotonic() + timeout
    while (seen := cluster.run("ctl", ["sinfo", "--noheader", f"--nodes={node}", "--format=%T"]).stdout.strip()) != state:
        assert time.monotonic() < deadline, f"{node} is {seen}\n{cluster.logs()}"
        time.sleep(0.1)


def test_the_nodes_are_hosts_of_their_own(cluster: Cluster) -> None:
    assert lines(cluster.run("ctl", ["srun", "--nodes=2", "hostname"])) == ["n1", "n2"]
    for way in (["ssh", "n2", "hostname"], ["pdsh", "-N", "-R", "ssh", "-w", "n2", "hostname"]):
        assert lines(cluster.run("n1", way)) == ["n2"]
    python = cluster.run("ctl", ["srun", sys.executable, "-c", "import sys; print(sys.prefix)"])
    assert lines(python) == [sys.prefix]
    namespaces = {cluster.run(node, ["readlink", "/proc/self/ns/net"]).stdout for node in ("ctl", "n1", "n2")}
    assert len(namespaces | {str(Path("/proc/self/ns/net").readlink())}) == 4


def test_a_job_goes_on_after_its_node_is_killed(cluster: Cluster) -> None:
    job = running(cluster, "--requeue")
    cluster.kill_node("n2")
    in_view(cluster, "n2", "down*")
    assert cluster.wait_for(job, "PENDING") == "PENDING"
    assert not cluster.processes("sleep 1000")
    cluster.start_node("n2")
    cluster.wait_for(job, "RUNNING")
    assert cluster.job(job)["Restarts"] == "1"
    cluster.run("ctl", ["scancel", str(job)])
    cluster.wait_for(job, "CANCELLED")


def test_a_node_that_is_cut_off_comes_back(cluster: Cluster) -> None:
    job = running(cluster, "--no-requeue", "--no-kill")
    cluster.network("n2", False)
    assert cluster.run("n1", ["ssh", "-o", "ConnectTimeout=1", "n2", "true"], check=False).returncode == 255
    in_view(cluster, "n2", "down*")
    assert cluster.processes("^slurmd -N n2")
    cluster.network("n2", True)
    cluster.run("ctl", ["scontrol", "reconfigure"])  # else the controller looks again only after most of a minute
    in_view(cluster, "n2", "idle")
    assert cluster.jobs()[job] == "RUNNING"


def test_signals_reach_a_command_and_its_end_is_seen(cluster: Cluster) -> None:
    script = "trap 'kill $!; echo asked; exit 75' TERM; sleep 1000 & echo ready; wait"
    with cluster.start("n1", ["bash", "-c", script]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        output, _ = process.communicate()
    assert (process.returncode, output) == (75, "asked\n")
    with pytest.raises(subprocess.TimeoutExpired):
        cluster.run("n1", ["bash", "-c", "sleep 1000; true"], timeout=0.5)
    assert not cluster.processes("sleep")
    with pytest.raises(subprocess.CalledProcessError):
        cluster.run("n1", ["false"])


def test_gpus_are_handed_out(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(nodes=1, gpus=2)
    shown = ["bash", "-c", "echo $CUDA_VISIBLE_DEVICES"]
    assert lines(cluster.run("ctl", ["srun", "--gpus-per-node=2", *shown])) == ["0,1"]
    assert lines(cluster.run("ctl", ["srun", "--gpus-per-node=1", *shown])) == ["0"]


def test_a_host_may_take_its_name_for_a_local_address(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(hosts_alias=True)
    for node, seen in (("n1", "127.0.1.1"), ("n2", "10.77.0.11")):
        resolve = [sys.executable, "-c", "import socket; print(socket.gethostbyname('n1'))"]
        assert lines(cluster.run(node, resolve)) == [seen]
    job = cluster.submit("--nodes=2", "--wrap=srun hostname")
    cluster.wait_for(job, "COMPLETED")
    assert sorted(cluster.output(job).split()) == ["n1", "n2"]


def test_there_may_be_no_sshd(make_cluster: Callable[..., Cluster]) -> None:
    done = make_cluster(ssh=False).run("n1", ["ssh", "n2", "true"], check=False)
    assert done.returncode == 255
    assert "Connection refused" in done.stderr


def test_two_clusters_do_not_meet(cluster: Cluster, make_cluster: Callable[..., Cluster]) -> None:
    other = make_cluster(nodes=1)
    job = other.submit("--wrap=hostname")
    other.wait_for(job, "COMPLETED")
    assert cluster.jobs() == {}


def test_nothing_outlives_a_killed_test(can_cluster: None) -> None:
    code = "from slurm.cluster import Cluster\nwith Cluster() as c: print(c.folder, c._started['ctl'].pid, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        folder, pid = process.stdout.readline().split()
        box = psutil.Process(int(pid))
        inside = box.children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs([box, *inside], timeout=30)
    assert inside
    assert not alive
    assert not Path(folder).exists()


def test_a_cluster_that_does_not_come_up_says_why(can_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.cluster.SLURM_CONF", "Nonsense=1\n")
    cluster = Cluster()
    with pytest.raises(RuntimeError, match=r"ctl does not come up(.|\n)*Nonsense"):
        cluster.up()
    assert not cluster.folder.exists()
