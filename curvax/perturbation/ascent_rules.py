"""Ascent rules: a gradient and a point ↦ the unit ascent step.

Every rule of the literature has one form: measure the gradient in a metric, take the dual
direction of the whole tree in a p-norm, scale it back:

    ε̂ = ρ · scale(dual_p(measure(g, θ)), θ)

    SAM      measure g        scale 1
    ASAM     measure T ⊙ g    scale T     with T = |θ| (+ η)
"""

import dataclasses
import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Path, Tree, widen
from curvax.arithmetic.typing import Key, ScalarOrSchedule, TreePrefix
from curvax.linalg.probes import as_key
from curvax.objective import Objective

Leaf = jax.Array
LeafMeasure = Callable[[Path, Leaf, Leaf, jax.Array | None], Leaf]
LeafScale = Callable[[Path, Leaf, Leaf], Leaf]


@dataclasses.dataclass(frozen=True)
class Ascent:
    """An ascent rule for `sam_perturb`: leaf by leaf, with one norm over all leaves.

    Attributes:
        measure: `measure(path, gradient, weight, key)`, the measured gradient of a leaf.
        scale: `scale(path, step, weight)`, the step of a leaf.
        p: norm of the ball; None for the p of `sam_perturb`.
        key: typed PRNG key of a random rule.
    """

    measure: LeafMeasure = lambda path, g, w, key: g
    scale: LeafScale = lambda path, e, w: e
    p: float | None = None
    key: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class MetricAscent:
    """An ascent rule for the whole tree, in a metric that depends on the loss.

    Attributes:
        direction: `direction(objective, params, g, masked, sync)`, the unit step for the gradient
            g. `masked` replaces the leaves that stay by zeros; `sync` names the device axes to
            average over.
    """

    direction: Callable[[Objective, Tree, Tree, Callable[[Tree], Tree], tuple[str, ...]], Tree]


AtAPoint = Ascent | MetricAscent | TreePrefix | Callable[[Path], Ascent]
"""One rule for all leaves, a tree prefix of rules, or a function of the path of a leaf."""


@dataclasses.dataclass(frozen=True)
class MomentumAscent:
    """An ascent along an average of the gradients of earlier steps.

    Attributes:
        decay: β of the average, a number in [0, 1) or a schedule.
        rule: the ascent rule that the average goes through in place of the gradient.
    """

    decay: ScalarOrSchedule
    rule: AtAPoint | None = None


AscentLike = AtAPoint | MomentumAscent


def dual_norm(p: float = 2) -> Ascent:
    """Steepest ascent in the p-norm, the rule of SAM.

        ε̂ = ρ sign(g) |g|^(q-1) / (‖g‖_q^q)^(1/p),   1/p + 1/q = 1

    p = ∞ moves every weight by ρ, p = 1 a single weight. Foret et al., SAM, arXiv:2010.01412, eq.
    2.

    Args:
        p: norm of the ball, in [1, ∞].

    Returns:
        An ascent rule for `sam_perturb(ascent=)`.

    Raises:
        ValueError: p < 1.

    Examples:
        >>> import jax, jax.numpy as jnp, curvax
        >>> loss = lambda w: 0.5 * jnp.sum(w**2)
        >>> tx = curvax.sam_perturb(0.1, ascent=curvax.dual_norm(jnp.inf))
        >>> w = jnp.array([3.0, 4.0])
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(x), 3) for x in updates]  # the gradient w + ε̂
        [3.1, 4.1]
    """
    check_p(p)
    return Ascent(p=p)


def asam(eta: float = 0.01) -> Ascent:
    """ASAM's ascent, in units of the weights.

        ε̂ = ρ T² g / ‖T g‖,   T = |w| + η, and T = 1 for biases

    Kwon et al., ASAM, arXiv:2102.11600, as in the authors' code; ρ = 0.5 and η = 0.01 there. Biases
    are leaves named `bias`, and vectors named `b` in a module of Haiku.

    Args:
        eta: η >= 0, in the units of the weights.

    Returns:
        An ascent rule for `sam_perturb(ascent=)`.

    Raises:
        TypeError: η is not a number.
        ValueError: η is negative.

    Examples:
        >>> import jax, jax.numpy as jnp, curvax
        >>> loss = lambda w: 0.5 * jnp.sum(w**2)
        >>> tx = curvax.sam_perturb(0.5, ascent=curvax.asam(eta=0.01))
        >>> w = jnp.array([3.0, 4.0])
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(x), 2) for x in updates]  # the gradient w + ε̂
        [3.74, 5.75]
    """
    if not isinstance(eta, (numbers.Real, jax.Array)):
        raise TypeError(f"`asam` takes a number `eta`, and got {eta!r}. Write `ascent=asam(0.01)`.")
    if isinstance(eta, numbers.Real) and float(eta) < 0:
        raise ValueError(f"`asam` takes `eta` >= 0, and got eta={eta}. The authors' is 0.01.")
    return _adaptive(lambda path, w: jnp.ones_like(w) if _is_bias(path, w) else jnp.abs(w) + eta)


def asam_all() -> Ascent:
    """ASAM's ascent with T = |w| for every leaf, biases included, and without η.

        ε̂ = ρ w² g / ‖|w| g‖

    As in the PyTorch packages davda54/sam and juntang-zhuang/GSAM, with ρ = 2.0 there where `asam`
    takes 0.5.

    Returns:
        An ascent rule for `sam_perturb(ascent=)`.

    Examples:
        >>> import jax, jax.numpy as jnp, curvax
        >>> loss = lambda w: 0.5 * jnp.sum(w**2)
        >>> tx = curvax.sam_perturb(1.0, ascent=curvax.asam_all())
        >>> w = jnp.array([3.0, 4.0])
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(x), 2) for x in updates]  # the gradient w + ε̂
        [4.47, 7.49]
    """
    return _adaptive(lambda path, w: jnp.abs(w))


def weight_scaled() -> Ascent:
    """The ascent of big_vision's adaptive SAM: scaled by the weights, with the norm of the plain
    gradient.

        ε̂ = ρ |w| g / ‖g‖

    Returns:
        An ascent rule for `sam_perturb(ascent=)`.

    Examples:
        >>> import jax, jax.numpy as jnp, curvax
        >>> loss = lambda w: 0.5 * jnp.sum(w**2)
        >>> tx = curvax.sam_perturb(1.0, ascent=curvax.weight_scaled())
        >>> w = jnp.array([3.0, 4.0])
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(x), 3) for x in updates]  # the gradient w + ε̂
        [4.8, 7.2]
    """
    return Ascent(scale=lambda path, e, w: jnp.abs(w) * e)


def random_direction(key: Key = 0) -> Ascent:
    """A random direction of length ρ, independent of the gradient.

        ε̂ = ρ z / ‖z‖₂,   z ~ N(0, I)

    The ablation of Foret et al., SAM, arXiv:2010.01412, appendix C.5.

    Args:
        key: typed PRNG key, or seed. Every step draws a new direction, and so do groups and,
            without `sync_over`, devices.

    Returns:
        An ascent rule for `sam_perturb(ascent=)`.

    Examples:
        >>> import jax, jax.numpy as jnp, curvax
        >>> loss = lambda w: 0.5 * jnp.sum(w**2)
        >>> tx = curvax.sam_perturb(0.1, ascent=curvax.random_direction(key=0))
        >>> w = jnp.array([3.0, 4.0])
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> round(float(jnp.linalg.norm(updates - w)), 3)  # ‖ε̂‖
        0.1
    """
    key = as_key(key)

    def draw(path: Path, g: Leaf, w: Leaf, key: jax.Array | None) -> Leaf:
        assert key is not None, "a rule with a key receives one"
        return jax.random.normal(key, g.shape, g.dtype)

    return Ascent(draw, p=2, key=key)


def momentum(decay: ScalarOrSchedule = 0.0, rule: AtAPoint | None = None) -> MomentumAscent:
    """Ascends along an average of the perturbed gradients of earlier steps: SAM for one gradient.

        ε̂ = ρ m / ‖m‖,   u = ∇L(θ + ε̂),   m ← β m + (1 - β) u

    The gradient at θ is not used, so that the compiler removes it; the first step does not perturb.
    Becker et al., Momentum-SAM, arXiv:2401.12033, where m is the momentum of SGD, of the same
    perturbed gradients; with β = 0 the last one.

    Args:
        decay: β in [0, 1), a number or a schedule.
        rule: ascent rule that m goes through in place of the gradient, such as `asam(0.01)`;
            `dual_norm(p)` by default.

    Returns:
        An ascent for `sam_perturb(ascent=)`.

    Raises:
        ValueError: β is outside [0, 1).
        TypeError: `rule` is a momentum too.

    Examples:
        >>> import jax.numpy as jnp, optax, curvax
        >>> objective = curvax.Objective(lambda w: 0.5 * jnp.sum(w**2))
        >>> tx = curvax.sam_perturb(0.1, ascent=curvax.momentum(0.0)) | optax.sgd(0.5)
        >>> w = jnp.array([3.0, 4.0])
        >>> state = tx.init(w)
        >>> for step in range(2):
        ...     _, grads = objective.value_and_grad(w)
        ...     updates, state = tx.update(grads, state, w, value_fn=objective)
        ...     w = w + updates
        >>> [round(float(x), 3) for x in w]  # (3, 4)/2, and then half of it less ρ/2 along (3, 4)
        [0.72, 0.96]
    """
    checks.check_decay("decay", decay, stage="momentum")
    if isinstance(rule, MomentumAscent):
        raise TypeError("`momentum(rule=)` takes an ascent rule such as `asam(0.01)`, not another.")
    return MomentumAscent(decay, rule)


def _adaptive(magnitude: Callable[[Path, Leaf], Leaf]) -> Ascent:
    return Ascent(
        measure=lambda path, g, w, key: magnitude(path, w) * g,
        scale=lambda path, e, w: magnitude(path, w) * e,
    )


def _is_bias(path: Path, w: Leaf) -> bool:
    """By the name of the leaf, not of a module; an nnx Variable holds its array at `value`."""
    own = path[:-1] if path[-1:] == ("value",) else path
    name = own[-1].split(".")[-1] if own else ""
    return name == "bias" or (name == "b" and len(own) > 1 and jnp.ndim(w) <= 1)


def check_p(p: object) -> None:
    """Refuses a p that is not in [1, ∞].

    Raises:
        ValueError: p is not a number, or is below 1.
    """
    if not isinstance(p, numbers.Real) or not float(p) >= 1:
        raise ValueError(f"A p-norm has p in [1, ∞], and p was {p}. SAM has p = 2.")


def dual_direction(a: Tree, p: float) -> Tree:
    """The e of unit p-norm that maximises <a, e> over the whole tree; 0 for a = 0."""
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
