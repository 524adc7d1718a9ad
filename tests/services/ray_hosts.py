"""A real Ray cluster over several hosts on this machine, each a set of namespaces of its own.

A host has its own network (a veth pair on a bridge), host name, process ids, /dev/shm and /tmp/ray;
they share the rest of the file system. Its first process keeps it alive, and when that is killed
the kernel kills all of the host. The cluster requires a token.

A host can be powered off (`power_cut`: the others receive no packet), started again (`boot`, then
`join`), cut off from the network and reconnected, or announced as preempted (`take_away`).
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

from commands import output_of
from waiting import until

_INIT = (
    "hostname {host}; mkdir -p /tmp/ray; mount -t tmpfs -o size=1g tmpfs /dev/shm; "
    "mount -t tmpfs -o size=1g tmpfs /tmp/ray; echo up; while :; do sleep 1000 & wait; done"
)
_START = ["--object-store-memory=100000000", "--disable-usage-stats"]
_NAMESPACES = ["--net", "--uts", "--pid", "--ipc", "--mount"]


class RayHosts:
    """Hosts with a CPU each, the first one is the head.

    `hosts` maps names to IP addresses, `our_address` is this machine's in their network, `address`
    the dashboard's, `environment` its clients'.

    Args:
        count: Number of hosts.
        name: Begins the names of hosts and links: clusters that exist at a time need their own.
        subnet: First three numbers of the addresses; the same.
        head_trains: Whether the head has a CPU for Ray's workers, and a dashboard.
        variables: Further environment variables of the cluster and its clients.
    """

    def __init__(
        self,
        count: int = 2,
        *,
        name: str = "svfap",
        subnet: str = "10.78.0",
        head_trains: bool = True,
        **variables: str,
    ) -> None:
        self.hosts = {f"{name}-h{i}": f"{subnet}.{i}" for i in range(1, count + 1)}
        self.head = next(iter(self.hosts))
        self.our_address = f"{subnet}.254"
        self._bridge, self._head_trains = f"{name}-bridge", head_trains
        self.address = f"http://{self.hosts[self.head]}:8265"
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **variables,
        }
        self._inits: dict[str, subprocess.Popen[str]] = {}

    def start(self) -> None:
        """Boot all hosts, the head first, and join them to one cluster."""
        self.start_network()
        for host in self.hosts:
            self.boot(host)
            self.join(host)

    def start_network(self) -> None:
        """Make the bridge that connects the hosts and this machine."""
        _ip(f"link add {self._bridge} type bridge")
        _ip(f"addr add {self.our_address}/24 dev {self._bridge}")
        _ip(f"link set {self._bridge} up")

    def boot(self, host: str) -> None:
        """Start a host that is off, with empty /dev/shm and /tmp/ray; Ray does not run on it."""
        names = Path("/etc/netns", host)  # `ip netns exec` mounts its content over /etc
        names.mkdir(parents=True, exist_ok=True)
        rows = ["127.0.0.1 localhost", *(f"{at} {name}" for name, at in self.hosts.items())]
        (names / "hosts").write_text("\n".join(rows) + "\n")
        link = _link(host)
        _ip(f"netns add {host}")
        _ip(f"link add {link} type veth peer name eth0 netns {host}")
        _ip(f"link set {link} master {self._bridge} up")
        _ip(f"-n {host} addr add {self.hosts[host]}/24 dev eth0")
        _ip(f"-n {host} link set eth0 up")
        _ip(f"-n {host} link set lo up")
        own = ["--uts", "--pid", "--ipc", "--mount", "--mount-proc", "--fork", "--kill-child"]
        self._inits[host] = subprocess.Popen(
            ["ip", "netns", "exec", host, "unshare", *own, "bash", "-c", _INIT.format(host=host)],
            stdout=subprocess.PIPE,
            text=True,
        )
        output = self._inits[host].stdout
        assert output is not None
        assert output.readline() == "up\n"

    def join(self, host: str, **variables: str) -> None:
        """Start Ray on a host: the head's begins a cluster, that of others joins it.

        Args:
            host: Name of the host.
            variables: Environment variables of Ray on this host, and of its workers.
        """
        is_head = host == self.head
        options = [f"--node-ip-address={self.hosts[host]}", *_START]
        options.append(f"--num-cpus={int(self._head_trains or not is_head)}")
        if is_head:
            dashboard = f"--dashboard-host={self.hosts[host]}"
            options += ["--head", "--port=6379", dashboard]
            options += [] if self._head_trains else ["--include-dashboard=false"]
        else:
            options.append(f"--address={self.hosts[self.head]}:6379")
        self.on(host, "ray", "start", *options, **variables)

    def power_cut(self, host: str) -> None:
        """Kill all of a host at once; the others get no packet about it."""
        _ip(f"link del {_link(host)}")
        init = self._inits.pop(host)
        init.send_signal(signal.SIGKILL)  # unshare's --kill-child takes the host along
        init.wait()
        until(lambda: _is_empty(host), f"the end of {host}")
        _ip(f"netns del {host}")

    def cut_off(self, host: str) -> None:
        """Disconnect a host from the network; its processes continue."""
        _ip(f"link set {_link(host)} down")

    def reconnect(self, host: str) -> None:
        """Connect a host that was cut off."""
        _ip(f"link set {_link(host)} up")

    def on(self, host: str, *command: str, **variables: str) -> str:
        """Standard output of a command on a host; it must succeed."""
        return output_of([*self._enter(host), *command], self.environment | variables)

    def launch(
        self, host: str, *command: str, output: IO[str], **variables: str
    ) -> subprocess.Popen:
        """Start a command on a host; killing the result leaves the command itself alive."""
        return subprocess.Popen(
            [*self._enter(host), *command],
            env=os.environ | self.environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _enter(self, host: str) -> list[str]:
        unshare = self._inits[host].pid  # `ip netns exec` has become it
        (init,) = Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()
        return ["nsenter", f"--target={init}", *_NAMESPACES]

    def processes(self, host: str) -> set[str]:
        """Return the names of the processes on a host."""
        pids = _ip(f"netns pids {host}").split()
        names = (Path("/proc", pid, "comm") for pid in pids)
        return {name.read_text().strip() for name in names if name.exists()}

    def take_away(self, host: str, seconds: int) -> None:
        """Have Ray announce that a host will be taken away, as for a spot instance."""
        find = "import ray; ray.init(address='auto', log_to_driver=False); print(*("
        find += "n['NodeID'] for n in ray.nodes() "
        find += f"if n['Alive'] and n['NodeManagerHostname'] == '{host}'))"
        node = self.on(self.head, "python", "-c", find).strip()
        reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test"]
        deadline = f"--deadline-remaining-seconds={seconds}"
        address = f"--address={self.hosts[self.head]}:6379"
        self.on(self.head, "ray", "drain-node", address, f"--node-id={node}", *reason, deadline)

    def stop(self) -> None:
        """End all hosts and their network."""
        for init in self._inits.values():
            init.send_signal(signal.SIGKILL)
            init.wait()
        for host in self.hosts:
            if Path("/run/netns", host).exists():
                until(lambda host=host: _is_empty(host), f"the end of {host}")
                _ip(f"netns del {host}")
            shutil.rmtree(Path("/etc/netns", host), ignore_errors=True)
        # A network namespace outlives its name for a while, or not; its links must be gone.
        for link in (*map(_link, self.hosts), self._bridge):
            subprocess.run(["ip", "link", "del", link], capture_output=True, check=False)
            assert not Path("/sys/class/net", link).exists()


def _link(host: str) -> str:
    """Return the name of our end of a host's veth pair."""
    return f"{host}-link"


def _is_empty(host: str) -> bool:
    """Return whether no process of a host is left."""
    try:
        return not _ip(f"netns pids {host}")
    except subprocess.CalledProcessError:  # a process ended while `ip` read about it
        return False


def _ip(words: str) -> str:
    return subprocess.run(
        ["ip", *words.split()], capture_output=True, text=True, check=True
    ).stdout.strip()
