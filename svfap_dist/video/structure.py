"""Check the outermost structure of a file before FFmpeg opens it: is it cut short, or hostile?

An mp4 is a row of boxes with their sizes (ISO/IEC 14496-12, 4.2), some of which contain boxes; a
Matroska or WebM file is one segment with its size (RFC 8794, 4 and 6; RFC 9559, 4.5). AVI, FLV, ASF
and the MPEG streams have no such structure. FFmpeg plays what is there of a file that is cut short,
and allocates what tables announce: a few bytes may announce more samples than any machine has
memory for.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import NamedTuple

_EBML_HEADER = bytes.fromhex("1a45dfa3")
_MATROSKA_SEGMENT = bytes.fromhex("18538067")

_FIRST_BOXES = {b"ftyp", b"styp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"}
_VITAL_BOXES = {b"ftyp", b"styp", b"sidx", b"moov", b"moof", b"mdat"}  # what a video is made of
_CONTAINERS = {
    *(b"moov", b"trak", b"edts", b"mdia", b"minf", b"stbl"),
    *(b"moof", b"traf", b"mvex", b"cmov"),
}
_MAX_DEPTH = 10  # as FFmpeg's
_MAX_INDEX_BYTES = 64 << 20  # of a compressed index
_MAX_EDITED_SAMPLES = 1 << 24  # edits times samples: each edit may show all of them again


class _Box(NamedTuple):
    name: bytes
    begin: int  # of its content
    end: int  # as it states, maybe beyond the data; of the data where it extends to its end


def missing_bytes(data: bytes) -> str | None:
    """Describe what reaches beyond the end of a file; None: nothing, or unknown.

    Args:
        data: bytes of the file.
    """
    if data[4:8] in _FIRST_BOXES:
        return _find_cut_mp4_box(data)
    if data[:4] == _EBML_HEADER:
        return _find_cut_matroska_segment(data)
    return None


def impossible_table(data: bytes) -> str | None:
    """Describe a table of an mp4 that announces more than the file can hold; None: there is none.

    A sample takes a byte at least, so a file has no more samples than bytes.

    Args:
        data: bytes of the file.
    """
    if data[4:8] not in _FIRST_BOXES:
        return None
    return _find_impossible_table(data, len(data))


class _Tables:
    """What the tables of a track announce."""

    def __init__(self) -> None:
        self.samples = self.size = self.edits = 0  # size: of each sample; 0: they differ
        self.is_sound = self.has_unit_steps = False

    def add(self, data: bytes, box: _Box) -> None:
        """Take up what a box announces, if it is a table of samples."""
        first, second, third = (_number(data, box.begin + at) for at in (4, 8, 12))
        if box.name == b"hdlr":
            self.is_sound = data[box.begin + 8 : box.begin + 12] == b"soun"
        elif box.name == b"stts":  # number of rows, then samples and ticks of each
            self.has_unit_steps = (first, third) == (1, 1)
        elif box.name == b"stsz":  # size that all samples have or 0, number of samples
            self.size, self.samples = first, self.samples + second
        elif box.name == b"stz2":
            self.samples += second
        elif box.name == b"trun":
            self.samples += first
        elif box.name == b"elst":
            self.edits = max(self.edits, first)

    def excess(self, file_bytes: int) -> str | None:
        """Describe what a file of that size cannot hold; None: nothing."""
        # QuickTime counts the instants of sound as samples, compressed or not; FFmpeg reads chunks.
        if self.is_sound and self.has_unit_steps:
            return None
        if max(self.samples, self.samples * self.size) > file_bytes:
            of_size = f" of {self.size} bytes" if self.size else ""
            return f"a track announces {self.samples} samples{of_size} in {file_bytes} bytes"
        if self.edits * self.samples > _MAX_EDITED_SAMPLES:
            return f"a track announces {self.edits} edits of {self.samples} samples"
        return None


def _find_impossible_table(data: bytes, file_bytes: int) -> str | None:
    tracks = [_Tables()]
    for box in _walk(data):
        if box.name == b"trak":
            tracks.append(_Tables())
        elif box.name == b"cmvd":  # the index, compressed, after its size
            index = _inflate(data[box.begin + 4 : box.end])
            if index is None:
                return f"compressed index of more than {_MAX_INDEX_BYTES} bytes"
            if found := _find_impossible_table(index, file_bytes):
                return found
        tracks[-1].add(data, box)
    for track in tracks:
        if found := track.excess(file_bytes):
            return found
    samples = sum(track.samples for track in tracks if not track.is_sound)
    return f"{samples} samples in {file_bytes} bytes" if samples > file_bytes else None


def _inflate(compressed: bytes) -> bytes | None:
    """Return an index, as far as it can be read; None: it is too large."""
    inflater = zlib.decompressobj()
    try:
        index = inflater.decompress(compressed, _MAX_INDEX_BYTES)
    except zlib.error:
        return b""
    return None if inflater.unconsumed_tail else index


def _walk(data: bytes) -> Iterator[_Box]:
    """Yield all boxes, those that contain boxes before these."""
    stack = [_boxes(data, 0, len(data))]
    while stack:
        box = next(stack[-1], None)
        if box is None:
            stack.pop()
            continue
        yield box
        if box.name in _CONTAINERS and len(stack) < _MAX_DEPTH:
            stack.append(_boxes(data, box.begin, min(box.end, len(data))))


def _boxes(data: bytes, start: int, end: int) -> Iterator[_Box]:
    """Yield the boxes in a part of a file, up to what is no box."""
    while start + 8 <= end:
        size, header, name = _number(data, start), 8, data[start + 4 : start + 8]
        if size == 1:  # the real size follows, 64 bits wide
            size, header = int.from_bytes(data[start + 8 : start + 16], "big"), 16
        elif size == 0:  # the rest
            size = end - start
        if size < header:
            return
        yield _Box(name, start + header, start + size)
        start += size


def _number(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "big")


def _find_cut_mp4_box(data: bytes) -> str | None:
    seen = set[bytes]()
    for box in _boxes(data, 0, len(data)):
        # Players ignore what follows the video: padding, tags of ID3, anything.
        is_video = box.name in _VITAL_BOXES or not {b"moov", b"mdat"} <= seen
        if box.end > len(data) and is_video:
            name = box.name.decode("latin-1")
            return f"box {name!r} ends at byte {box.end} of {len(data)}"
        seen.add(box.name)
    return None


def _find_cut_matroska_segment(data: bytes) -> str | None:
    header = _ebml_size(data, 4)
    if header is None:
        return "the EBML header is incomplete"
    start = header[0] + header[1]
    segment = _ebml_size(data, start + 4)
    if segment is None:
        return "the segment's header is incomplete"
    body, size = segment
    unknown = (1 << 7 * (body - start - 4)) - 1  # all bits set: a stream written without an end
    if data[start : start + 4] != _MATROSKA_SEGMENT or size == unknown:
        return None
    return f"segment ends at byte {body + size} of {len(data)}" if body + size > len(data) else None


def _ebml_size(data: bytes, at: int) -> tuple[int, int] | None:
    """Return (first byte after the size field at `at`, size); None: it is cut or invalid."""
    if at >= len(data) or data[at] == 0:
        return None
    length = 9 - data[at].bit_length()  # as many bytes as the first has leading zero bits, plus one
    if at + length > len(data):
        return None
    return at + length, int.from_bytes(data[at : at + length], "big") - (1 << 7 * length)
