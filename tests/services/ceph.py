"""A real S3 store for tests: Ceph's RADOS gateway over one monitor and one in-memory object daemon.

Everything listens on loopback and lives in one folder; processes are ended by the pids in their pid
files. Settings that matter: messengers in `crc` mode (with authentication off, the default `secure`
mode hangs), a short Paxos interval (start in 2 s, not 14) and `tcp_nodelay` (small reads in 3 ms,
not 44).
"""

from __future__ import annotations

import os
import signal
import socket
import urllib.error
import urllib.request
import uuid
from pathlib import Path

from commands import output_of
from waiting import until

ACCESS_KEY, SECRET_KEY = "svfap-test", "svfap-test-secret"

_CONF = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon2}/0,v1:127.0.0.1:{mon1}/0]
mon initial members = a
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc
ms mon service mode = crc
ms mon cluster mode = crc
ms cluster mode = crc
ms service mode = crc
ms client mode = crc
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data = {dir}/mon
mon data avail crit = 1
osd data = {dir}/osd
osd journal = {dir}/osd/journal
osd objectstore = memstore
memstore device bytes = 8589934592
osd memory target = 939524096
log file = {dir}/log/$name.log
rgw init timeout = 60
paxos propose interval = 0.05
paxos min wait = 0.01
mon osd min up ratio = 0
mon max pg per osd = 1000
admin socket = {dir}/run/$name.asok
pid file = {dir}/run/$name.pid
run dir = {dir}/run
[mon.a]
mon addr = 127.0.0.1:{mon1}
[client.rgw]
rgw data = {dir}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw enable ops log = false
rgw enable usage log = false
"""


class Ceph:
    """One Ceph RGW on loopback; `endpoint` is its S3 URL."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        mon1, mon2, self.port = _free_ports(3)
        self.endpoint = f"http://127.0.0.1:{self.port}"
        for name in ("mon", "osd", "rgw", "run", "log"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._fsid = str(uuid.uuid4())
        self._conf = folder / "ceph.conf"
        self._conf.write_text(
            _CONF.format(dir=folder, fsid=self._fsid, mon1=mon1, mon2=mon2, port=self.port)
        )
        self._mon_addresses = f"[v2:127.0.0.1:{mon2},v1:127.0.0.1:{mon1}]"

    def start(self) -> None:
        conf, folder = ["-c", str(self._conf)], self.folder
        monmap = str(folder / "monmap")
        create = ["--create", "--fsid", self._fsid, "--addv", "a", self._mon_addresses]
        output_of(["monmaptool", *create, monmap])
        output_of(["ceph-mon", *conf, "-i", "a", "--mkfs", "--monmap", monmap])
        output_of(["ceph-mon", *conf, "-i", "a"])
        osd_uuid = str(uuid.uuid4())
        output_of(["ceph", *conf, "osd", "new", osd_uuid])
        output_of(["ceph-osd", *conf, "-i", "0", "--mkfs", "--osd-uuid", osd_uuid])
        output_of(["ceph", *conf, "osd", "crush", "add", "osd.0", "1.0", "host=h", "root=default"])
        output_of(["ceph-osd", *conf, "-i", "0"])
        until(lambda: "1 up" in output_of(["ceph", *conf, "osd", "stat"]), "the object daemon")
        self.start_gateway()
        user = ["user", "create", "--uid=test", "--display-name=test"]
        keys = [f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}"]
        output_of(["radosgw-admin", *conf, *user, *keys])

    def start_gateway(self) -> None:
        output_of(["radosgw", "-c", str(self._conf), "-n", "client.rgw"])
        until(self._answers, "the gateway")

    def kill_gateway(self) -> None:
        os.kill(self._pid("client.rgw"), signal.SIGKILL)
        until(lambda: not self._answers(), "the gateway's end")

    def stop(self) -> None:
        for name in ("client.rgw", "osd.0", "mon.a"):
            try:
                os.kill(self._pid(name), signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):
                continue  # it had not started

    def environment(self) -> dict[str, str]:
        """What a client of this store has in its environment."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def _pid(self, name: str) -> int:
        return int((self.folder / "run" / f"{name}.pid").read_text())

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(self.endpoint, timeout=5).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True


def _free_ports(count: int) -> list[int]:
    listeners = [socket.socket() for _ in range(count)]
    for listener in listeners:
        listener.bind(("127.0.0.1", 0))
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports
