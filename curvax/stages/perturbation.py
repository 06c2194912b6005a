"""SAM: the gradient taken where the loss is highest nearby.

ε̂(θ) = argmax_{‖ε‖ <= ρ} L(θ + ε),    u ← ∇L(θ + ε̂(θ))
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import axes, checks, trees
from curvax.axes import AxisNames
from curvax.figures import Figures, measured, unmeasured
from curvax.linalg.ascent import Ascent, check_p, dual_direction, dual_norm, p_norm
from curvax.objective import Objective, as_objective
from curvax.oracles import hvp
from curvax.signal import Signal, Stage, at, stage
from curvax.trees import Path, Tree

FIGURES = (
    "loss",
    "perturbed_loss",
    "surrogate_gap",
    "sigma_max",
    "cosine",
    "rho",
    "gradient_norm",
    "perturbed_gradient_norm",
)


class SamState(NamedTuple):
    step: jax.Array
    """t, int32 scalar."""
    keys: tuple[jax.Array, ...]
    """The typed keys of ascents that draw."""
    figures: Figures


def sam_perturb(
    rho: Any,
    *,
    p: float = 2,
    steps: int = 1,
    step_size: Any = None,
    projected: bool = True,
    ascent: Any = None,
    second_order: bool = False,
    every: Any = 1,
    sync_over: AxisNames = None,
    mask: Any = None,
) -> Stage:
    """Replaces the gradient by the gradient at the worst point of a ρ-ball around the parameters.

        ε̂ = ρ sign(g) |g|^(q-1) / (‖g‖_q^q)^(1/p),   u ← ∇L(θ + ε̂),   1/p + 1/q = 1

    The ascent uses the gradient it is given: handed a local one under pmap or shard_map, it
    perturbs per device (m-sharpness); average afterwards with `pmean_updates`. Both passes see the
    same batch and the same dropout key. A zero gradient gives ε̂ = 0. Foret et al., SAM,
    arXiv:2010.01412, eq. 2 and 3.

    Args:
        rho: ρ >= 0 in the units of the norm: a number, a traced one, a schedule; or a tree prefix
            of the parameters or a callable `path -> ρ`, for groups with a ρ of their own under
            one norm over all leaves.
        p: the norm of the ball, in [1, ∞].
        steps: ascent steps. The first has length ρ, later ones `step_size`.
        step_size: the length of later ascent steps, ρ/steps by default.
        projected: pull later steps back, radially, into the ball.
        ascent: a rule of `curvax.linalg.ascent`, such as `asam(0.01)`; or a tree prefix or a
            callable `path -> rule`. By default `dual_norm(p)`.
        second_order: differentiate through ε̂: the exact gradient of θ ↦ L(θ + ε̂(θ)), at the
            price of one Hessian product per ascent step.
        every: perturb every k-th step, from the first on; the clean gradient passes in between.
        sync_over: the device axes to average the ascent gradient over first: one perturbation for
            all of them instead of one per device.
        mask: a tree prefix of booleans, or a callable `params -> tree`: False leaves stay
            unperturbed and do not enter the norm.

    Returns:
        A stage that needs `value_fn`. It sets `updates`, `gradient` (as it was), `value`,
        `perturbed_value`, and the figures `loss`, `perturbed_loss`, `surrogate_gap` h = L(θ + ε̂)
        - L(θ), `sigma_max` 2h/ρ², `cosine` between the two gradients, `rho`, `gradient_norm` and
        `perturbed_gradient_norm`.

    Raises:
        ValueError, TypeError: an option out of range, or traced where it must be static.
    """
    _check_options(rho, p, steps, every)
    ascent = dual_norm(p) if ascent is None else ascent

    def init(params: Tree) -> SamState:
        trees.require_floating(params, "sam_perturb")
        _warn_of_half_precision(params)
        rules = _Rules(ascent, p, mask, params)
        return SamState(jnp.zeros((), jnp.int32), rules.keys, unmeasured(*FIGURES))

    def rule(
        signal: Signal, state: SamState, params: Tree, *, value_fn: Any = None, **extra: Any
    ) -> tuple[Signal, SamState]:
        del extra
        objective = as_objective(value_fn, "sam_perturb")
        local = objective.local_axes(params)
        checks.refuse_summed(signal.updates, local, stage="sam_perturb")
        sync = axes.bound(sync_over, where="`sam_perturb(sync_over=)`")
        gradient = signal.updates
        value = jnp.asarray(jnp.nan if signal.value is None else signal.value, float)
        value = axes.vary(value, local)
        shard, _ = objective.shard_number(local)
        keys = tuple(
            jax.random.fold_in(jax.random.fold_in(k, state.step), shard) for k in state.keys
        )
        radius = _radius(rho, state.step, params)
        climb = _Climb(
            objective, params, _Rules(ascent, p, mask, params).bind(keys), radius, steps,
            at(step_size, state.step), projected, sync,
        )  # fmt: skip

        def perturbed() -> tuple[Tree, jax.Array, Figures]:
            value_p, gradient_p, updates = climb.gradient(gradient, second_order)
            biggest = jnp.max(
                jnp.stack([*map(jnp.asarray, jax.tree.leaves(radius)), jnp.zeros(())])
            )
            figures = _figures(value, value_p, gradient, gradient_p, biggest)
            return trees.cast_like(updates, gradient), value_p.astype(value.dtype), figures

        def clean() -> tuple[Tree, jax.Array, Figures]:
            return gradient, jnp.full_like(value, jnp.nan), state.figures

        if isinstance(every, int) and every == 1:
            now: Any = True
            updates, value_p, figures = perturbed()
        else:
            now = state.step % every == 0
            updates, value_p, figures = axes.cond(now, perturbed, clean)
        signal = signal._replace(
            updates=updates, gradient=gradient, value=value, perturbed_value=value_p,
            perturbed=now, local=local,
        )  # fmt: skip
        return signal, SamState(state.step + 1, state.keys, figures)

    return stage(init, rule)


def _check_options(rho: Any, p: Any, steps: Any, every: Any) -> None:
    checks.check_static("sam_perturb", p=p, steps=steps)
    check_p(p)
    checks.check_range("rho", rho, 0, jnp.inf, stage="sam_perturb")
    checks.check_range("steps", steps, 1, jnp.inf, stage="sam_perturb")
    checks.check_range("every", every, 1, jnp.inf, stage="sam_perturb")


def _warn_of_half_precision(params: Tree) -> None:
    if any(jnp.finfo(x.dtype).bits < 32 for x in jax.tree.leaves(params)):
        warnings.warn(
            "`sam_perturb` on parameters in half precision: a perturbation smaller than their "
            "resolution is lost (ρ = 0.05 over a million weights of size 0.02 moves half of "
            "them). Keep the parameters in float32 and cast them inside the model.",
            stacklevel=2,
        )


def _figures(value: jax.Array, value_p: jax.Array, g: Tree, g_p: Tree, rho: jax.Array) -> Figures:
    gap, norm, norm_p = value_p - value, trees.norm(g), trees.norm(g_p)
    return measured(
        loss=value,
        perturbed_loss=value_p,
        surrogate_gap=gap,
        sigma_max=trees.ratio(2 * gap, rho**2),
        cosine=trees.ratio(trees.dot(g, g_p), norm * norm_p),
        rho=rho,
        gradient_norm=norm,
        perturbed_gradient_norm=norm_p,
    )


def _radius(rho: Any, count: jax.Array, params: Tree) -> Tree:
    """ρ for each leaf. A callable is one of paths if it can be called with one, else a schedule."""
    spread = _by_path(rho, params) if callable(rho) else None
    if spread is None:
        spread = trees.broadcast_prefix(at(rho, count) if callable(rho) else rho, params)
    return jax.tree.map(lambda r: at(r, count), spread)


def _by_path(f: Callable[[Path], Any], params: Tree) -> Tree | None:
    try:
        spread = trees.map_with_path(lambda path, x: f(path), params)
        sound = all(callable(r) or jnp.ndim(r) == 0 for r in jax.tree.leaves(spread))
    except Exception:
        # Whatever a schedule does with a path, it was not made for it.
        return None
    return spread if sound else None


class _Rules:
    """The ascent of each leaf: measure, mask, take the dual direction of the whole, scale back."""

    def __init__(self, ascent: Any, p: float, mask: Any, params: Tree):
        rule_like = lambda x: isinstance(x, Ascent)
        if callable(ascent):
            spread = trees.map_with_path(lambda path, x: ascent(path), params)
        elif rule_like(ascent):
            spread = jax.tree.map(lambda x: ascent, params)
        else:
            spread = trees.broadcast_prefix(ascent, params)
        self.rules = jax.tree.leaves(spread)
        if not all(map(rule_like, self.rules)):
            raise TypeError(
                "`sam_perturb(ascent=)` takes a rule such as `dual_norm(2)` or `asam(0.01)`, a "
                f"tree prefix of such rules, or a callable `path -> rule`, and got {ascent!r}."
            )
        norms = {rule.p or p for rule in self.rules}
        if len(norms) > 1:
            raise ValueError(
                "`sam_perturb` takes one norm over all perturbed leaves, and the ascents of their "
                f"groups name several: p in {sorted(norms)}. Give them the same p."
            )
        self.p = norms.pop() if norms else p
        mask = mask(params) if callable(mask) else mask
        free = jax.tree.map(lambda x: True, params)
        self.mask = jax.tree.leaves(free if mask is None else trees.broadcast_prefix(mask, params))
        self.paths = [trees.names(path) for path, _ in jax.tree.leaves_with_path(params)]
        drawing = {id(rule.key): rule.key for rule in self.rules if rule.key is not None}
        self.key_ids, self.keys = list(drawing), tuple(drawing.values())
        self.drawn: tuple[jax.Array, ...] = ()

    def bind(self, keys: tuple[jax.Array, ...]) -> "_Rules":
        """The keys of this step."""
        self.drawn = keys
        return self

    def direction(self, g: Tree, params: Tree) -> Tree:
        """e with ‖e‖_p = 1 over all perturbed leaves."""
        return dual_direction(self._each(self._measure, g, params), self.p)

    def into_ball(self, e: Tree) -> Tree:
        """e, pulled back radially where ‖e‖_p > 1."""
        return trees.scale(1 / jnp.maximum(1.0, p_norm(e, self.p)), e)

    def offset(self, e: Tree, params: Tree, radius: Tree) -> Tree:
        """θ + ρ · scale(e, θ), in the dtype of θ."""
        steps = jax.tree.map(lambda r, x: r * x, radius, self._each(self._scale, e, params))
        return trees.add(params, steps)

    def _each(self, f: Any, tree: Tree, params: Tree) -> Tree:
        leaves, treedef = jax.tree.flatten(tree)
        weights = jax.tree.leaves(params)
        return jax.tree.unflatten(
            treedef, [f(i, x, w) for i, (x, w) in enumerate(zip(leaves, weights))]
        )

    def _measure(self, i: int, g: jax.Array, w: jax.Array) -> jax.Array:
        g, w, rule, key = trees.widen(g), trees.widen(w), self.rules[i], None
        if not self.mask[i]:
            return jnp.zeros_like(g)
        if rule.key is not None:
            key = jax.random.fold_in(self.drawn[self.key_ids.index(id(rule.key))], i)
        return rule.measure(self.paths[i], g, w, key)

    def _scale(self, i: int, e: jax.Array, w: jax.Array) -> jax.Array:
        return self.rules[i].scale(self.paths[i], e, trees.widen(w))


class _Climb(NamedTuple):
    """The ascent from θ, in units of the ball: ε = ρ · scale(e, θ)."""

    objective: Objective
    params: Tree
    rules: _Rules
    radius: Tree
    steps: int
    step_size: Any
    projected: bool
    sync: tuple[str, ...]

    def gradient(self, g: Tree, second_order: bool) -> tuple[jax.Array, Tree, Tree]:
        """(L(θ + ε̂), ∇L(θ + ε̂), the update), where the update is the gradient or its pull-back."""
        if second_order:
            return self._pulled_back(g)
        e = self._first(self._synced(g), self.params)
        for _ in range(self.steps - 1):
            _, g = self._at(e)
            e = self._later(e, self._synced(g), self.params)
        value, g_p = self._at(e)
        return value, g_p, g_p

    def _pulled_back(self, g: Tree) -> tuple[jax.Array, Tree, Tree]:
        """∇ of θ ↦ L(θ + ε̂(θ)), step by step in reverse: each ascent gradient is ∇L at a point
        that moves with θ, so its cotangent w comes back as H w there."""
        point = self._point
        e, pull_first = jax.vjp(self._first, self._synced(g), self.params)
        trail = []
        for _ in range(self.steps - 1):
            x, pull_point = jax.vjp(point, e, self.params)
            _, g = self.objective.value_aux_and_grad(x)
            e, pull_later = jax.vjp(self._later, e, self._synced(g), self.params)
            trail.append((x, pull_point, pull_later))
        x, pull_point = jax.vjp(point, e, self.params)
        (value, _), g_p = self.objective.value_aux_and_grad(x)
        w_e, total = pull_point(g_p)
        for x, pull_point, pull_later in reversed(trail):
            w_e, w_g, w_params = pull_later(w_e)
            from_e, from_params = pull_point(self._product(x, w_g))
            w_e = trees.add(w_e, from_e)
            total = trees.add(total, trees.add(w_params, from_params))
        w_g, w_params = pull_first(w_e)
        total = trees.add(total, trees.add(w_params, self._product(self.params, w_g)))
        return value, g_p, total

    def _product(self, x: Tree, w: Tree) -> Tree:
        return hvp(self.objective, x, precision=None)(self._synced(w))

    def _at(self, e: Tree) -> tuple[jax.Array, Tree]:
        (value, _), g = self.objective.value_aux_and_grad(self._point(e, self.params))
        return value, g

    def _point(self, e: Tree, params: Tree) -> Tree:
        return self.rules.offset(e, params, self.radius)

    def _first(self, g: Tree, params: Tree) -> Tree:
        return self.rules.direction(g, params)

    def _later(self, e: Tree, g: Tree, params: Tree) -> Tree:
        length = jax.tree.map(self._later_length, self.radius)
        step = jax.tree.map(lambda s, d: s * d, length, self.rules.direction(g, params))
        e = trees.add(e, step)
        return self.rules.into_ball(e) if self.projected else e

    def _later_length(self, radius: Any) -> Any:
        """The length of later steps as a share of the ball's radius."""
        if self.step_size is None:
            return 1 / self.steps
        return trees.ratio(jnp.asarray(self.step_size), jnp.asarray(radius))

    def _synced(self, tree: Tree) -> Tree:
        return axes.mean(tree, self.sync, self.objective.batch_weight())
