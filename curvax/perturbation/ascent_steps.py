"""A loss, a point and an ascent rule ↦ the gradient at the end of an ascent in a ball around it."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Mask, Scalar, ScalarOrSchedule, TreePrefix
from curvax.curvature import hvp
from curvax.curvature.differentiability import check_mode
from curvax.devices import axes
from curvax.objective import LossAndGradient, Objective, value_aux_and_grad
from curvax.perturbation.ascent_rules import (
    Ascent,
    AscentLike,
    MetricAscent,
    MomentumAscent,
    check_p,
    dual_direction,
    p_norm,
)


def check_ascent(
    name: str,
    rho: ScalarOrSchedule | TreePrefix,
    p: float,
    steps: int,
    ascent: AscentLike | None,
    *,
    second_order: bool = False,
    mode: str = "auto",
) -> None:
    """Refuses options of an ascent that are out of range, before anything is traced.

    Raises:
        ValueError, TypeError: an option is out of range.
    """
    for radius in jax.tree.leaves(rho):
        checks.check_range("rho", radius, 0, jnp.inf, stage=name)
    checks.check_static(name, p=p)
    check_p(p)
    check_mode(mode)
    checks.check_count(name, steps=steps)
    if isinstance(ascent, MomentumAscent):
        raise TypeError(
            f"`{name}` measures at one point, and `momentum` ascends along gradients of earlier "
            "steps. Pass the rule of the ascent, such as `ascent=dual_norm(2)`, or none."
        )
    if isinstance(ascent, MetricAscent) and (steps > 1 or second_order):
        options = f"steps={steps}, second_order=True" if second_order else f"steps={steps}"
        raise ValueError(
            f"`{name}` takes an ascent in a metric in one step of first order, and got {options}. "
            "Drop these options, or use a p-norm: `ascent=dual_norm(2)`."
        )


class AscentRules:
    """The ascent rule, the norm and the mask of every leaf."""

    def __init__(self, ascent: AscentLike | None, p: float, mask: Mask | None, params: Tree):
        self.metric = ascent if isinstance(ascent, MetricAscent) else None
        ascent = Ascent() if self.metric else ascent
        is_rule = lambda x: isinstance(x, Ascent)
        if callable(ascent):
            spread = trees.map_with_path(lambda path, x: ascent(path), params)
        elif is_rule(ascent):
            spread = jax.tree.map(lambda x: ascent, params)
        else:
            spread = trees.broadcast_prefix(ascent, params)
        self.rules = jax.tree.leaves(spread)
        if not all(map(is_rule, self.rules)):
            raise TypeError(
                "`ascent` takes a rule such as `dual_norm(2)` or `asam(0.01)`, a "
                "tree prefix of such rules, a callable `path -> rule`, or `fisher_ascent()`, and "
                f"got {ascent!r}."
            )
        norms = {rule.p or p for rule in self.rules}
        if len(norms) > 1:
            raise ValueError(
                "`ascent` takes rules with one norm over all perturbed leaves, and these have "
                f"p in {sorted(norms)}. Give them the same p."
            )
        self.p = norms.pop() if norms else p
        mask = mask(params) if callable(mask) else mask
        free = jax.tree.map(lambda x: True, params)
        self.mask = jax.tree.leaves(free if mask is None else trees.broadcast_prefix(mask, params))
        self.paths = [trees.names(path) for path, _ in jax.tree.leaves_with_path(params)]
        random = {id(rule.key): rule.key for rule in self.rules if rule.key is not None}
        self.key_ids, self.keys = list(random), tuple(random.values())

    def direction(self, g: Tree, params: Tree, keys: tuple[jax.Array, ...]) -> Tree:
        """e with ‖e‖_p = 1 over all perturbed leaves; `keys` are those of this step, one for each
        of `self.keys`.
        """
        measure = lambda i, x, w: self._measure(i, x, w, keys)
        return dual_direction(self._each(measure, g, params), self.p)

    def masked(self, tree: Tree) -> Tree:
        """The tree with zeros for the leaves that stay."""
        leaves, treedef = jax.tree.flatten(tree)
        kept = [x if free else jnp.zeros_like(x) for x, free in zip(leaves, self.mask)]
        return jax.tree.unflatten(treedef, kept)

    def into_ball(self, e: Tree) -> Tree:
        """e, scaled back to ‖e‖_p = 1 where its norm is larger."""
        return trees.scale(1 / jnp.maximum(1.0, p_norm(e, self.p)), e)

    def offset(self, e: Tree, params: Tree, radius: Tree) -> Tree:
        """θ + ρ · scale(e, θ), in the dtype of θ.

        Leaves that stay are the same arrays, so that passes share what depends on them alone.
        """
        steps = jax.tree.map(lambda r, x: r * x, radius, self._each(self._scale, e, params))
        moved = jax.tree.leaves(trees.add(params, steps))
        leaves, treedef = jax.tree.flatten(params)
        kept = [x if free else old for x, old, free in zip(moved, leaves, self.mask)]
        return jax.tree.unflatten(treedef, kept)

    def perturbed(self, tree: Tree) -> list[jax.Array]:
        """The leaves that do not stay."""
        return [x for x, free in zip(jax.tree.leaves(tree), self.mask) if free]

    def _each(
        self, f: Callable[[int, jax.Array, jax.Array], jax.Array], tree: Tree, params: Tree
    ) -> Tree:
        leaves, treedef = jax.tree.flatten(tree)
        weights = jax.tree.leaves(params)
        return jax.tree.unflatten(
            treedef, [f(i, x, w) for i, (x, w) in enumerate(zip(leaves, weights))]
        )

    def _measure(
        self, i: int, g: jax.Array, w: jax.Array, keys: tuple[jax.Array, ...]
    ) -> jax.Array:
        g, w, rule, key = trees.widen(g), trees.widen(w), self.rules[i], None
        if not self.mask[i]:
            return jnp.zeros_like(g)
        if rule.key is not None:
            key = jax.random.fold_in(keys[self.key_ids.index(id(rule.key))], i)
        return rule.measure(self.paths[i], g, w, key)

    def _scale(self, i: int, e: jax.Array, w: jax.Array) -> jax.Array:
        return self.rules[i].scale(self.paths[i], e, trees.widen(w))


class BallAscent(NamedTuple):
    """An ascent from θ, in units of the ball: ε = ρ · scale(e, θ)."""

    objective: Objective
    params: Tree
    rules: AscentRules
    keys: tuple[jax.Array, ...]
    radius: Tree
    steps: int
    step_size: Scalar | None
    projected: bool
    sync: tuple[str, ...]
    local: frozenset[str]
    mode: str = "auto"
    shared: bool = False
    """Whether the gradient that the ascent starts with is averaged over `sync`."""

    def gradient(self, g: Tree, second_order: bool) -> tuple[LossAndGradient, Tree]:
        """(((L, aux), ∇L) at θ + ε̂, the update), where the update is the gradient, or the
        derivative of θ ↦ L(θ + ε̂(θ)) if `second_order`.
        """
        if second_order:
            return self._pulled_back(g)
        *_, (loss, g_p) = self.visited(g)
        return (loss, g_p), g_p

    def visited(self, g: Tree) -> Iterator[LossAndGradient]:
        """((L, aux), ∇L) at each point of the ascent that starts with the gradient g."""
        g = g if self.shared else self._mean(g)
        e = (
            self._in_metric(g)
            if self.rules.metric
            else self._first(axes.vary(g, self.local), self.params)
        )
        yield (reached := self._at(e))
        for number in range(1, self.steps):
            e = self._later(number, e, self._synced(reached[1]), self.params)
            yield (reached := self._at(e))

    def _pulled_back(self, g: Tree) -> tuple[LossAndGradient, Tree]:
        """∇ of θ ↦ L(θ + ε̂(θ)), step by step in reverse. Each ascent gradient is ∇L at a point
        that depends on θ, so its cotangent w is pulled back to H w at that point.
        """
        point = self._point
        e, pull_first = jax.vjp(self._first, self._synced(g), self.params)
        trail = []
        for number in range(1, self.steps):
            x, pull_point = jax.vjp(point, e, self.params)
            _, g = value_aux_and_grad(self.objective, x)
            e, pull_later = jax.vjp(partial(self._later, number), e, self._synced(g), self.params)
            trail.append((x, pull_point, pull_later))
        x, pull_point = jax.vjp(point, e, self.params)
        loss, g_p = value_aux_and_grad(self.objective, x)
        w_e, total = pull_point(g_p)
        for x, pull_point, pull_later in reversed(trail):
            w_e, w_g, w_params = pull_later(w_e)
            from_e, from_params = pull_point(self._product(x, w_g))
            w_e = trees.add(w_e, from_e)
            total = trees.add(total, trees.add(w_params, from_params))
        w_g, w_params = pull_first(w_e)
        total = trees.add(total, trees.add(w_params, self._product(self.params, w_g)))
        return (loss, g_p), total

    def _product(self, x: Tree, w: Tree) -> Tree:
        return hvp(self.objective, x, mode=self.mode, precision=None)(self._synced(w))

    def _at(self, e: Tree) -> LossAndGradient:
        return value_aux_and_grad(self.objective, self._point(e, self.params))

    def _point(self, e: Tree, params: Tree) -> Tree:
        return self.rules.offset(e, params, self.radius)

    def _first(self, g: Tree, params: Tree) -> Tree:
        return self.rules.direction(g, params, self.keys)

    def _in_metric(self, g: Tree) -> Tree:
        assert self.rules.metric is not None
        masked = self.rules.masked
        e = self.rules.metric.direction(self.objective, self.params, masked(g), masked, self.sync)
        return axes.vary(e, self.local)

    def _later(self, number: int, e: Tree, g: Tree, params: Tree) -> Tree:
        # A random rule draws a new direction at each step of the ascent.
        keys = tuple(jax.random.fold_in(key, number) for key in self.keys)
        length = jax.tree.map(self._later_length, self.radius)
        step = jax.tree.map(lambda s, d: s * d, length, self.rules.direction(g, params, keys))
        e = trees.add(e, step)
        return self.rules.into_ball(e) if self.projected else e

    def _later_length(self, radius: Scalar) -> Scalar:
        """The length of the steps after the first, as a fraction of the radius of the ball."""
        if self.step_size is None:
            return 1 / self.steps
        return trees.ratio(jnp.asarray(self.step_size), jnp.asarray(radius))

    def _synced(self, tree: Tree) -> Tree:
        return axes.vary(self._mean(tree), self.local)

    def _mean(self, tree: Tree) -> Tree:
        return axes.mean(tree, self.sync, self.objective.batch_weight())
