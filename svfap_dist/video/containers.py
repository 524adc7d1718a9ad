"""Does a file hold all the bytes that its own outermost structure announces?

A copy that broke off is the commonest damage of a large download, and a decoder is a bad judge of
it: FFmpeg plays what is there and says nothing. The outermost structure tells: an mp4 is a row of
boxes with their sizes (ISO/IEC 14496-12, 4.2), a Matroska or WebM file is one segment with its size
(RFC 8794, 4 and 6; RFC 9559, 4.5). AVI and FLV are left to the probe, which looks at their packets.
"""

from __future__ import annotations

_EBML_HEADER = bytes.fromhex("1a45dfa3")
_MATROSKA_SEGMENT = bytes.fromhex("18538067")


def missing_bytes(data: bytes) -> str | None:
    """What reaches beyond the end of the file, in words; None if nothing does or nobody can say."""
    if data[4:8] == b"ftyp":
        return _mp4_box_cut(data)
    if data[:4] == _EBML_HEADER:
        return _matroska_segment_cut(data)
    return None


def _mp4_box_cut(data: bytes) -> str | None:
    start = 0
    while start + 8 <= len(data):
        size = int.from_bytes(data[start : start + 4], "big")
        name = data[start + 4 : start + 8].decode("latin-1")
        if size == 1:  # the real size follows, 64 bits wide
            size = int.from_bytes(data[start + 8 : start + 16], "big")
        if size < 8:  # 0: the rest of the file, however long; else no box: FFmpeg will say
            return None
        if start + size > len(data):
            return f"box {name!r} ends at byte {start + size} of {len(data)}"
        start += size
    return None


def _matroska_segment_cut(data: bytes) -> str | None:
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
    """(first byte after the size field at `at`, size); None if the field is cut or invalid."""
    if at >= len(data) or data[at] == 0:
        return None
    length = 9 - data[at].bit_length()  # as many bytes as the first has leading zero bits, plus one
    if at + length > len(data):
        return None
    return at + length, int.from_bytes(data[at : at + length], "big") - (1 << 7 * length)
