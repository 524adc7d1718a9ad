"""What hostile input must lead to: a value, or an error of this project with all four parts."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from typing import Any

from svfap_dist.errors import SvfapError


def value_or_our_error(call: Callable[[], Any], kind: type[SvfapError]) -> Any:
    """What the call returns, None if it raises a complete error of that kind."""
    try:
        return call()
    except kind as error:
        parts = error.what, error.where, error.found, error.do
    assert all(parts), parts
    str(parts).encode()
    return None


def tar_member(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, **fields: Any) -> bytes:
    """A hostile header without content."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    for key, value in fields.items():
        setattr(member, key, value)
    return member.tobuf(tarfile.GNU_FORMAT)


def pax_member(name: str, content: bytes, **records: str) -> bytes:
    """A member with records of its own."""
    member = tarfile.TarInfo(name)
    member.size, member.pax_headers = len(content), records
    padding = bytes(-len(content) % tarfile.BLOCKSIZE)
    return member.tobuf(tarfile.PAX_FORMAT) + content + padding


_DEVICE = {"devmajor": 1, "devminor": 5}
_SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 60)}
_MAP = b"1\n%d\n0\n" % (1 << 60)
_NEGATIVE = pax_member("a.mp4", b"x", size="-1024")


def _is_end_of_tar(member: bytes) -> bool:
    """Whether tarfile takes a member for the end of the tar, so that none can be refused."""
    try:
        with tarfile.open(fileobj=io.BytesIO(member + bytes(1024)), mode="r:") as tar:
            return not tar.getmembers()
    except tarfile.ReadError:
        return False


HOSTILE_TARS = {
    "link": tar_member("a.mp4", kind=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "link to itself": tar_member("a.mp4", kind=tarfile.LNKTYPE, linkname="a.mp4"),
    "device": tar_member("a.mp4", kind=tarfile.CHRTYPE, **_DEVICE),
    "pipe": tar_member("a.mp4", kind=tarfile.FIFOTYPE),
    "size 2^63": tar_member("a.mp4", size=1 << 63),
    "negative size": tar_member("a.mp4", size=-(1 << 20)),
    "size in a record": pax_member("a.mp4", b"x", size=str(1 << 62)),
    "sparse": pax_member("a.mp4", _MAP.ljust(512, b"\0"), **_SPARSE),
    "nested records": tar_member("x", kind=tarfile.XHDTYPE) * 3000,
    "nested long names": tar_member("x", kind=tarfile.GNUTYPE_LONGNAME) * 3000,
}
if not _is_end_of_tar(_NEGATIVE):  # as in Python 3.11.2
    HOSTILE_TARS["negative size in a record"] = _NEGATIVE
