"""The collectives that one run of a compiled program executes: kinds, counts and bytes."""

from typing import NamedTuple

from curvax.planning.hlo import Instruction, InstructionCost, Program

KINDS = ("all-reduce", "reduce-scatter", "all-gather", "collective-permute", "all-to-all")


class Collective(NamedTuple):
    """The total over all collectives of one kind."""

    times: int
    bytes: int  # of the whole arrays: before a scatter, after a gather


def count(program: Program) -> dict[str, Collective]:
    """The collectives by kind; those in loops count as often as the loop runs.

    An asynchronous collective counts once, and so do arrays that the compiler combines.
    """
    continued = _continued(program)

    def total(kind: str, amount: InstructionCost) -> int:
        of_kind = lambda each: _kind(each) == kind and each.home not in continued
        return round(program.total(lambda each: amount(each) if of_kind(each) else 0))

    found = {kind: Collective(total(kind, lambda _: 1), total(kind, _bytes)) for kind in KINDS}
    return {kind: collective for kind, collective in found.items() if collective.times}


def _kind(instruction: Instruction) -> str:
    """The kind of a collective; an asynchronous one has its kind in its `-start` instruction."""
    opcode = instruction.opcode.removesuffix("-start")
    scatters = opcode == "all-reduce" and instruction.home.startswith("all-reduce-scatter")
    return "reduce-scatter" if scatters else opcode


def _bytes(instruction: Instruction) -> float:
    """The larger of operand and result; `-start` results mostly hold both, and are corrected."""
    given = sum(operand.bytes for operand in instruction.operands)
    both = instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start"
    return max(given, instruction.bytes - given if both else instruction.bytes)


def _continued(program: Program) -> set[str]:
    """Computations that continue a collective which another computation started.

    On TPUs the parts of an asynchronous collective are fused with the arithmetic that hides it. All
    parts name the collective; only the first also calls `AsyncCollectiveStart`.
    """
    chained, begins = set(), set()
    for name, computation in program.computations.items():
        for each in computation:
            if "chain_id=" in each.attributes:
                chained.add(name)
            if '"AsyncCollectiveStart"' in each.attributes:
                begins.add(name)
    return chained - begins
