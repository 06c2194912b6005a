"""The gradients that an objective has returned, looked up by the identity of their leaves.

Parameters and gradients are held by weak references, and a record is deleted together with its
parameters, so that nothing traced outlives its trace. A record outlives its gradient: an update
rule must know that a gradient was computed at these parameters even if the caller dropped it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import jax

from curvax import compat
from curvax.arithmetic.trees import Tree


class CachedGradient:
    """A gradient that an objective returned, and the loss that was computed with it.

    Attributes:
        params, grads: weak references to the leaves.
        value: L(θ), a scalar; None once the gradient has been deleted.
        local: the device axes along which every device has its own loss and gradient.
    """

    def __init__(
        self,
        params: Tree,
        grads: Tree,
        value: jax.Array | None,
        local: frozenset[str],
        forget: Callable[[CachedGradient], None],
    ):
        this = weakref.ref(self)

        def gradient_deleted(dead: weakref.ref) -> None:
            if record := this():
                record.value = None

        def params_deleted(dead: weakref.ref) -> None:
            if record := this():
                forget(record)

        self.grads = [weakref.ref(x, gradient_deleted) for x in jax.tree.leaves(grads)]
        self.params = [weakref.ref(x, params_deleted) for x in jax.tree.leaves(params)]
        self.value = value
        self.local = local


class GradientCache:
    """The gradients returned so far, for parameters that are still alive."""

    def __init__(self) -> None:
        self.records: list[CachedGradient] = []

    def store(
        self, params: Tree, grads: Tree, value: jax.Array | None, local: frozenset[str]
    ) -> None:
        """Records a gradient; Python numbers, which have no weak references, are not recorded."""
        this = weakref.ref(self)

        def forget(record: CachedGradient) -> None:
            if cache := this():
                cache.records = [r for r in cache.records if r is not record]

        try:
            record = CachedGradient(params, grads, value, local, forget)
        except TypeError:
            return
        replaced = lambda r: r.value is None and _same(r.params, params)
        self.records = [*(r for r in self.records if not replaced(r)), record]

    def has(self, params: Tree) -> bool:
        """Whether a gradient at these very parameters was recorded."""
        return any(_same(record.params, params) for record in self.records)

    def find(self, params: Tree, grads: Tree) -> CachedGradient | None:
        """The record of these leaves, or None.

        A gradient that was only resharded or cast to a wider type is found too.
        """
        for record in self.records:
            if _same(record.grads, grads, compat.origin) and _same(record.params, params):
                return record
        return None

    def inherit(self, outer: GradientCache, at: tuple[Tree, Tree], here: tuple[Tree, Tree]) -> None:
        """Records what the cache of an objective of other parameters knows of a gradient.

        Args:
            outer: that cache.
            at: (parameters, updates) in the structure that it knows.
            here: the same (parameters, updates) in the structure of this cache.
        """
        if (cached := outer.find(*at)) is not None:
            self.store(*here, cached.value, cached.local)
        elif outer.has(at[0]):
            # A gradient was computed there, and the updates are not that gradient.
            self.store(here[0], None, None, frozenset())


def _same(refs: list[weakref.ref], tree: Tree, of: Callable[[Any], Any] = lambda x: x) -> bool:
    leaves = jax.tree.leaves(tree)
    return len(refs) == len(leaves) and all(of(ref()) is of(x) for ref, x in zip(refs, leaves))
