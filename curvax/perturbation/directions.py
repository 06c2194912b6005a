"""A gradient and a point ↦ the unit step that climbs.

Every rule of the literature is one shape: measure the gradient in a metric, take the dual
direction of the whole tree in a p-norm, scale it back:

    ε̂ = ρ · scale(dual_p(measure(g, θ)), θ)

    SAM      measure g        scale 1
    ASAM     measure T ⊙ g    scale T     with T = |θ| (+ η)
"""

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Path, Tree, widen
from curvax.linalg.probes import as_key

Leaf = jax.Array
Measure = Callable[[Path, Leaf, Leaf, jax.Array | None], Leaf]
Scale = Callable[[Path, Leaf, Leaf], Leaf]


@dataclasses.dataclass(frozen=True)
class Ascent:
    """The direction in which `sam_perturb` climbs, leaf by leaf but for one norm over all.

    `measure(path, gradient, weight, key)` and `scale(path, step, weight)` act on one leaf; `p` is
    the norm of the ball, None to leave it to `sam_perturb(p=)`; `key` is there where it draws.
    """

    measure: Measure = lambda path, g, w, key: g
    scale: Scale = lambda path, e, w: e
    p: float | None = None
    key: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class MetricAscent:
    """Steepest ascent of the whole tree in a metric that the loss itself gives.

    `direction(objective, params, g, masked, sync)` is the unit step for the gradient g; `masked`
    puts zeros where nothing may move, `sync` names the device axes to average over.
    """

    direction: Callable[[Any, Tree, Tree, Callable[[Tree], Tree], tuple[str, ...]], Tree]


def dual_norm(p: float = 2) -> Ascent:
    """Steepest ascent in the p-norm.

        ε̂ = ρ sign(g) |g|^(q-1) / (‖g‖_q^q)^(1/p),   1/p + 1/q = 1

    p = ∞ moves every weight by ρ, p = 1 a single one. Foret et al., SAM, arXiv:2010.01412, eq. 2.

    Raises:
        ValueError: p < 1.
    """
    check_p(p)
    return Ascent(p=p)


def asam(eta: float = 0.01) -> Ascent:
    """ASAM as its authors' code has it: T = |w| + η, and 1 for biases, by their names.

        ε̂ = ρ T² g / ‖T g‖

    Biases are leaves named `bias`, and vectors named `b` in a module of Haiku. Kwon et al., ASAM,
    arXiv:2102.11600; ρ = 0.5 and η = 0.01 there.

    Args:
        eta: η >= 0, in the units of the weights.

    Raises:
        TypeError, ValueError: η is no number, or negative.
    """
    if not isinstance(eta, (numbers.Real, jax.Array)):
        raise TypeError(f"`asam` takes η as a number, and got {eta!r}. Write `ascent=asam(0.01)`.")
    if isinstance(eta, numbers.Real) and float(eta) < 0:
        raise ValueError(f"`asam` adds η >= 0 to the magnitude of the weights, and got eta={eta}.")
    return _adaptive(lambda path, w: jnp.ones_like(w) if _is_bias(path, w) else jnp.abs(w) + eta)


def asam_all() -> Ascent:
    """ASAM with T = |w| for every leaf, biases included, and no η.

        ε̂ = ρ w² g / ‖|w| g‖

    The variant of the PyTorch packages davda54/sam and juntang-zhuang/GSAM; its best ρ is 2.0 on
    the task where `asam`'s is 0.5.
    """
    return _adaptive(lambda path, w: jnp.abs(w))


def weight_scaled() -> Ascent:
    """big_vision's adaptive step: scaled by the weights, measured without them.

    ε̂ = ρ |w| g / ‖g‖
    """
    return Ascent(scale=lambda path, e, w: jnp.abs(w) * e)


def random_direction(key: jax.Array | int = 0) -> Ascent:
    """A random direction of length ρ, whatever the gradient: ε̂ = ρ z / ‖z‖₂, z ~ N(0, I).

    The ablation of Foret et al., SAM, arXiv:2010.01412, appendix C.5.

    Args:
        key: a typed key or a seed; each step draws its own direction, and so does each
            group and, but for `sync_over`, each device.
    """
    key = as_key(key)

    def draw(path: Path, g: Leaf, w: Leaf, key: jax.Array | None) -> Leaf:
        assert key is not None, "an ascent with a key is handed one"
        return jax.random.normal(key, g.shape, g.dtype)

    return Ascent(draw, p=2, key=key)


def _adaptive(magnitude: Callable[[Path, Leaf], Leaf]) -> Ascent:
    return Ascent(
        measure=lambda path, g, w, key: magnitude(path, w) * g,
        scale=lambda path, e, w: magnitude(path, w) * e,
    )


def _is_bias(path: Path, w: Leaf) -> bool:
    """By the leaf's own name, not that of a module; an nnx Variable holds its array at `value`."""
    own = path[:-1] if path[-1:] == ("value",) else path
    name = own[-1].split(".")[-1] if own else ""
    return name == "bias" or (name == "b" and len(own) > 1 and jnp.ndim(w) <= 1)


def check_p(p: Any) -> None:
    """Refuses what is no norm.

    Raises:
        ValueError: p is no number or below 1.
    """
    if not isinstance(p, numbers.Real) or not float(p) >= 1:
        raise ValueError(f"A p-norm has p in [1, ∞], and p was {p}. SAM's own is 2.")


def dual_direction(a: Tree, p: float) -> Tree:
    """The e of unit p-norm with the largest <a, e>, over the whole tree; 0 for a = 0."""
    a = jax.tree.map(widen, a)
    if p == 2:
        return trees.unit(a)
    if p == 1:
        return _largest_entry(a)
    if p == jnp.inf:
        return jax.tree.map(jnp.sign, a)
    q = p / (p - 1)
    # Homogeneous of degree zero: dividing by the largest entry first keeps powers in range.
    a = trees.divided(a, _largest(a))
    e = jax.tree.map(lambda x: jnp.sign(x) * _power(x, q - 1), a)
    mass = trees.total(jax.tree.map(lambda x: _power(x, q), a))
    return trees.divided(e, _power(mass, 1 / p))


def p_norm(tree: Tree, p: float) -> jax.Array:
    """‖·‖_p over the whole tree."""
    if p == 2:
        return trees.norm(tree)
    if p == jnp.inf:
        return _largest(tree)
    peak = _largest(tree)
    within = trees.divided(trees.wide(tree), peak)
    return peak * _power(trees.total(jax.tree.map(lambda x: _power(x, p), within)), 1 / p)


def _power(x: jax.Array, exponent: float) -> jax.Array:
    """|x|^exponent with derivative 0 at 0."""
    return jnp.where(x == 0, 0.0, jnp.abs(jnp.where(x == 0, 1.0, x)) ** exponent)


def _largest(tree: Tree) -> jax.Array:
    peaks = [jnp.max(jnp.abs(widen(x)), initial=0.0) for x in jax.tree.leaves(tree)]
    return jnp.max(jnp.stack(peaks)) if peaks else jnp.zeros(())


def _largest_entry(tree: Tree) -> Tree:
    leaves, treedef = jax.tree.flatten(tree)
    if not leaves:
        return tree
    winner = jnp.argmax(jnp.stack([jnp.max(jnp.abs(x), initial=0.0) for x in leaves]))

    def alone(i: int, x: jax.Array) -> jax.Array:
        if not x.size:
            return x
        flat = x.ravel()
        here = (jnp.arange(flat.size) == jnp.argmax(jnp.abs(flat))) & (winner == i)
        return jnp.where(here, jnp.sign(flat), 0.0).reshape(x.shape)

    return jax.tree.unflatten(treedef, [alone(i, x) for i, x in enumerate(leaves)])
