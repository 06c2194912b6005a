"""The aux of a loss over a batch that is evaluated in pieces.

Averaging the aux of the pieces would be wrong for sums, maxima and per-example values. Instead the
loss is traced to find where it reduces the examples. The reduced values are added, compared or
concatenated over the pieces, and the rest of the program (a quotient, a square root) is evaluated
once, with the sizes of the whole batch. The examples are not visited again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from curvax import compat
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.objective import aux_programs
from curvax.objective.aux_programs import Info, Root, Unalike
from curvax.objective.microbatching import KINDS, Parts

Reductions = str | Tree | Callable[[trees.Path], str | None] | None

MISSING: Any = object()
"""Stands for a value of the whole batch that depends on its examples, which are not at hand."""


@jax.tree_util.register_static
class Undecided:
    """Stands for an aux whose value on the whole batch does not follow from those of the pieces."""

    def __init__(self, message: str):
        self.message = message

    def __hash__(self) -> int:
        return hash(self.message)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Undecided) and self.message == other.message


class Pass(NamedTuple):
    """A call of a loss or a model that has an aux."""

    f: Callable[..., tuple[Tree, Tree]]
    """`f(params, batch, *keys) -> (value, aux)`"""
    params: Tree
    piece: tuple[Any, ...]
    """(batch, *keys) of the piece."""
    whole: tuple[Any, ...]
    """(batch, *keys) of the whole batch."""


def check_reductions(reductions: Reductions) -> None:
    """Checks the names in `reduce_aux`.

    Raises:
        ValueError: one of them is not in `KINDS`.
    """
    for name in () if callable(reductions) else jax.tree.leaves(reductions):
        if name not in KINDS:
            raise ValueError(
                f"`Objective(reduce_aux=)` takes {', '.join(map(repr, KINDS))}, for all of the aux "
                f"or for each of its branches, or a callable of the path, and received {name!r}."
            )


def in_pieces(of: Pass, reductions: Reductions) -> tuple[Tree, Parts | Undecided]:
    """Evaluates a piece of a batch.

    Returns:
        (value, `Parts` from which the whole batch's aux is computed once they are reduced over all
        pieces; or `Undecided`)
    """
    traced, shapes = jax.make_jaxpr(of.f, return_shape=True)(of.params, *of.piece)
    leaves, aux_tree = jax.tree.flatten(shapes[1])
    names, paths = _named(reductions, shapes[1])
    first = len(jax.tree.leaves(shapes[0]))
    program, infos = None, [Info()] * len(leaves)
    if not all(names):
        program, infos = _read(of, traced, first, len(leaves))
    kinds = [_kind(name, info, leaf) for name, info, leaf in zip(names, infos, leaves)]
    doubtful = [
        f"`{path}` ({info.bad or 'a spread around the mean of a piece'})"
        for path, kind, info in zip(paths, kinds, infos)
        if kind == "undecided"
    ]
    if doubtful:
        return of.f(of.params, *of.piece)[0], Undecided(_message(doubtful))
    roots = sorted(frozenset().union(*(i.roots for i, kind in zip(infos, kinds) if not kind)))
    outs, values = _run(traced, of, roots)
    own = [out for out, kind in zip(outs[first:], kinds) if kind]
    held = [f"{root[0]}" if root[0] != "input" else "last" for root in roots]
    finish = lambda values: _finish(program, of, kinds, roots, values, first, aux_tree)
    value = jax.tree.unflatten(jax.tree.structure(shapes[0]), outs[:first])
    return value, Parts(values + own, (*held, *filter(None, kinds)), finish)


def _named(reductions: Reductions, aux: Tree) -> tuple[list[str | None], list[str]]:
    """The reduction named for each leaf of the aux, or None, and the paths of the leaves."""
    paths = [trees.names(path) for path, _ in jax.tree.leaves_with_path(aux)]
    labels = [trees.label(path) for path in paths]
    if callable(reductions):
        return [reductions(path) for path in paths], labels
    if reductions is None or isinstance(reductions, str):
        return [reductions] * len(paths), labels
    spread = jax.tree.map(
        lambda name, branch: jax.tree.map(lambda _: name, branch),
        reductions, aux, is_leaf=lambda x: x is None,
    )  # fmt: skip
    return jax.tree.leaves(spread, is_leaf=lambda x: x is None), labels


def _read(of: Pass, traced: Any, first: int, count: int) -> tuple[Any, list[Info]]:
    """(the program on the whole batch, what is known of each leaf of the aux)"""
    try:
        whole = jax.make_jaxpr(of.f)(of.params, *of.whole)
        return whole, aux_programs.read(traced, whole, _inputs(of, traced))[first:]
    except Unalike:
        bad = "the loss is another program on the whole batch"
    except Exception as error:
        bad = f"the loss cannot be traced on the whole batch: {type(error).__name__}"
    return None, [Info(bad=bad, dep=True)] * count


def _inputs(of: Pass, traced: Any) -> list[Info]:
    """What is known of the inputs: constants, parameters, examples and keys."""
    held = len(traced.consts) + len(jax.tree.leaves(of.params))
    fixed = [Info(param=True, roots=frozenset({("input", i, 0, 0)})) for i in range(held)]
    batch, *keys = of.piece
    return [*fixed, *[Info(0, True)] * len(jax.tree.leaves(batch)), *[Info()] * len(keys)]


def _kind(name: str | None, info: Info, leaf: Any) -> str | None:
    """The reduction of the leaf itself; None if the program computes it from reduced values."""
    if name or not info.dep:
        return name
    if info.axis is not None:
        return "undecided" if info.bad or info.centred else f"concat {info.axis}"
    if info.running and trees.is_float(leaf) and (info.bad or info.centred or not info.linear):
        return "mean"
    return "undecided" if info.bad or info.centred else None


def _message(doubtful: list[str]) -> str:
    return (
        "`Objective(microbatch=)` evaluates the loss in pieces, and the whole batch's value of the "
        f"aux {', '.join(doubtful)} does not follow from theirs. Name the reduction, "
        f"`Objective(..., reduce_aux=...)`, one of {', '.join(map(repr, KINDS))} for all of the "
        "aux or a tree of such names (None where it follows from the loss), or return sums and "
        "divide them outside of the loss."
    )


def _run(traced: Any, of: Pass, roots: list[Root]) -> tuple[list[Any], list[Any]]:
    """(the outputs, the values of the roots) of a piece, from one evaluation."""
    inputs = [*traced.consts, *jax.tree.leaves((of.params, *of.piece))]
    kept: dict[Any, Any] = {(r[1], r[3]): None for r in roots if r[0] != "input"}

    def run(number: int, eqn: Any, values: list[Any]) -> list[Any]:
        outs = compat.bind(eqn, values)
        kept.update({(number, k): x for k, x in enumerate(outs) if (number, k) in kept})
        return outs

    outs = aux_programs.evaluated(traced, inputs, run)
    return outs, [inputs[r[1]] if r[0] == "input" else kept[r[1], r[3]] for r in roots]


def _finish(
    program: Any,
    of: Pass,
    kinds: list[str | None],
    roots: list[Root],
    values: list[Any],
    first: int,
    aux_tree: Any,
) -> Tree:
    """The whole batch's aux, from the values reduced over its pieces."""
    reduced, own = values[: len(roots)], iter(values[len(roots) :])
    outs: list[Any] = [None] * len(kinds)
    if program is not None:
        outs = _evaluated(program, of, roots, reduced)[first:]
    leaves = [next(own) if kind else out for kind, out in zip(kinds, outs)]
    assert not any(leaf is MISSING for leaf in leaves)
    return jax.tree.unflatten(aux_tree, leaves)


def _evaluated(program: Any, of: Pass, roots: list[Root], reduced: list[Any]) -> list[Any]:
    found: dict[Any, Any] = {
        r if r[0] == "input" else r[2:]: x for r, x in zip(roots, reduced)
    }  # fmt: skip
    held = len(program.consts) + len(jax.tree.leaves(of.params))
    batch, *keys = of.whole
    inputs = [found.get(("input", i, 0, 0), MISSING) for i in range(held)]
    inputs += [MISSING] * len(jax.tree.leaves(batch)) + keys

    def run(number: int, eqn: Any, values: list[Any]) -> list[Any]:
        places = [(number, k) for k in range(len(eqn.outvars))]
        if any(place in found for place in places):
            return [found.get(place, MISSING) for place in places]
        if any(value is MISSING for value in values):
            return [MISSING] * len(places)
        return compat.bind(eqn, values)

    return aux_programs.evaluated(program, inputs, run)
