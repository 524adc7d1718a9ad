"""Connect to a Ray cluster, or start one on this machine; variables that its workers need.

Whether anything listens at an address is checked before Ray is asked to connect, which would retry
for minutes.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import time
from collections.abc import Iterator

from svfap_dist import logs
from svfap_dist.errors import ClusterError, ConfigError

LOCAL = "local"  # address of a cluster that is started on this machine, for this process
_HOST_AND_PORT = re.compile(r"(ray://)?\[?(?P<host>[^\[\]/]+)\]?:(?P<port>\d+)")
_LONGEST_SOCKET_PATH = 107  # bytes, the kernel's limit
_SECONDS_TO_ANSWER = 15.0  # a head that was just started may not listen yet
_SECONDS_BETWEEN_TRIES = 0.5
# Variables of this process that workers on other machines need, too: access to the store, to
# trackers and to the Hub (not HF_HOME, a path of this machine), the network's settings, torch's,
# logging.
_INHERITED_PREFIXES = (
    *("AWS_", "WANDB_", "MLFLOW_"),
    *("NCCL_", "GLOO_", "UCX_", "TORCH_", "TORCHINDUCTOR_"),
)
_INHERITED_NAMES = ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", logs.VARIABLE)


@contextlib.contextmanager
def connected_to_ray(address: str, *, num_cpus: int, fix: str) -> Iterator[None]:
    """Connect this process to a Ray cluster, unless it is connected; disconnect on exit.

    Args:
        address: Address in Ray's forms; `LOCAL` starts a cluster.
        num_cpus: CPUs of a cluster that is started.
        fix: Advice for the error.

    Raises:
        ClusterError: There is no cluster at the address, or it refuses.
        ConfigError: The folder for a new cluster's sockets has too long a path.
    """
    if starts_cluster := address == LOCAL:
        check_socket_paths()
        # Read when Ray is imported. The cluster serves one user and one command: it listens on
        # loopback only, so it needs no token, and writes none to the home directory, where it would
        # change what other Ray commands do. Its workers are what this machine is for now.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray's name for loopback
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_worker_niceness", "0")
    if "NO_COLOR" in os.environ or not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    check_answers(address, fix)
    cluster = {"num_cpus": num_cpus, "include_dashboard": False} if starts_cluster else {}
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    try:
        ray.init(address=address, **cluster, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        found = str(error).splitlines()[0]
        where = "this machine" if starts_cluster else address
        raise _cannot_connect(where, found, fix) from error
    try:
        yield
    finally:
        ray.shutdown()


def inherited_variables() -> dict[str, str]:
    """Return the variables of this process that workers of a Ray cluster get.

    Ray itself passes none to a cluster that was started elsewhere.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_INHERITED_PREFIXES) or name in _INHERITED_NAMES
    }


def check_socket_paths() -> None:
    """Check that Ray can make its sockets in the temporary folder: their paths have a limit.

    Raises:
        ConfigError: The paths would be too long.
    """
    # As in `ray._common.utils.get_default_system_temp_dir`.
    variable = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    folder = os.environ.get(variable, "/tmp")  # noqa: S108 - Ray's choice
    session = f"session_0000-00-00_00-00-00_000000_{os.getpid()}"
    longest = os.path.join(folder, "ray", session, "sockets", "plasma_store")
    excess = len(os.fsencode(longest)) - _LONGEST_SOCKET_PATH
    if excess > 0:
        found = f"{folder}, {excess} bytes longer than a socket's path allows"
        advice = "set RAY_TMPDIR to a shorter path on a local disk, such as /tmp"
        raise ConfigError("Temporary folder is too long for Ray", variable, found, advice)


def check_answers(address: str, fix: str, seconds: float = _SECONDS_TO_ANSWER) -> None:
    """Check that something listens at an address.

    Args:
        address: "host:port" or "ray://host:port"; others, such as "auto", are left to Ray.
        fix: Advice for the error.
        seconds: How long to retry.

    Raises:
        ClusterError: Nothing listens there.
    """
    place = _HOST_AND_PORT.fullmatch(address)
    if place is None:
        return
    deadline = time.monotonic() + seconds
    while True:
        try:
            left = max(deadline - time.monotonic(), 0.1)
            socket.create_connection((place["host"], int(place["port"])), timeout=left).close()
            return
        except (OSError, UnicodeError) as error:  # the latter if the host is no valid name
            if time.monotonic() >= deadline or isinstance(error, UnicodeError):
                raise _cannot_connect(address, f"nothing answers there ({error})", fix) from error
        time.sleep(_SECONDS_BETWEEN_TRIES)


def _cannot_connect(where: str, found: str, fix: str) -> ClusterError:
    return ClusterError("Cannot connect to Ray", where=where, found=found, do=fix)
