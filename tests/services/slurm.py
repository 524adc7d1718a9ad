"""A real Slurm for tests: a controller and three node daemons on this machine, with fake GPUs.

Everything listens on loopback and lives in one folder below /tmp (munge's user must be able to
reach it); processes are ended by the pids in their pid files. Debian builds slurmd so that several
may run on one machine (-N). The GPUs are device files: with Flags=nvidia_gpu_env Slurm
assigns them as it does real ones.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import tempfile
from pathlib import Path

from commands import output_of
from waiting import until

NODES = ("n1", "n2", "n3")

_CONF = """
ClusterName=svfap
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge/socket
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmctldPidFile={dir}/slurmctld.pid
SlurmctldLogFile={dir}/slurmctld.log
StateSaveLocation={dir}/state
SlurmdPidFile={dir}/slurmd.%n.pid
SlurmdLogFile={dir}/slurmd.%n.log
SlurmdSpoolDir={dir}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_interval=2
MpiDefault=none
ReturnToService=2
KillWait=15
JobRequeue=1
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} {node}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} {node}
NodeName=n3 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} {node}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_NODE = "CPUs=2 Sockets=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=2000 Gres=gpu:2"


class Slurm:
    """One Slurm of three nodes; `environment` is what its clients need."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="svfap-slurm-"))
        self.folder.chmod(0o755)
        self._conf = self.folder / "slurm.conf"
        self.environment = {"SLURM_CONF": str(self._conf)}

    def start(self) -> None:
        folder = self.folder
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (folder / name).mkdir()
        self._start_munge()
        for number in range(2):
            os.mknod(folder / f"nvidia{number}", 0o020666, os.makedev(1, 3))
        self._conf.write_text(
            _CONF.format(dir=folder, ports=_free_ports(4), host=socket.gethostname(), node=_NODE)
        )
        gpus = f"Name=gpu File={folder}/nvidia[0-1] Flags=nvidia_gpu_env\n"
        (folder / "gres.conf").write_text("".join(f"NodeName={node} {gpus}" for node in NODES))
        self.run("slurmctld", "-c", "-f", str(self._conf))
        for node in NODES:
            self.run("slurmd", "-f", str(self._conf), "-N", node)
        until(lambda: set(self.run("sinfo", "-h", "-o", "%T").split()) == {"idle"}, "idle nodes")

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        folder.mkdir(mode=0o711)
        (folder / "key").write_bytes(os.urandom(32))
        (folder / "key").chmod(0o400)
        for path in (folder, folder / "key"):
            shutil.chown(path, "munge", "munge")
        user = ("setpriv", "--reuid=munge", "--regid=munge", "--clear-groups")
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log"}
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        self.run(*user, "munged", "--force", *options, f"--seed-file={folder / 'seed'}")

    def run(self, *command: str) -> str:
        """Standard output of a command of Slurm's, which must succeed."""
        return output_of(command, self.environment)

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        line = self.run("scontrol", "show", "job", "--oneliner", number)
        return dict(re.findall(r"(\w+)=(\S*)", line))

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def start_requeued(self, number: str) -> None:
        """Start a requeued job now, which Slurm would put off for two minutes."""
        until(lambda: self.state(number) == "PENDING", f"job {number} in the queue again")
        self.run("scontrol", "update", f"JobId={number}", "StartTime=now")

    def stop(self) -> None:
        if self._pid("slurmctld.pid"):
            self.run("scancel", "--state=RUNNING")
            self.run("scancel", "--state=PENDING")
            until(lambda: not self.run("squeue", "-h"), "an empty queue")
        for name in (*(f"slurmd.{node}.pid" for node in NODES), "slurmctld.pid", "munge/pid"):
            if pid := self._pid(name):
                os.kill(pid, signal.SIGTERM)
                until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), f"the end of {name}")
        shutil.rmtree(self.folder)

    def _pid(self, name: str) -> int:
        """Of a daemon; 0 if it has not started."""
        path = self.folder / name
        return int(path.read_text()) if path.exists() else 0


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports
