"""Decode text files that users write: recipes, lists of labels, files of variables.

Editors and shells save text in several encodings. Only UTF-8 is read, with or without a byte-order
mark; the error names what the file is instead.
"""

from __future__ import annotations

import codecs

SAVE_AS_UTF8 = "save the file as UTF-8"  # advice for the error

_MARKS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


def decode_text(data: bytes) -> str:
    """Return the text of a file, without a byte-order mark.

    Args:
        data: Content of the file.

    Raises:
        ValueError: It is not UTF-8; the message names the encoding or the place.
    """
    for encoding, marks in _MARKS.items():
        if data.startswith(marks):
            raise ValueError(f"it is {encoding}, not UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        found = f"line {line} has the byte {byte:#04x}, which is not UTF-8"
        if byte >= 0xA0:  # printable in Latin-1, the usual other encoding
            found += f" ({chr(byte)!r} in Latin-1)"
        raise ValueError(found) from error
    if "\0" in text:
        raise ValueError("it has NUL characters, as UTF-16 without a byte-order mark has")
    return text
