"""A real Ray cluster over two hosts on this machine: each host is a set of namespaces of its own.

A host has its own network (a veth pair on a bridge, 10.78.0.0/24), host name, process ids, /dev/shm
and /tmp/ray; they share the rest of the file system. Its first process keeps it alive, and when
that is killed the kernel kills all of the host. The cluster asks for a token.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from waiting import until

HOSTS = {"svfap-h1": "10.78.0.1", "svfap-h2": "10.78.0.2"}
_HEAD, _WORKER = HOSTS
_LINKS = {host: f"{host}-link" for host in HOSTS}  # of veth pairs, our ends
_BRIDGE, _OUR_ADDRESS = "svfap-bridge", "10.78.0.254"
_INIT = (
    "hostname {host}; mkdir -p /tmp/ray; mount -t tmpfs -o size=1g tmpfs /dev/shm; "
    "mount -t tmpfs -o size=1g tmpfs /tmp/ray; echo up; while :; do sleep 1000 & wait; done"
)
_START = ["--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]


class RayHosts:
    """Two hosts with a CPU each; `address` is the dashboard's, `environment` its clients'."""

    def __init__(self) -> None:
        self.address = f"http://{HOSTS[_HEAD]}:8265"
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        self._inits: dict[str, subprocess.Popen[str]] = {}

    def start(self) -> None:
        _ip(f"link add {_BRIDGE} type bridge")
        _ip(f"addr add {_OUR_ADDRESS}/24 dev {_BRIDGE}")
        _ip(f"link set {_BRIDGE} up")
        for host, link in _LINKS.items():
            self._boot(host, link)
        head = f"--node-ip-address={HOSTS[_HEAD]}"
        dashboard = f"--dashboard-host={HOSTS[_HEAD]}"
        self.on(_HEAD, "ray", "start", "--head", head, "--port=6379", dashboard, *_START)
        address = f"--node-ip-address={HOSTS[_WORKER]}"
        self.on(_WORKER, "ray", "start", f"--address={HOSTS[_HEAD]}:6379", address, *_START)

    def _boot(self, host: str, link: str) -> None:
        names = Path("/etc/netns", host)  # `ip netns exec` puts what lies here into /etc
        names.mkdir(parents=True)
        hosts = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in HOSTS.items())]
        (names / "hosts").write_text("\n".join(hosts) + "\n")
        _ip(f"netns add {host}")
        _ip(f"link add {link} type veth peer name eth0 netns {host}")
        _ip(f"link set {link} master {_BRIDGE} up")
        _ip(f"-n {host} addr add {HOSTS[host]}/24 dev eth0")
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

    def on(self, host: str, *command: str) -> str:
        """Standard output of a command on a host; it must succeed."""
        unshare = self._inits[host].pid  # `ip netns exec` has become it
        (init,) = Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()
        done = subprocess.run(
            [
                "nsenter",
                f"--target={init}",
                "--net",
                "--uts",
                "--pid",
                "--ipc",
                "--mount",
                *command,
            ],
            env=os.environ | self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def take_away_worker(self, seconds: int) -> None:
        """Have Ray announce that the second host will be taken away, as for a spot instance."""
        find = "import ray; ray.init(address='auto', log_to_driver=False); print(*("
        find += f"n['NodeID'] for n in ray.nodes() if n['NodeManagerHostname'] == '{_WORKER}'))"
        node = self.on(_HEAD, "python", "-c", find).strip()
        reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test"]
        deadline = f"--deadline-remaining-seconds={seconds}"
        address = f"--address={HOSTS[_HEAD]}:6379"
        self.on(_HEAD, "ray", "drain-node", address, f"--node-id={node}", *reason, deadline)

    def stop(self) -> None:
        for init in self._inits.values():
            init.send_signal(signal.SIGKILL)  # unshare's --kill-child takes the host along
            init.wait()
        for host in HOSTS:
            if Path("/run/netns", host).exists():
                until(lambda host=host: not _ip(f"netns pids {host}"), f"the end of {host}")
                _ip(f"netns del {host}")
            shutil.rmtree(Path("/etc/netns", host), ignore_errors=True)
        # A network namespace outlives its name for a while, or not; its links must be gone.
        for link in (*_LINKS.values(), _BRIDGE):
            subprocess.run(["ip", "link", "del", link], capture_output=True, check=False)
            assert not Path("/sys/class/net", link).exists()


def _ip(words: str) -> str:
    return subprocess.run(
        ["ip", *words.split()], capture_output=True, text=True, check=True
    ).stdout.strip()
