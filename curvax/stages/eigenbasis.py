"""Eigenvalues of Kronecker factors, estimated as a diagonal in the factors' eigenbasis."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Period, ValueFn
from curvax.curvature.kronecker.cells import Eigen
from curvax.curvature.kronecker.corrected import CorrectedFactors
from curvax.devices import axes
from curvax.devices.axes import AxisNames
from curvax.hyperparameters import injectable
from curvax.linalg import decompositions
from curvax.linalg.kronecker import known_factors, needed_factors, shared_axes
from curvax.linear_operator import as_product
from curvax.objective import Objective, as_objective
from curvax.pipes import estimates, requirements
from curvax.pipes.initial import telling
from curvax.pipes.signal import Signal, Stage, containing

STYLES = ("exact", "iteration")

Bases = tuple[tuple[tuple[jax.Array, jax.Array | None], ...], ...]
"""(Q_G, Q_A) of each block, and of its bias if that is apart."""


class EigenbasisState(NamedTuple):
    step: jax.Array
    """Steps with factors that were not 0, int32 scalar."""
    bases: Bases
    """The eigenvectors in use; () if they are taken anew in each step."""
    inner: optax.OptState
    """The state of the stages inside."""


class Eigenbasis(NamedTuple):
    """What stages inside receive as `eigenbasis=`: the problem in its own coordinates."""

    factors: CorrectedFactors
    objective: Objective | None
    params: Tree


@injectable
def in_eigenbasis(
    stages: optax.GradientTransformation,
    *,
    every: Period = 1,
    style: str = "exact",
    divided_over: AxisNames = None,
) -> Stage:
    """Replaces the eigenvalues of Kronecker factors by a diagonal estimated in their eigenbasis.

        C = Q diag(D) Qᵀ,   Q = Q_G ⊗ Q_A

    The stages inside see everything in the basis: updates Qᵀu, parameters Qᵀθ, the loss as a
    function of them. `squared_gradient() | ema_mean(b2)` inside is SOAP, Adam in the eigenbasis of
    Shampoo (Vyas et al., arXiv:2409.11321, Algorithm 3), `fisher_eigenvalues()` is E-KFAC (George
    et al., arXiv:1806.03884), and `hutchinson_diag()` is the diagonal of the Hessian there. What
    stages inside keep stays in its place when the basis changes, as in SOAP.

    Args:
        stages: stages that set and smooth a diagonal, and leave the updates unchanged.
        every: number of steps per change of the basis, a positive int, or a traced one, from the
            first step on in which the factors are not 0; before it the basis is the identity. Above
            1, or by iteration, the stage that makes the factors needs `like=`, except
            `gradient_kronecker`.
        style: `exact` decomposes the factors; `iteration` does so in the first step, and takes a
            product and a QR decomposition of each later, as SOAP does.
        divided_over: device axis, or tuple of axes, among whose devices the decompositions are
            divided, as in `kronecker`.

    Returns:
        A stage that needs `factors` and replaces them. Behind it `scale_by_power`, `damp` and
        `solve(kronecker())` cost products with the eigenvectors and no decomposition.

    Raises:
        ValueError: an option is out of range, or a part changes the updates; in `update`, no
            earlier stage set factors, or the stages inside set no diagonal.

    Examples:
        >>> import jax.numpy as jnp, optax, curvax
        >>> second_moment = curvax.squared_gradient() | curvax.ema_mean(0.95)
        >>> basis = curvax.gradient_kronecker() | curvax.ema_mean(0.95)
        >>> soap = basis | curvax.in_eigenbasis(second_moment) | curvax.scale_by_power(0.5)
        >>> g = {"kernel": jnp.array([[3.0, 0.0], [0.0, -4.0]])}
        >>> updates, state = soap.update(g, soap.init(g), g)
        >>> updates["kernel"].round(3).tolist()  # the polar factor of one gradient
        [[1.0, 0.0], [0.0, -1.0]]
    """
    if not isinstance(every, jax.Array):
        checks.check_count("in_eigenbasis", every=every)
    if style not in STYLES:
        raise ValueError(f"`in_eigenbasis(style=)` is one of {STYLES}, and is {style!r}.")
    inner = estimates.estimating(stages, "in_eigenbasis(...)")
    keeps = isinstance(every, jax.Array) or every > 1 or style == "iteration"

    def init(params: Tree, factors: Any = None) -> EigenbasisState:
        step, below = jnp.zeros((), jnp.int32), inner.init(params)
        if not keeps:
            return EigenbasisState(step, (), below)
        instead = "decompose in each step: `every=1` and `style='exact'`"
        known = known_factors(factors, "in_eigenbasis(...)", instead)
        shapes = _bases(jax.eval_shape(known.eigen))
        eye = lambda x: jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape)
        return EigenbasisState(step, jax.tree.map(eye, shapes), below)

    def behind(params: Tree, factors: Any) -> Any:
        del params
        if factors is None:
            return None
        return jax.tree.map(jnp.zeros_like, jax.eval_shape(factors.eigen))

    def rule(
        signal: Signal,
        state: EigenbasisState,
        params: Tree,
        *,
        value_fn: ValueFn | None = None,
        **extra: Any,
    ) -> tuple[Signal, EigenbasisState]:
        example = "gradient_kronecker() | ema_mean(0.95) | in_eigenbasis(...)"
        factors = needed_factors(signal.factors, "in_eigenbasis", example)
        objective = None if value_fn is None else as_objective(value_fn, "in_eigenbasis", params)
        over, known = shared_axes(factors, divided_over, "in_eigenbasis"), ~factors.is_zero()
        with jax.default_matmul_precision("highest"):
            with decompositions.divided(over):
                due = (state.step % every == 0) & known
                bases = _refreshed(factors, state, due, style) if keeps else ()
                basis = _basis(factors, bases) if keeps else factors.eigen()
            within = Eigenbasis(basis, objective, params)
            diagonal, below = _estimated(inner, signal, state.inner, within, extra)
        signal = signal._replace(factors=basis.with_diagonal(diagonal))
        return signal, EigenbasisState(state.step + known, bases, below)

    return containing(telling(init, factors=behind), rule, inner)


def _estimated(
    inner: Stage, signal: Signal, state: optax.OptState, within: Eigenbasis, extra: dict[str, Any]
) -> tuple[Tree, optax.OptState]:
    """(the diagonal that the stages inside estimate, their new state)"""
    basis, objective, params = within
    found, state = estimates.estimated(
        inner, _turned(signal, basis), state, basis.into(trees.wide_floats(params)),
        "in_eigenbasis(...)",
        value_fn=None if objective is None else objective.through(basis.out_of),
        eigenbasis=within, **extra,
    )  # fmt: skip
    needs = "takes a diagonal from the stages inside"
    return requirements.needed_diagonal(found.diagonal, "in_eigenbasis", needs), state


def _turned(signal: Signal, basis: CorrectedFactors) -> Signal:
    """The signal in the eigenbasis, without a diagonal."""
    updates = basis.into(trees.wide_floats(signal.updates))
    same = trees.same_leaves(signal.gradient, signal.updates)
    gradient = updates if same else basis.into(trees.wide_floats(signal.gradient))
    matvec = signal.matvec
    if matvec is not None:
        matvec = as_product(matvec).within(basis.out_of, basis.into)
    return signal._replace(
        updates=updates, gradient=gradient, matvec=matvec, diagonal=None, factors=None
    )


def _bases(factors: CorrectedFactors) -> Bases:
    return tuple(tuple((eigen.left, eigen.right) for eigen in own) for own in factors.bases)


def _basis(factors: Any, bases: Bases) -> CorrectedFactors:
    """The factors by kept eigenvectors, with eigenvalues of 1."""

    def of(left: jax.Array, right: jax.Array | None, values: Any) -> Eigen:
        return Eigen(left, right, jnp.ones(values.shape, values.dtype))

    shapes = jax.eval_shape(factors.eigen).bases
    kept = tuple(
        tuple(of(*pair, eigen.values) for pair, eigen in zip(own, old))
        for own, old in zip(bases, shapes)
    )
    return CorrectedFactors(kept, factors.diagonals, factors.structure)


def _refreshed(factors: Any, state: EigenbasisState, due: jax.Array, style: str) -> Bases:
    """The eigenvectors of this step; those of factors that are not finite are left out."""

    def decomposed() -> Bases:
        return _accepted(_bases(factors.eigen()), state.bases)

    def iterated() -> Bases:
        return _accepted(_bases(factors.eigen_from(_basis(factors, state.bases))), state.bases)

    def refreshed() -> Bases:
        if style == "exact":
            return decomposed()
        return axes.cond(state.step == 0, decomposed, iterated)

    return axes.cond(due, refreshed, lambda: state.bases)


def _accepted(new: Bases, old: Bases) -> Bases:
    def accept(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where(jnp.all(jnp.isfinite(x)), x, y).astype(y.dtype)

    return jax.tree.map(accept, new, old)
