"""A real SLURM on one machine: a controller and nodes, each with a network, a host name, processes and mounts of its own.

Their file system is the machine's; only ``/dev/shm``, ``/run`` and ``/etc/hosts`` differ. The hosts are called ``ctl``, which stands for
the login node as well, and ``n1``, ``n2``, ….
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import psutil

SCRIPT = Path(__file__).with_name("cluster.sh")
CONTROL = "ctl"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
NAMESPACES = ["--uts", "--ipc", "--mount", "--pid"]
UNSHARE = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY"}
PACKAGES = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "srun": "slurm-wlm",
    "munged": "munge",
    "pdsh": "pdsh",
    "sshd": "openssh-server",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}


def why_not() -> str | None:
    """Why no cluster can be brought up here; None where one can."""
    if os.geteuid() != 0:
        return "a SLURM cluster of namespaces needs root"
    missing = {command: package for command, package in PACKAGES.items() if shutil.which(command, path=PATH) is None}
    if missing:
        return f"no {', '.join(missing)} here (Debian: apt-get install {' '.join(sorted(set(missing.values())))})"
    links = "ip link add br0 type bridge && ip link add v0 type veth peer name v1"
    tried = subprocess.run([*UNSHARE, "--net", "sh", "-c", links], env=_environment(), capture_output=True, text=True, check=False)
    return f"namespaces are not permitted here: {tried.stderr.strip()}" if tried.returncode else None


class Process(NamedTuple):
    """A process on a host of the cluster; ``pid`` is its number outside."""

    host: str
    pid: int
    command: str


class Command(subprocess.Popen[str]):
    """A command on a host of the cluster, in a process group of its own; signals reach the command itself."""

    def send_signal(self, sig: int) -> None:
        """Send a signal to what nsenter, which passes none on, has started."""
        while self.poll() is None:
            for child in psutil.Process(self.pid).children():
                with suppress(psutil.NoSuchProcess):
                    child.send_signal(sig)
                return


class Cluster:
    """A controller and ``nodes`` nodes with ``cpus`` CPUs and ``gpus`` made-up GPUs each, in a ``with`` statement.

    With ``hosts_alias`` every host takes its own name for 127.0.1.1, as Debian sets it up; without ``ssh`` no sshd runs.
    """

    def __init__(
        self, nodes: int = 2, *, cpus: int = 2, gpus: int = 0, slurmd_timeout: int = 10, hosts_alias: bool = False, ssh: bool = True
    ) -> None:
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.cpus, self.gpus, self.slurmd_timeout, self.hosts_alias, self.ssh = cpus, gpus, slurmd_timeout, hosts_alias, ssh
        self._first: dict[str, psutil.Process] = {}  # the first process of every host that is up
        self._started: dict[str, subprocess.Popen[str]] = {}  # what they were started with

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.down()

    def up(self, timeout: float = 60) -> None:
        """Start everything; returns when all nodes are idle."""
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # sockets lie in it, and their paths must be short
        try:
            self._write_files()
            arguments = [str(len(self.nodes)), "yes" if self.ssh else "no", str(self.gpus)]
            self._start_host(CONTROL, [*UNSHARE, "--net"], *arguments)
            for node in self.nodes:
                self.start_node(node)
            deadline = time.monotonic() + timeout
            while not self.idle():
                if time.monotonic() > deadline:
                    raise RuntimeError(f"nodes are not idle after {timeout} s\n{self.logs()}")
                time.sleep(0.05)
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """End everything; no process, interface or file is left."""
        if control := self._started.get(CONTROL):
            assert control.stdin is not None
            control.stdin.close()
            try:
                control.wait(timeout=10)
            except subprocess.TimeoutExpired:
                control.kill()
        for started in self._started.values():
            with started:
                pass
        self._first.clear()
        self._started.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(
        self,
        host: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        stdout: int | None = subprocess.PIPE,
        stderr: int | None = subprocess.PIPE,
    ) -> Command:
        """Start a command on a host, with the tests' Python first on its path and ``env`` on top of this process's environment."""
        return Command(
            [*self._enter(host), "env", "-C", str(cwd or Path.cwd()), *command],
            env=_environment() | {"SLURM_CONF": str(self.folder / "slurm.conf")} | dict(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )

    def run(
        self,
        host: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        check: bool = True,
        cwd: str | Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host to its end, or kill its process group after a time."""
        with self.start(host, command, env=env, cwd=cwd) as process:
            try:
                output, errors = process.communicate(timeout=timeout)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                if isinstance(error, subprocess.TimeoutExpired):
                    error.add_note(f"{_text(error.stdout)}\n{_text(error.stderr)}")
                raise
        if check and process.returncode != 0:
            failure = subprocess.CalledProcessError(process.returncode, list(command), output, errors)
            failure.add_note(f"{output}\n{errors}")
            raise failure
        return subprocess.CompletedProcess(list(command), process.returncode, output, errors)

    def kill_node(self, node: str) -> None:
        """Pull a node's plug: all its processes end, and nobody hears of it."""
        self.network(node, False)
        self._first.pop(node).kill()
        self._started[node].wait()

    def start_node(self, node: str) -> None:
        """Start a node, one that was killed too, with its network."""
        in_network = ["ip", "netns", "exec", node]
        self.network(node, True)
        self._start_host(node, [*self._enter(CONTROL), *in_network, *UNSHARE])

    def network(self, node: str, up: bool) -> None:
        """Cut a node off without either side being told, or connect it again."""
        self.run(CONTROL, ["ip", "link", "set", node, *(("master", "br0") if up else ("nomaster",))])

    def processes(self, pattern: str) -> list[Process]:
        """The processes on all hosts whose command line matches."""
        hosts = {_pid_namespace(process.pid): host for host, process in self._first.items()}
        found = []
        for process in psutil.process_iter(["cmdline"]):
            host, command = hosts.get(_pid_namespace(process.pid)), " ".join(process.info["cmdline"] or [])
            if host is not None and command and re.search(pattern, command):  # a zombie has no command line
                found.append(Process(host, process.pid, command))
        return found

    def submit(self, *arguments: str, env: Mapping[str, str] | None = None, cwd: str | Path | None = None) -> int:
        """The number of the job that sbatch makes of these arguments, in the cluster's folder unless told otherwise."""
        return int(self.run(CONTROL, ["sbatch", "--parsable", *arguments], env=env, cwd=cwd or self.folder).stdout)

    def output(self, job: int) -> str:
        """What a job has printed until now."""
        path = Path(self.job(job)["StdOut"])
        return path.read_text() if path.exists() else ""

    def jobs(self) -> dict[int, str]:
        """The states of all jobs, those that are over too."""
        lines = self.run(CONTROL, ["squeue", "--noheader", "--states=all", "--format=%A %T"]).stdout.splitlines()
        return {int(job): state for job, state in map(str.split, lines)}

    def job(self, job: int) -> dict[str, str]:
        """What scontrol shows of a job, such as ``JobState``, ``ExitCode``, ``Restarts`` and ``Reason``."""
        shown = self.run(CONTROL, ["scontrol", "--oneliner", "show", "job", str(job)]).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def wait_for(self, job: int, states: str | Collection[str], timeout: float = 60) -> str:
        """Wait until a job is in one of these states and return which; raises when it is over otherwise, or after a time."""
        wanted = {states} if isinstance(states, str) else set(states)
        deadline = time.monotonic() + timeout
        while (state := (shown := self.job(job))["JobState"]) not in wanted:
            if state in OVER or time.monotonic() > deadline:
                raise RuntimeError(f"job {job} is {state}, not {' or '.join(sorted(wanted))}: {shown}\n{self.logs()}")
            time.sleep(0.1)
        return state

    def idle(self) -> bool:
        """Whether all nodes are idle."""
        shown = self.run(CONTROL, ["sinfo", "--noheader", "--format=%D %t"], check=False).stdout
        return shown.split() == [str(len(self.nodes)), "idle"]

    def logs(self, lines: int = 15) -> str:
        """The ends of all daemons' logs."""
        tails = []
        for path in sorted((self.folder / "log").iterdir()):
            if ends := path.read_text(errors="replace").splitlines()[-lines:]:
                tails.append("\n".join([f"--- {path.name}", *ends]))
        return "\n".join(tails)

    def _enter(self, host: str) -> list[str]:
        if host not in self._first:
            raise RuntimeError(f"{host} is not up")
        return ["nsenter", "--target", str(self._first[host].pid), "--net", *NAMESPACES, "--"]

    def _start_host(self, host: str, within: Sequence[str], *arguments: str) -> None:
        """Start a host's first process and wait until it says that the daemons are up."""
        with (self.folder / "log" / f"{host}.log").open("a") as log:
            started = self._started[host] = subprocess.Popen(
                [*within, "bash", str(SCRIPT), str(self.folder), host, *arguments],
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        assert started.stdout is not None
        answered, _, _ = select.select([started.stdout], [], [], 30)
        if not answered or started.stdout.readline() != "ready\n":
            raise RuntimeError(f"{host} does not come up\n{self.logs()}")
        for process in psutil.Process(started.pid).children(recursive=True):
            numbers = re.search(r"^NSpid:\t(.*)$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
            if numbers is not None and numbers[1].split()[-1] == "1":
                self._first[host] = process
                return

    def _write_files(self) -> None:
        """Everything the daemons read."""
        for name in ("log", "state"):
            (self.folder / name).mkdir()
        addresses = {CONTROL: "10.77.0.1"} | {node: f"10.77.0.{11 + index}" for index, node in enumerate(self.nodes)}
        for host in addresses:
            seen = addresses | ({host: "127.0.1.1"} if self.hosts_alias else {})
            lines = [f"{address} {name}\n" for name, address in {"localhost": "127.0.0.1", **seen}.items()]
            (self.folder / f"hosts.{host}").write_text("".join(lines))
        gres = f"Gres=gpu:{self.gpus}" if self.gpus else ""
        slurm = [
            SLURM_CONF.format(folder=self.folder, timeout=self.slurmd_timeout, control=f"{CONTROL}({addresses[CONTROL]})"),
            *("GresTypes=gpu" for _ in range(bool(self.gpus))),
            *(f"NodeName={node} NodeAddr={addresses[node]} CPUs={self.cpus} RealMemory=8000 {gres}" for node in self.nodes),
            f"PartitionName=main Nodes={','.join(self.nodes)} Default=YES MaxTime=INFINITE State=UP\n",
        ]
        (self.folder / "slurm.conf").write_text("\n".join(slurm))
        (self.folder / "gres.conf").write_text("".join(f"Name=gpu File=/run/gpu{number}\n" for number in range(self.gpus)))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # to find out which fails where no cgroups are mounted
        (self.folder / "mpi.conf").write_text("PMIxCliTmpDirBase=/dev/shm\n")  # in /tmp, which is shared, the nodes' folders collide
        if self.ssh:
            for name in ("host_key", "user_key"):
                subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)], check=True)
            kept = {name: value for name, value in _environment().items() if name in ("PATH", "TORCH_EXTENSIONS_DIR")}
            variables = " ".join(f'"{name}={value}"' for name, value in kept.items())
            (self.folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=self.folder, variables=variables))
            (self.folder / "ssh_config").write_text(SSH_CONFIG.format(folder=self.folder))


def _environment() -> dict[str, str]:
    """This process's, without what another SLURM may have put there."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | {"PATH": PATH}


def _pid_namespace(pid: int) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:  # it has ended
        return None


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


# cred_expire: a job that is put back into the queue waits that long and a second (120 by default)
SLURM_CONF = """\
ClusterName=test
SlurmctldHost={control}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=/run/munge/munge.socket.2,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1
MpiDefault=none
JobRequeue=1
ReturnToService=2
SlurmdTimeout={timeout}
SlurmctldTimeout=30
KillWait=5
UnkillableStepTimeout=30
MinJobAge=300
MailProg=/bin/true
SlurmdParameters=config_overrides
"""
SSHD_CONFIG = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PasswordAuthentication no
MaxStartups 100
MaxSessions 100
SetEnv {variables}
"""
SSH_CONFIG = """\
Host *
  IdentityFile {folder}/user_key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  BatchMode yes
"""
