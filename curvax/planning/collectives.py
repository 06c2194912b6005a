"""What the devices send each other in one run of a compiled program: kinds, counts and bytes."""

from typing import NamedTuple

from curvax.planning.hlo import Instruction, Measure, Program

KINDS = ("all-reduce", "reduce-scatter", "all-gather", "collective-permute", "all-to-all")


class Collective(NamedTuple):
    """All collectives of one kind."""

    times: int
    bytes: int  # of the whole arrays, before they are scattered or after they were gathered


def count(program: Program) -> dict[str, Collective]:
    """The collectives by kind, as often as the loops around them run.

    An asynchronous collective counts once, and arrays that the compiler sends together are one.
    """
    continued = _continued(program)

    def total(kind: str, amount: Measure) -> int:
        of_kind = lambda each: _kind(each) == kind and each.home not in continued
        return round(program.total(lambda each: amount(each) if of_kind(each) else 0))

    found = {kind: Collective(total(kind, lambda _: 1), total(kind, _bytes)) for kind in KINDS}
    return {kind: collective for kind, collective in found.items() if collective.times}


def _kind(instruction: Instruction) -> str:
    """The kind of a collective; of an asynchronous one, where it starts."""
    opcode = instruction.opcode.removesuffix("-start")
    scatters = opcode == "all-reduce" and instruction.home.startswith("all-reduce-scatter")
    return "reduce-scatter" if scatters else opcode


def _bytes(instruction: Instruction) -> float:
    """The larger of what goes in and what comes out; most starts give back what went in, too."""
    given = sum(operand.bytes for operand in instruction.operands)
    both = instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start"
    return max(given, instruction.bytes - given if both else instruction.bytes)


def _continued(program: Program) -> set[str]:
    """Computations that go on with a collective that another began.

    TPUs fuse the parts of an asynchronous collective with the arithmetic that hides it. All parts
    name the collective, and the one that begins it also calls `AsyncCollectiveStart`.
    """
    chained, begins = set(), set()
    for name, computation in program.computations.items():
        for each in computation:
            if "chain_id=" in each.attributes:
                chained.add(name)
            if '"AsyncCollectiveStart"' in each.attributes:
                begins.add(name)
    return chained - begins
