"""An ONNX file with YuNet's inputs and outputs that sees one face, always the same.

The real file is not ours to ship. Its outputs are, for cells of 8, 16 and 32 pixels: probabilities
that a cell holds a face (`cls`, `obj`), the face's offset and logarithmic size in cells (`bbox`),
and five landmarks (`kps`). Written byte by byte (protocol buffers: tag, length, content), since
nothing else here needs a library for ONNX.
"""

from __future__ import annotations

import numpy as np

INPUT = (320, 256)  # width, height: what OpenCV makes of 320x240
CELL, ROW, COLUMN = 16, 5, 7
BOX = (0.5, 0.25, np.log(4), np.log(5))  # offset of the centre, size: in cells
_FLOAT = 1


def one_face(probability: float) -> bytes:
    """The file: a face of 4 by 5 cells with its centre half a cell right of the cell's corner and
    a quarter below it, and `probability` in both kinds."""
    # Outputs must come from the input, or OpenCV drops them: add nothing times its mean.
    nodes = [
        _node("ReduceMean", ["input"], "mean", _integer(3, 0), "keepdims"),
        _node("Mul", ["mean", "zero"], "nothing"),
    ]
    constants = [_tensor("zero", np.zeros(1, np.float32))]
    outputs: list[bytes] = []
    for kind, size in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)):
        for cell in (8, 16, 32):
            values = np.zeros((1, INPUT[0] // cell * (INPUT[1] // cell), size), np.float32)
            if cell == CELL and kind != "kps":
                at = ROW * (INPUT[0] // CELL) + COLUMN
                values[0, at] = BOX if kind == "bbox" else probability
            name = f"{kind}_{cell}"
            constants.append(_tensor(f"constant_{name}", values))
            nodes.append(_node("Add", [f"constant_{name}", "nothing"], name))
            outputs.append(_value(name, values.shape))
    graph = b"".join(
        [
            *(_field(1, node) for node in nodes),
            _field(2, b"stand-in"),
            *(_field(5, constant) for constant in constants),
            _field(11, _value("input", (1, 3, INPUT[1], INPUT[0]))),
            *(_field(12, output) for output in outputs),
        ]
    )
    return _integer(1, 6) + _field(7, graph) + _field(8, _integer(2, 11))


def _number(value: int) -> bytes:
    """A number as protocol buffers write it: seven bits a byte, the lowest first."""
    more = value >> 7
    return bytes([value & 127 | 128]) + _number(more) if more else bytes([value])


def _integer(tag: int, value: int) -> bytes:
    return _number(tag << 3) + _number(value)


def _field(tag: int, content: bytes) -> bytes:
    return _number(tag << 3 | 2) + _number(len(content)) + content


def _node(
    kind: str, inputs: list[str], output: str, value: bytes = b"", attribute: str = ""
) -> bytes:
    parts = [_field(1, name.encode()) for name in inputs]
    parts += [_field(2, output.encode()), _field(4, kind.encode())]
    if attribute:
        parts.append(_field(5, _field(1, attribute.encode()) + value + _integer(20, 2)))
    return b"".join(parts)


def _tensor(name: str, values: np.ndarray) -> bytes:
    shape = b"".join(_integer(1, length) for length in values.shape)
    return shape + _integer(2, _FLOAT) + _field(8, name.encode()) + _field(9, values.tobytes())


def _value(name: str, shape: tuple[int, ...]) -> bytes:
    lengths = b"".join(_field(1, _integer(1, length)) for length in shape)
    kind = _field(1, _integer(1, _FLOAT) + _field(2, lengths))
    return _field(1, name.encode()) + _field(2, kind)
