"""Where faults happen: hosts with a Ray cluster across them, and a real S3 store behind a proxy.

The first host is Ray's head and has the driver, the others have a CPU each: two ranks leave one
host to spare. Each host has a small disk (a tmpfs) as TMPDIR, so that it can be filled, and the
files that ranks write there can be read while they train.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
for folder in (REPOSITORY, HERE.parent / "services"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from ceph import Ceph  # noqa: E402 - found by the path above
from ray_hosts import RayHosts  # noqa: E402
from store_proxy import StoreProxy  # noqa: E402
from watched_runs import spoil_shard  # noqa: E402

_BUCKET = "s3://chaos"
_CLIPS, _SHARD_CLIPS = 160, 20
_DISK_BYTES = 256 << 20
# How Ray notices a host that does not answer: by default after a minute (docs/reliability.md).
_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
}


class ChaosCluster:
    """The hosts, the store and the data sets; a context manager.

    `shards` and `spoilt_shards` are the data sets' URLs, the latter with 5 % bad videos; `plan` is
    the file that says what `rank_patches` plants.
    """

    def __init__(self, folder: Path, seed: int, num_workers: int = 3) -> None:
        self.folder, self.seed = folder, seed
        (folder / "logs").mkdir(exist_ok=True)
        self.hosts = RayHosts(
            1 + num_workers, name="chaos", subnet="10.79.0", head_trains=False, **_HEALTH_CHECKS
        )
        self.workers = [host for host in self.hosts.hosts if host != self.hosts.head]
        self.ceph = Ceph(folder / "ceph")
        self.shards, self.spoilt_shards = f"{_BUCKET}/shards", f"{_BUCKET}/spoilt"
        self.plan = folder / "plan.json"
        self._proxy: StoreProxy | None = None

    @property
    def proxy(self) -> StoreProxy:
        assert self._proxy is not None
        return self._proxy

    def __enter__(self) -> ChaosCluster:
        with contextlib.ExitStack() as stack:
            self._start(stack)
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def _start(self, stack: contextlib.ExitStack) -> None:
        stack.callback(self.ceph.stop)
        self.ceph.start()
        stack.callback(self.hosts.stop)
        self.hosts.start_network()
        self._proxy = StoreProxy(self.hosts.our_address, self.ceph.port, self.seed)
        stack.callback(self._proxy.stop)
        self.hosts.environment |= self.ceph.environment() | {
            "AWS_ENDPOINT_URL": self._proxy.endpoint,
            "PYTHONPATH": f"{HERE / 'rank_patches'}:{REPOSITORY}",
            "RAY_TMPDIR": "/tmp",  # by default below TMPDIR, which is too long for a socket
            "SVFAP_CHAOS_PLAN": str(self.plan),
        }
        stack.enter_context(mock.patch.dict(os.environ, self.ceph.environment()))
        self.plant({})
        self._make_data()
        for host in self.hosts.hosts:
            disk = str(self.disk(host))
            os.makedirs(disk)
            _run("mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", disk)
            stack.callback(_run, "umount", "--lazy", disk)
            self.boot(host)

    def _make_data(self) -> None:
        import fsspec

        from data_sharding.pipeline import shard
        from svfap_dist import storage
        from svfap_dist.storage.s3 import LiteralS3

        for kind in (LiteralS3, fsspec.get_filesystem_class("s3")):
            kind.clear_instance_cache()  # they keep the credentials that they were made with
        fsspec.filesystem("s3").mkdir(_BUCKET)
        local = self.folder / "shards"
        clips = f"clips={_CLIPS},frames=16,size=64"
        shard("synthetic", clips, str(local), min_frames=8, max_samples_per_shard=_SHARD_CLIPS)
        for url in (self.shards, self.spoilt_shards):
            for name in storage.list_files(str(local)):
                storage.upload_file(str(local / name), storage.join(url, name))
            for tar in sorted(local.glob("*.tar")):  # a video of 20 is 5 %
                spoil_shard(tar)

    def boot(self, host: str, **variables: str) -> None:
        """Start a host that is off, and Ray on it."""
        self.hosts.boot(host)
        self.hosts.join(host, TMPDIR=str(self.disk(host)), **variables)

    def reboot(self, host: str, **variables: str) -> None:
        """Power a host off and start it again."""
        self.hosts.power_cut(host)
        self.boot(host, **variables)

    def repair(self) -> None:
        """Reboot hosts without Ray, which ends itself where the head has given a host up."""
        for host in self.workers:
            if "raylet" not in self.hosts.processes(host):
                self.reboot(host)

    def disk(self, host: str) -> Path:
        """The folder of a host's temporary files, a small file system of its own."""
        return self.folder / "disks" / host

    def clean_disks(self) -> None:
        """Remove what killed processes have left on the hosts' disks."""
        for host in self.hosts.hosts:
            for path in self.disk(host).iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def plant(self, plan: dict[str, object]) -> None:
        """Set what `rank_patches` does to the ranks; they read it when they start."""
        self.plan.write_text(json.dumps(plan))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
