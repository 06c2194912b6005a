"""A model at a point ↦ its outputs, the activations at its sites, and a pull-back to these.

The pull-back reaches the parameters as well, so that factors and gradient share a forward pass.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.curvature.kronecker.atoms import Atom
from curvax.curvature.kronecker.cotangents import Columns, with_signs
from curvax.curvature.kronecker.plan import Plan, plan_of
from curvax.curvature.kronecker.statistics import site_weights
from curvax.curvature.kronecker.taps import Arrays, Sites, run
from curvax.curvature.kronecker.values import ROWS, Names, Value, parameter
from curvax.curvature.kronecker.walk import Found, walk
from curvax.curvature.linearization import localized
from curvax.devices import axes
from curvax.objective import LossAndGradient, Objective, loss_of_outputs, pieces, scaling


@dataclasses.dataclass(frozen=True)
class Tapped:
    """One forward pass of the model, with everything that the factors need."""

    part: Objective
    params: Tree
    plan: Plan
    outputs: Tree
    """z of the model."""
    aux: Any
    seen: Arrays
    """The activations at the sites."""
    sites: jax.Array | None
    """The weights of the sites of the loss, w / Σw, or None if they are all the same."""
    pull: Callable[[Tree], tuple[Arrays, Arrays]]
    """c ↦ (cotangents at the sites, gradients of the floating parameters by their numbers)."""
    local: frozenset[str]

    def loss_and_gradient(self) -> LossAndGradient:
        """((L, aux), ∇L), if all parameters are floating."""
        scale = self.part.scale

        def scaled(z: Tree) -> tuple[jax.Array, jax.Array]:
            value = loss_of_outputs(self.part, z)
            return scaling.scaled(value, scale), value

        (_, value), cotangent = jax.value_and_grad(scaled, has_aux=True)(self.outputs)
        found = self.pull(cotangent)[1]
        gradient = jax.tree.unflatten(jax.tree.structure(self.params), list(found.values()))
        return (value, self.aux), scaling.unscaled(gradient, scale)

    def total(self, columns: Columns, f: Callable[[Arrays, list[jax.Array]], Tree]) -> Tree:
        """Σ_j f(pull(c_j)), with the cotangents of one column in memory at a time."""

        def at(j: Any) -> Tree:
            cotangent = columns.at(j)
            if self.plan.loose:
                cotangent = with_signs(self.part, j, cotangent)
            return f(*self._pulled(cotangent))

        if columns.count == 1:
            return at(0)
        zeros = lambda x: jnp.zeros(x.shape, x.dtype)
        add = lambda total, j: jax.tree.map(jnp.add, total, at(j))
        start = axes.vary(jax.tree.map(zeros, jax.eval_shape(at, 0)), self.local)
        start = axes.carried(start, lambda total: add(total, 0))
        return jax.lax.scan(lambda t, j: (add(t, j), None), start, jnp.arange(columns.count))[0]

    def _pulled(self, cotangent: Tree) -> tuple[Arrays, list[jax.Array]]:
        """Cotangents at the sites and gradients of the loose parameters, of a cotangent near 1/√n,
        scaled as the loss of a mean is.
        """

        def pull(c: Tree) -> tuple[Arrays, list[jax.Array]]:
            at_sites, of_leaves = self.pull(trees.cast_like(c, self.outputs))
            return at_sites, [of_leaves[leaf] for leaf in self.plan.loose]

        if self.part.scale is None:
            return pull(cotangent)
        root = self.part.size**0.5
        scaled = scaling.at_scale(pull, self.part.scale)
        return trees.scale(root, scaled(trees.scale(1 / root, trees.wide(cotangent))))


class Traced(NamedTuple):
    """The model of an objective as a program, and what its parameters get."""

    program: Any
    """A closed jaxpr of the parameters and the batch."""
    kinds: Tree
    """The shapes and dtypes of the outputs, and of the aux."""
    plan: Plan


def traced(part: Objective, params: Tree) -> Traced:
    """Traces the model and finds its sites; computes nothing."""
    leaves, treedef = jax.tree.flatten(params)

    def forward(leaves: list[jax.Array], batch: Tree) -> tuple[Tree, Any]:
        return pieces.changed(part, batch=batch).outputs(jax.tree.unflatten(treedef, leaves))

    program, kinds = jax.make_jaxpr(forward, return_shape=True)(leaves, part.batch)
    names = Names()
    found = Found(names)
    weights = jax.eval_shape(lambda z: site_weights(part, z), kinds[0])
    sites = (part.size,) if weights is None else weights.shape
    values = [parameter(number, x.shape) for number, x in enumerate(leaves)]
    values += [_entry(x.shape, sites, names) for x in jax.tree.leaves(part.batch)]
    outs = walk(program.jaxpr, values, found)
    found.refuse(outs[: len(jax.tree.leaves(kinds[0]))], "the outputs of the model")
    return Traced(program, kinds, plan_of(found, leaves, part.size))


def tapped(part: Objective, params: Tree) -> Tapped:
    """Traces and evaluates the model of an objective at `params`, on its batch in one piece."""
    params, local = localized(part, params)
    leaves = jax.tree.leaves(params)
    program, kinds, plan = traced(part, params)
    uses = [use for own in (*plan.uses, *plan.repeated.values()) for use in own]
    sites: Sites = {use.number: use.site for use in uses}
    sites |= {use.site.scale: use.factor for use in uses if use.factor is not None}  # type: ignore[misc]
    zeros = lambda use: jnp.zeros(use.shape, use.site.aval.dtype)
    shifts = axes.vary({use.number: zeros(use) for use in uses}, local)

    def shifted(shifts: Arrays, floats: Arrays) -> tuple[Tree, tuple[Arrays, Any]]:
        own = [floats.get(number, x) for number, x in enumerate(leaves)]
        args = jax.tree.leaves((own, part.batch))
        outs, seen = run(program.jaxpr, program.consts, args, sites, shifts)
        outputs, aux = jax.tree.unflatten(jax.tree.structure(kinds), outs)
        return outputs, (seen, aux)

    floats = {number: x for number, x in enumerate(leaves) if trees.is_float(x)}
    outputs, pull, (seen, aux) = jax.vjp(shifted, shifts, floats, has_aux=True)
    weights = site_weights(part, outputs)
    return Tapped(part, params, plan, outputs, aux, seen, weights, pull, local)


def _entry(shape: tuple[int, ...], sites: tuple[int, ...], names: Names) -> Value:
    """An array of the batch, whose first axes are those of the sites as far as they agree."""
    same = next((i for i, (a, b) in enumerate(zip(shape, sites)) if a != b), len(sites))
    known = lambda k, size: (Atom(ROWS, k, 1, size),) if size > 1 else ()
    return Value(tuple(known(k, n) if k < same else names.fresh(n) for k, n in enumerate(shape)))
