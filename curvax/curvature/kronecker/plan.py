"""The sites of a program ↦ what each parameter gets: a Kronecker block, or a diagonal, and why."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from curvax.arithmetic import trees
from curvax.curvature.kronecker.atoms import Axis, atoms_of, axes_of, canonical, covers, size_of
from curvax.curvature.kronecker.sites import Bias
from curvax.curvature.kronecker.uses import Use, use_of
from curvax.curvature.kronecker.walk import Found


class LeafReport(NamedTuple):
    """What one parameter got, and why.

    Attributes:
        treatment: `kronecker`, `bias` (in the block of its kernel), `diagonal`, `estimated
            diagonal` (by random signs) or `none` (not differentiated).
        reason: the product that it takes part in, or why it takes part in none.
        size: its number of entries.
        stack: the sizes of the axes that number layers or groups, each with factors of its own.
        inputs: the size of A.
        outputs: the size of G.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> batch = {"x": jnp.ones((2, 3)), "y": jnp.zeros((2, 1))}
        >>> predict = lambda w, batch: batch["x"] @ w
        >>> objective = curvax.Objective(curvax.gaussian("y"), batch, model=predict)
        >>> (line,) = curvax.kronecker_factors(objective, jnp.ones((3, 1))).report().values()
        >>> line.treatment, line.inputs, line.outputs
        ('kronecker', 3, 1)
    """

    treatment: str
    reason: str
    size: int
    stack: tuple[int, ...] = ()
    inputs: int = 0
    outputs: int = 0


class Block(NamedTuple):
    """A parameter as matrices [layers, outputs, inputs], with its bias as their last column."""

    leaf: int
    shape: tuple[int, ...]
    stack: Axis
    outputs: Axis
    inputs: Axis
    bias: int | None = None
    bias_shape: tuple[int, ...] = ()
    bias_stack: Axis = ()
    bias_outputs: Axis = ()
    diagonal: bool = False
    """Whether A is a diagonal, as for an embedding."""

    @property
    def stacked(self) -> tuple[int, ...]:
        return tuple(atom.size for atom in self.stack)


class Plan(NamedTuple):
    """What every parameter gets."""

    blocks: tuple[Block, ...]
    uses: tuple[tuple[Use, ...], ...]
    """The uses of each block; of a tied parameter, some with inputs and outputs exchanged."""
    repeated: dict[int, tuple[Use, ...]]
    """The uses of parameters whose diagonal is exact."""
    loose: tuple[int, ...]
    """Parameters whose diagonal is estimated."""
    reports: tuple[LeafReport, ...]


def plan_of(found: Found, leaves: Sequence[Any], n: int) -> Plan:
    """Decides for every parameter.

    Args:
        found: the sites of the model.
        leaves: the parameters.
        n: the number of examples.
    """
    uses: dict[int, list[Use]] = {}
    reasons = {leaf: f"it is used by `{how}`" for leaf, how in found.odd.items()}
    for number, site in enumerate(found.sites):
        if site.kind == "factor" or not trees.is_float(leaves[site.leaf]):
            continue
        use = use_of(number, found.sites, found.names, n)
        if isinstance(use, str):
            reasons.setdefault(site.leaf, f"{use} where `{site.eqn.primitive.name}` takes it")
        else:
            uses.setdefault(site.leaf, []).append(use)
    for leaf, own in uses.items():
        if leaf not in reasons and (why := _conflict(own, leaves[leaf].shape)):
            reasons[leaf] = why
    kernels = {leaf: own for leaf, own in uses.items() if leaf not in reasons and _is_product(own)}
    biases = _biases(kernels, uses, reasons, leaves)
    blocks = tuple(_block(own, leaves, biases.get(leaf)) for leaf, own in kernels.items())
    taken = {block.bias for block in blocks}
    repeated = {
        leaf: tuple(own)
        for leaf, own in uses.items()
        if leaf not in reasons and leaf not in kernels and leaf not in taken
    }
    floats = [leaf for leaf, x in enumerate(leaves) if trees.is_float(x)]
    loose = tuple(leaf for leaf in floats if leaf in reasons)
    plan = Plan(blocks, tuple(tuple(kernels[b.leaf]) for b in blocks), repeated, loose, ())
    return plan._replace(reports=_reports(plan, reasons, leaves))


def _is_product(uses: Sequence[Use]) -> bool:
    return uses[0].site.kind != "repeated"


def is_flipped(use: Use, block: Block) -> bool:
    """Whether the inputs of a use are the outputs of the block."""
    return use.inputs != block.inputs


def _conflict(uses: list[Use], shape: tuple[int, ...]) -> str:
    """Why a parameter with these uses has neither factors nor an exact diagonal, or ""."""
    if len({_is_product([use]) for use in uses}) > 1:
        return "it is used both in a product and without one"
    first, whole = uses[0], atoms_of(axes_of(uses[0].site.leaf, shape))
    for use in uses:
        if not covers((*use.stack, *use.inputs, *use.outputs), whole):
            return "it is used in part"
        sides = (use.stack, {use.inputs, use.outputs})
        if sides != (first.stack, {first.inputs, first.outputs}):
            return "its uses divide its axes differently"
    return ""


def _biases(
    kernels: dict[int, list[Use]],
    uses: dict[int, list[Use]],
    reasons: dict[int, str],
    leaves: Sequence[Any],
) -> dict[int, Bias]:
    """Kernel ↦ its bias, if that is added at every use of the kernel and nowhere else."""
    found = {}
    for leaf, own in kernels.items():
        biases = [use.site.bias for use in own]
        first = biases[0]
        looked_up = any(use.site.kind == "lookup" for use in own)
        if first is None or looked_up or any(b is None or b.leaf != first.leaf for b in biases):
            continue
        straight = all(use.inputs == own[0].inputs for use in own)
        alone = len(uses.get(first.leaf, ())) == len(own) and first.leaf not in reasons
        pairs = first.pairs
        outputs = canonical((*own[0].stack, *own[0].outputs))
        digits = atoms_of(axes_of(first.leaf, leaves[first.leaf].shape))
        whole = covers([a for a, _ in pairs], outputs) and covers([b for _, b in pairs], digits)
        if straight and alone and whole:
            found[leaf] = first
    return found


def _block(uses: list[Use], leaves: Sequence[Any], bias: Bias | None) -> Block:
    first = uses[0]
    leaf = first.site.leaf
    diagonal = all(use.site.kind == "lookup" for use in uses)
    block = Block(leaf, leaves[leaf].shape, first.stack, first.outputs, first.inputs)
    block = block._replace(diagonal=diagonal)
    if bias is None:
        return block
    inside = lambda axis: tuple(
        theirs
        for ours, theirs in sorted(bias.pairs, key=lambda pair: (pair[0].axis, -pair[0].stride))
        if any(a.axis == ours.axis and a.stride <= ours.stride < a.stride * a.size for a in axis)
    )
    return block._replace(
        bias=bias.leaf,
        bias_shape=leaves[bias.leaf].shape,
        bias_stack=inside(first.stack),
        bias_outputs=inside(first.outputs),
    )


def _reports(plan: Plan, reasons: dict[int, str], leaves: Sequence[Any]) -> tuple[LeafReport, ...]:
    """A report for every parameter."""
    found: dict[int, LeafReport] = {}
    for block, uses in zip(plan.blocks, plan.uses):
        sides = (block.stacked, size_of(block.inputs), size_of(block.outputs))
        names = sorted({use.site.eqn.primitive.name for use in uses})
        reason = f"multiplies activations by `{'`, `'.join(names)}`"
        reason += f", {len(uses)} times" if len(uses) > 1 else ""
        if any(is_flipped(use, block) for use in uses):
            reason += ", with inputs and outputs exchanged"
        found[block.leaf] = LeafReport("kronecker", reason, leaves[block.leaf].size, *sides)
        if block.bias is not None:
            size = leaves[block.bias].size
            found[block.bias] = LeafReport("bias", "is added to a product", size, *sides)
    for leaf in plan.repeated:
        why = "is repeated over the examples, and multiplies no features"
        found[leaf] = LeafReport("diagonal", why, leaves[leaf].size)
    for leaf in plan.loose:
        found[leaf] = LeafReport("estimated diagonal", reasons[leaf], leaves[leaf].size)
    for leaf, x in enumerate(leaves):
        if leaf not in found:
            unused = "the outputs do not depend on it" if trees.is_float(x) else f"is {x.dtype}"
            found[leaf] = LeafReport("none", unused, x.size)
    return tuple(found[leaf] for leaf in range(len(leaves)))
