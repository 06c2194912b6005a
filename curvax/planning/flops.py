"""FLOPs of a compiled program, with every iteration of its loops.

XLA's own count includes the body of a loop once; here every further iteration adds the FLOPs of the
body's instructions. The rules are XLA's: two per product in a dot or a convolution, padding left
out; one per element of other arithmetic; none for transcendental functions.
"""

import math
import re
from typing import Any

import numpy as np

from curvax.planning.hlo import Instruction, Program

_ARITHMETIC = {
    "abs", "add", "all-reduce", "and", "ceil", "clamp", "compare", "convert", "divide", "floor",
    "is-finite", "maximum", "minimum", "multiply", "negate", "not", "or", "remainder",
    "round-nearest-even", "select", "shift-left", "shift-right-arithmetic", "shift-right-logical",
    "sign", "subtract", "xor",
}  # fmt: skip


def count(compiled: Any, program: Program) -> float:
    """FLOPs of one run on one device.

    Args:
        compiled: the result of `lowered.compile()`.
        program: its parsed text.
    """
    further = program.total(of) - program.total(of, loops=False)
    return float(compiled.cost_analysis()["flops"]) + further


def of(instruction: Instruction) -> float:
    """FLOPs of one instruction, without the computations it calls."""
    if instruction.opcode == "dot":
        return _dot(instruction)
    if instruction.opcode == "convolution":
        return _convolution(instruction)
    if instruction.opcode not in _ARITHMETIC:
        return 0
    return sum(shape.elements for shape in instruction.shapes)


def _dot(instruction: Instruction) -> float:
    left = instruction.operands[0].shapes[0].sizes
    summed = math.prod(left[axis] for axis in instruction.sizes("lhs_contracting_dims"))
    return 2 * instruction.shapes[0].elements * summed


def _convolution(instruction: Instruction) -> float:
    """Twice the number of products outside of the padding.

    On TPUs matrix products are convolutions too: without a window, or with a batch dimension as a
    window dimension, dilated such that only its diagonal contributes.
    """
    image, kernel, _ = _labels(instruction)
    x, w = (dict(zip(*pair)) for pair in zip((image, kernel), _operand_sizes(instruction)))
    window = _window(instruction)
    groups = int(instruction.attribute("feature_group_count") or 1)
    batch_groups = int(instruction.attribute("batch_group_count") or 1)
    places = math.prod(
        _places(x[axis], w[axis], {name: sizes[n] for name, sizes in window.items()})
        for n, axis in enumerate(sorted(set(image) - {"b", "f"}))
    )
    return 2 * x["f"] // groups * w["o"] * (x["b"] // batch_groups) * places


def _labels(instruction: Instruction) -> list[str]:
    """The letters of image, kernel and output, as `["b01f", "01io", "b01f"]`."""
    return re.split("_|->", instruction.attribute("dim_labels"))


def _operand_sizes(instruction: Instruction) -> tuple[tuple[int, ...], ...]:
    return tuple(each.shapes[0].sizes for each in instruction.operands[:2])


def _window(instruction: Instruction) -> dict[str, list[list[int]]]:
    """The window's fields, each with a list for each dimension: `{"pad": [[1, 1], [0, 2]]}`."""
    fields = re.findall(r"(\w+)=([\dx_\-]+)", instruction.attribute("window"))
    return {name: [[int(n) for n in d.split("_")] for d in v.split("x")] for name, v in fields}


def _places(image: int, kernel: int, window: dict[str, list[int]]) -> int:
    """The number of (output, kernel) index pairs along one dimension that fall inside the image."""
    one = [1]
    stride, dilation = window.get("stride", one)[0], window.get("rhs_dilate", one)[0]
    spread = window.get("lhs_dilate", one)[0]
    low, high = window.get("pad", [0, 0])
    wide, reach = (image - 1) * spread + 1, (kernel - 1) * dilation + 1
    outputs = (wide + low + high - reach) // stride + 1
    place = stride * np.arange(outputs)[:, None] - low + dilation * np.arange(kernel)[None, :]
    return int(np.sum((place >= 0) & (place < wide) & (place % spread == 0)))
