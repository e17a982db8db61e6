"""A real Slurm cluster on one machine: slurmctld, munged and one slurmd per node.

Every node has a mount, host name, process and network namespace of its own, so it has its own address, ports and
process tree, and killing the first process of its namespace is what pulling its power cord is: everything on it is gone
at once and no connection is closed. ``run.sh`` puts the controller in such namespaces too, and the nodes inside them.
"""

import os
import shlex
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

NETWORK = "10.77.0"
CONTROLLER = f"{NETWORK}.254"
BRIDGE = "cluster0"
GPUS_PER_NODE = 4
"""Advertised, not there: what ``--gpus-per-node`` asks for is granted, and torch finds no device."""

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}({controller})
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
MessageTimeout=60
PropagatePrioProcess=1
KillWait=10
MinJobAge=3600
SlurmdParameters=config_overrides
NodeName=n[1-{nodes}] NodeAddr={network}.[1-{nodes}] CPUs=64 RealMemory=100000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=batch Nodes=n[1-3] Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=120 State=UP
PartitionName=urgent Nodes=n[1-3] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=single Nodes=n[4-{nodes}] MaxTime=INFINITE PriorityTier=1 PreemptMode=OFF State=UP
"""
"""What differs from a production cluster, and why: no cgroups and no accounting (neither is needed), fake processors, a
short time until a silent node counts as lost, and a short ``cred_expire``, because a requeued job may not start before
its old credential expires (two minutes by default). The daemons run at a higher priority than the jobs, so that a busy
machine does not make them miss one another."""
PRIORITY = ("nice", "-n", "-10")

NODE = """
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip address add "$3" dev eth0
ip link set eth0 up
nice -n -10 slurmd -D &
wait
"""
"""A node's first process. It waits for its end of the cable, which can be plugged in only once its namespace exists."""


class Cluster:
    """The daemons, the nodes, and what a user of the cluster types."""

    def __init__(self, folder: Path, nodes: int) -> None:
        """
        Args:
            folder: empty, with a short path (a socket's path may have 107 characters), not writable by others.
            nodes: n1 to nN; the first three are partition ``batch``, which ``urgent`` preempts, the rest ``single``.
        """
        self.folder = folder
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._nodes: dict[str, int] = {}
        self._environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Bring everything up; returns when all nodes are idle."""
        self._write_files()
        _run("mount", "--bind", str(self.folder / "hosts"), "/etc/hosts")
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "address", "add", f"{CONTROLLER}/24", "dev", BRIDGE)
        _run("ip", "link", "set", BRIDGE, "up")
        munge = self.folder / "munge"
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={munge / name}" for option, name in files.items()]
        self._daemon("munged", "--foreground", *options)
        _wait("munged to listen", (munge / "socket").exists, seconds=20)
        self._daemon("slurmctld", "-D", "-i")
        for name in self.names:
            self.start_node(name)
        _wait("all nodes to be idle", lambda: self._idle() == len(self.names), seconds=60)

    def _write_files(self) -> None:
        host = os.uname().nodename
        (self.folder / "munge").mkdir()
        (self.folder / "state").mkdir()
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        addresses = [f"{NETWORK}.{number} {name}" for number, name in enumerate(self.names, 1)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", f"{CONTROLLER} {host}", *addresses, ""]))
        values = {"host": host, "controller": CONTROLLER, "network": NETWORK, "gpus": GPUS_PER_NODE}
        text = CONFIGURATION.format(folder=self.folder, nodes=len(self.names), **values)
        (self.folder / "slurm.conf").write_text(text)
        for number in range(GPUS_PER_NODE):  # Slurm insists on devices; these are /dev/null by another name
            os.mknod(self.folder / f"gpu{number}", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{GPUS_PER_NODE - 1}]\n")

    def _daemon(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}.out").open("wb")
        self._daemons.append(
            subprocess.Popen(
                [*PRIORITY, *command], env=self._environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        )

    def _idle(self) -> int:
        names = self.type("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N", check=False).split()
        return len(set(names))

    def start_node(self, name: str) -> None:
        """Power on."""
        number = name.removeprefix("n")
        ours, theirs = f"port{number}", f"cable{number}"
        _run("ip", "link", "add", ours, "type", "veth", "peer", "name", theirs)
        _run("ip", "link", "set", ours, "master", BRIDGE, "up")
        log = (self.folder / f"node-{name}.out").open("wb")
        namespaces = ["unshare", "--mount", "--uts", "--pid", "--net", "--fork", "--kill-child", "--mount-proc"]
        script = ["bash", "-c", NODE, "node", name, str(self.folder), f"{NETWORK}.{number}/24"]
        outer = subprocess.Popen(
            [*namespaces, *script], env=self._environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
        self._daemons.append(outer)
        _wait(f"{name} to have a network", lambda: _first_process(outer.pid) is not None, seconds=20)
        process = _first_process(outer.pid)
        assert process is not None
        self._nodes[name] = process
        _run("ip", "link", "set", theirs, "netns", str(process), "name", "eth0")

    def kill_node(self, name: str) -> None:
        """Power off, without a word to anybody."""
        os.kill(self._nodes.pop(name), signal.SIGKILL)
        subprocess.run(["ip", "link", "delete", f"port{name.removeprefix('n')}"], check=False, capture_output=True)

    def stop(self) -> None:
        """End the nodes, then the daemons. What this misses ends with the namespaces that ``run.sh`` made."""
        for name in list(self._nodes):
            self.kill_node(name)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        subprocess.run(["ip", "link", "delete", BRIDGE], check=False)

    def type(self, *command: str, check: bool = True, environment: Mapping[str, str] | None = None) -> str:
        """What a user would type on the login node; standard output."""
        result = subprocess.run(
            command,
            env={**self._environment, **(environment or {})},
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or result.returncode == 0, f"{shlex.join(command)} failed: {result.stderr}{result.stdout}"
        return result.stdout.strip()

    def submit(self, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
        """``sbatch``; the job's id."""
        return self.type("sbatch", "--parsable", *arguments, environment=environment)

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of ``scontrol show job``."""
        words = self.type("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(
        self, what: str, job_id: str, condition: Callable[[dict[str, str]], object], *, seconds: float = 120
    ) -> dict[str, str]:
        """The job's fields once they meet the condition; the job's log in the error if they never do."""
        deadline = time.monotonic() + seconds
        while not condition(fields := self.job(job_id)):
            assert time.monotonic() < deadline, (
                f"waited {seconds:.0f} s for {what}: job {job_id} is {fields['JobState']} ({fields['Reason']})\n"
                f"{self.log(job_id)}"
            )
            time.sleep(0.2)
        return fields

    def wait_for_end(self, job_id: str, *, seconds: float = 120) -> dict[str, str]:
        """The job's fields once it has ended for good."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        return self.wait_for("the job's end", job_id, lambda fields: fields["JobState"] in ends, seconds=seconds)

    def log(self, job_id: str, last: int = 6000) -> str:
        """The end of the job's log."""
        path = Path(self.job(job_id)["StdOut"])
        return path.read_text(errors="replace")[-last:] if path.exists() else f"({path} does not exist)"


def _first_process(outer: int) -> int | None:
    """Process 1 of the namespaces that ``unshare`` (``outer``) made, once it is in its own network."""
    try:
        child = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
        if child and Path(f"/proc/{child[0]}/ns/net").readlink() != Path("/proc/self/ns/net").readlink():
            return int(child[0])
    except FileNotFoundError:
        pass
    return None


def _wait(what: str, condition: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.05)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
