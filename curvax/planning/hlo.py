"""The text of a compiled program ↦ its instructions, and sums over them that respect loops.

XLA's own cost analysis counts the body of a loop once. Here it counts as often as the loop runs: by
the trip count that the compiler recorded or else, as for TPUs, from bound, start and step of the
loop counter. A loop that may stop before its bound, as in conjugate gradients, counts up to the
bound. Parsed by hand, since XLA offers no Python interface to the instructions of a program.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_COMMENT = re.compile(r"/\*.*?\*/")
_LAYOUT = re.compile(r"(?<=\])\{[^{}]*\}")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\d\-]*)\((.*)")
_CALLED = re.compile(r"\b(?:calls|to_apply|called_computations|body|condition)=\{?%([^,}\s]+)")
_BRANCHES = re.compile(r"\b(?:true_computation|false_computation)=%([\w.\-]+)")
_BRANCH_LIST = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')

# Opcodes that pass their first operand on unchanged.
_SAME = {"copy", "bitcast", "convert", "copy-start", "copy-done", "reshape"}


class Shape(NamedTuple):
    """The shape of one array."""

    dtype: str  # as XLA spells it: "f32", "bf16", "pred"
    sizes: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def bytes(self) -> float:
        """Without layout padding; 0 for a token."""
        if self.dtype == "pred":
            return self.elements
        bits = re.search(r"\d+", self.dtype)
        return self.elements * int(bits[0]) / 8 if bits else 0


@dataclass(frozen=True, eq=False)
class Instruction:
    """One instruction of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result; a tuple's, flattened
    operands: tuple["Instruction", ...]
    literal: str  # the text in parentheses: a constant's value, a parameter's number
    attributes: str  # the text after the parentheses
    home: str  # the name of its computation

    @property
    def bytes(self) -> float:
        return sum(shape.bytes for shape in self.shapes)

    def attribute(self, name: str) -> str:
        """The value of an attribute up to the next comma or brace; "" if it is absent."""
        found = re.search(rf"\b{name}=\{{?([^,}}]*)", self.attributes)
        return found[1] if found else ""

    def sizes(self, name: str) -> list[int]:
        """An attribute that is a list in braces, as `lhs_contracting_dims={0,1}`."""
        found = re.search(rf"\b{name}=\{{([\d,]*)\}}", self.attributes)
        return [int(n) for n in found[1].split(",") if n] if found else []

    @functools.cached_property
    def called(self) -> list[str]:
        return _CALLED.findall(self.attributes)

    @functools.cached_property
    def branches(self) -> list[str]:
        found = _BRANCH_LIST.search(self.attributes)
        return re.findall(r"%([\w.\-]+)", found[1]) if found else _BRANCHES.findall(self.attributes)


@dataclass
class Computation:
    """Instructions in the order of the text, in which operands come first."""

    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())


InstructionCost = Callable[[Instruction], float]
"""Instruction ↦ a number to sum, without the computations that the instruction calls."""


@dataclass(frozen=True)
class Program:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str

    def total(self, cost: InstructionCost, *, loops: bool = True) -> float:
        """The sum of a cost over all instructions that one run of the program executes.

        A conditional counts its most costly branch, a reduction every application of its function.

        Args:
            cost: of one instruction.
            loops: count the body of a loop as often as it runs; False counts it once, as XLA does.
        """

        @functools.cache
        def of(name: str) -> float:
            return sum(cost(each) + called(each) for each in self.computations[name])

        def called(instruction: Instruction) -> float:
            if instruction.branches:
                return max(map(of, instruction.branches))
            if not instruction.called:
                return 0.0
            if instruction.opcode == "while":
                times = self.trips(instruction) if loops else 1
            else:
                times = _applications(instruction)
            return times * sum(map(of, instruction.called)) if times else 0.0

        return of(self.entry)

    def loops(self) -> list[Instruction]:
        return [each for c in self.computations.values() for each in c if each.opcode == "while"]

    def trips(self, loop: Instruction) -> int:
        """The largest number of iterations of a loop; 1 if it cannot be derived."""
        if known := _KNOWN_TRIPS.search(loop.attributes):
            return int(known[1])
        condition = loop.attribute("condition").lstrip("%")
        bounds = [trips for each in self._compared(condition) if (trips := self._count(loop, each))]
        return min(bounds, default=1)

    def _compared(self, name: str) -> Iterator[tuple[int, Instruction, Instruction]]:
        """The comparisons of a condition: (1 if the loop goes on at equality, lesser, greater)."""
        for each in self.computations[name]:
            if each.opcode == "fusion":
                yield from (
                    (equal, _argument(a, each), _argument(b, each))
                    for equal, a, b in self._compared(each.called[0])
                )
            elif each.opcode == "compare":
                direction = each.attribute("direction")
                lesser, greater = each.operands[:: -1 if direction[0] == "G" else 1]
                if direction[0] in "LG":
                    yield int(direction[1] == "E"), lesser, greater

    def _count(self, loop: Instruction, compared: tuple[int, Instruction, Instruction]) -> int:
        """The iterations until the counter reaches its bound; 0 if no counter is compared."""
        equal, counter, bound = compared
        counter, stop = _source(counter), _constant(bound)
        if counter.opcode != "get-tuple-element" or stop is None:
            return 0
        index = int(counter.attribute("index"))
        body = self.computations[loop.attribute("body").lstrip("%")]
        after, before = body.instructions[body.root], loop.operands[0]
        start = _constant(before.operands[index]) if before.opcode == "tuple" else None
        step = self._step(after.operands[index]) if after.opcode == "tuple" else 1
        return max(0, math.ceil((stop + equal - (start or 0)) / step))

    def _step(self, instruction: Instruction) -> int:
        """The increment of a counter per iteration; 1 if it cannot be derived."""
        source = _source(instruction)
        operands = source.operands
        if source.opcode == "fusion":
            inner = self.computations[source.called[0]]
            root = _source(inner.instructions[inner.root])
            operands = tuple(_argument(each, source) for each in root.operands)
            source = root
        steps = [_constant(each) for each in operands] if source.opcode == "add" else []
        return next((step for step in steps if step), 1)


def read(compiled: Any) -> Program:
    """Parses the result of `lowered.compile()`, for any platform."""
    return parse(compiled.as_text())


def parse(text: str) -> Program:
    """Parses a program's text."""
    computations: dict[str, Computation] = {}
    name = entry = ""
    for line in text.splitlines():
        if (found := _COMPUTATION.match(line)) is not None:
            name = found[2]
            computations[name] = Computation()
            entry = name if found[1] else entry
        elif name and (found := _INSTRUCTION.match(_COMMENT.sub("", line))) is not None:
            _add(computations[name], name, found)
    return Program(computations, entry)


def _add(computation: Computation, home: str, found: re.Match[str]) -> None:
    root, name, shape, opcode, rest = found.groups()
    literal, _, attributes = rest.partition(")")
    operands = re.findall(r"%([\w.\-]+)", literal)
    known = computation.instructions
    known[name] = Instruction(
        name,
        opcode,
        tuple(_shape(*each) for each in _ARRAY.findall(_LAYOUT.sub("", shape))),
        tuple(known[operand] for operand in operands),
        literal,
        attributes,
        home,
    )
    if root:
        computation.root = name


@functools.cache
def _shape(dtype: str, sizes: str) -> Shape:
    return Shape(dtype, tuple(int(n.lstrip("<=")) for n in sizes.split(",") if n))


def _applications(instruction: Instruction) -> int:
    """How often an instruction applies the computation that it calls."""
    if instruction.opcode == "reduce":
        return instruction.operands[0].shapes[0].elements - instruction.shapes[0].elements
    return int(instruction.opcode in ("fusion", "call", "async-start", "custom-call"))


def _source(instruction: Instruction) -> Instruction:
    """The origin of a value, behind copies and reshapes."""
    while instruction.opcode in _SAME:
        instruction = instruction.operands[0]
    return instruction


def _argument(instruction: Instruction, caller: Instruction) -> Instruction:
    """The operand behind a fusion's parameter; any other instruction unchanged."""
    source = _source(instruction)
    return caller.operands[int(source.literal)] if source.opcode == "parameter" else source


def _constant(instruction: Instruction) -> int | None:
    source = _source(instruction)
    found = source.opcode == "constant" and re.fullmatch(r"-?\d+", source.literal)
    return int(found[0]) if found else None
