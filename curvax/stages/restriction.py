"""Stages by group of leaves, with the loss restricted along with the parameters.

Built on `optax.partition`: its masked trees become trees without the masked leaves, and `value_fn`
becomes the loss of that sub-tree with all other leaves fixed, so that a Hessian product skips them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Mask, TreePrefix
from curvax.hyperparameters import injectable
from curvax.linear_operator import Product, as_product
from curvax.objective import as_objective
from curvax.pipes import initial
from curvax.pipes.signal import Signal, Stage, containing, step


@injectable
def partition(
    stages_by_label: Mapping[Any, optax.GradientTransformation],
    labels: TreePrefix | Callable[[Tree], TreePrefix],
) -> Stage:
    """Applies different stages to different leaves, as `optax.partition` does.

    The stages of each label see parameters, signal and loss restricted to their leaves. Their
    updates come out; what else they add to the signal (a diagonal, a product) does not.

    Args:
        stages_by_label: label ↦ a stage, a pipe, or a plain Optax transformation.
        labels: tree prefix of labels, or a callable `params -> tree`.

    Returns:
        A stage, whose state is Optax's `PartitionState`.

    Raises:
        ValueError: at `init`, a label without stages.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda p: 0.5 * (p["a"] ** 2 + p["b"] ** 2)
        >>> stages = {"sam": curvax.sam(optax.sgd(1.0), 0.1), "sgd": optax.sgd(1.0)}
        >>> tx = curvax.partition(stages, {"a": "sam", "b": "sgd"})
        >>> params = {"a": jnp.array(1.0), "b": jnp.array(1.0)}
        >>> updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
        >>> {name: round(float(u), 3) for name, u in updates.items()}
        {'a': -1.1, 'b': -1.0}
    """

    def init(params: Tree) -> optax.OptState:
        bare = {label: _Within(part, None, params, {}) for label, part in stages_by_label.items()}
        return _partition(bare, labels).init(params)

    def rule(
        signal: Signal, state: optax.OptState, params: Tree, **extra: Any
    ) -> tuple[Signal, optax.OptState]:
        within = {
            label: _Within(part, signal, params, extra) for label, part in stages_by_label.items()
        }
        updates, state = _partition(within, labels).update(signal.updates, state, params)
        outs = [part.out for part in within.values() if part.out is not None] or [signal]
        local = frozenset().union(*(out.local for out in outs))
        averaged = frozenset.intersection(*(out.averaged for out in outs))
        return signal._replace(updates=updates, local=local, averaged=averaged), state

    return containing(init, rule, *stages_by_label.values())


@injectable
def restrict(stages: optax.GradientTransformation, mask: Mask) -> Stage:
    """Applies stages to some leaves only, as `optax.masked` does, with the loss restricted too.

    The updates of all other leaves pass unchanged: if the stages contain the learning rate, the
    other leaves get their plain gradient as update. To freeze them, use
    `partition({"train": method, "freeze": optax.set_to_zero()}, labels)`.

    Args:
        stages: a stage, a pipe, or a plain Optax transformation.
        mask: tree prefix of booleans, or a callable `params -> tree`; True leaves take the stages.

    Returns:
        A stage.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda p: 0.5 * (p["a"] ** 2 + p["b"] ** 2)
        >>> tx = curvax.restrict(curvax.sam_perturb(0.1), {"a": True, "b": False})
        >>> params = {"a": jnp.array(1.0), "b": jnp.array(1.0)}
        >>> updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
        >>> {name: round(float(u), 3) for name, u in updates.items()}
        {'a': 1.1, 'b': 1.0}
    """

    def labels(params: Tree) -> Tree:
        chosen = trees.broadcast_prefix(mask(params) if callable(mask) else mask, params)
        return jax.tree.map(lambda inside: "inside" if inside else "outside", chosen)

    return partition({"inside": stages, "outside": optax.identity()}, labels)


def _partition(
    within: Mapping[Any, _Within], labels: TreePrefix | Callable[[Tree], TreePrefix]
) -> optax.GradientTransformationExtraArgs:
    parts = {
        label: optax.GradientTransformationExtraArgs(part.init, part.update)
        for label, part in within.items()
    }
    return optax.partition(parts, labels)


class _Within:
    """The stages of one label, between Optax's masked trees and trees without the masked leaves."""

    def __init__(self, part: optax.GradientTransformation, signal: Any, params: Tree, extra: Any):
        self.part, self.signal, self.params, self.extra = part, signal, params, extra
        self.out: Signal | None = None  # the signal behind the stages; None without leaves

    def init(self, masked: Tree) -> optax.OptState:
        with initial.restricted(lambda sub: _fill(masked, self.params, sub)):
            return self.part.init(_drop(masked))

    def update(
        self, masked: Tree, state: optax.OptState, params: Tree = None, **_: Any
    ) -> tuple[Tree, optax.OptState]:
        keep = lambda tree: _drop(_like(masked, tree))
        extra = dict(self.extra)
        if extra.get("value_fn") is not None:
            fill = lambda sub: _fill(masked, self.params, sub)
            extra["value_fn"] = as_objective(extra["value_fn"], "partition").through(fill)
        inside = self.signal._replace(
            updates=_drop(masked),
            gradient=keep(self.signal.gradient),
            diagonal=None if self.signal.diagonal is None else keep(self.signal.diagonal),
            matvec=None if self.signal.matvec is None else self._matvec(masked),
            factors=None,
        )
        out, state = step(self.part, inside, state, keep(self.params), **extra)
        self.out = out if jax.tree.leaves(out.updates) else None
        return _restore(masked, out.updates), state

    def _matvec(self, masked: Tree) -> Product:
        """The block of the product that belongs to these leaves."""
        whole = as_product(self.signal.matvec)
        zeros = jax.tree.map(jnp.zeros_like, self.params)
        into = lambda v: _fill(masked, zeros, v)
        out_of = lambda tree: _drop(_like(masked, tree))
        return whole.within(into, out_of)


_is_masked: Callable[[object], bool] = lambda x: isinstance(x, optax.MaskedNode)


def _drop(masked: Tree) -> Tree:
    return jax.tree.map(lambda x: None if _is_masked(x) else x, masked, is_leaf=_is_masked)


def _like(masked: Tree, tree: Tree) -> Tree:
    """`tree` with the same leaves masked."""
    return jax.tree.map(lambda m, x: m if _is_masked(m) else x, masked, tree, is_leaf=_is_masked)


def _fill(masked: Tree, whole: Tree, sub: Tree) -> Tree:
    """`whole` with the leaves that are not masked taken from `sub`."""
    chosen = iter(jax.tree.leaves(sub))
    take = lambda m, x: x if _is_masked(m) else next(chosen)
    return jax.tree.map(take, masked, whole, is_leaf=_is_masked)


def _restore(masked: Tree, sub: Tree) -> Tree:
    """`sub` with the masked leaves back in their places."""
    return _fill(masked, masked, sub)
