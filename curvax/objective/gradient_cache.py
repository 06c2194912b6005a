"""Which gradient an objective gave for which parameters, told by the identity of the leaves.

Parameters and gradients are held by weak reference, and a record goes with its parameters: nothing
traced outlives its trace. That a gradient was given is known longer than the gradient itself, which
may be gone once somebody has made another one of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import jax

from curvax import compat
from curvax.arithmetic.trees import Tree


class Given:
    """One gradient that was given.

    Attributes:
        params, grads: weak references to the leaves.
        value: L(θ), a scalar; None once the gradient is gone.
        local: the device axes over which loss and gradient are each device's own.
    """

    def __init__(
        self,
        params: Tree,
        grads: Tree,
        value: jax.Array | None,
        local: frozenset[str],
        forget: Callable[[Given], None],
    ):
        me = weakref.ref(self)

        def without_gradient(dead: weakref.ref) -> None:
            if record := me():
                record.value = None

        def without_params(dead: weakref.ref) -> None:
            if record := me():
                forget(record)

        self.grads = [weakref.ref(x, without_gradient) for x in jax.tree.leaves(grads)]
        self.params = [weakref.ref(x, without_params) for x in jax.tree.leaves(params)]
        self.value = value
        self.local = local


class Memory:
    """The gradients given so far for parameters that somebody still holds."""

    def __init__(self) -> None:
        self.records: list[Given] = []

    def keep(
        self, params: Tree, grads: Tree, value: jax.Array | None, local: frozenset[str]
    ) -> None:
        """Remembers a gradient; numbers that are no arrays are not remembered."""
        me = weakref.ref(self)

        def forget(record: Given) -> None:
            if memory := me():
                memory.records = [r for r in memory.records if r is not record]

        try:
            record = Given(params, grads, value, local, forget)
        except TypeError:
            return
        gone = lambda r: r.value is None and _same(r.params, params)
        self.records = [*(r for r in self.records if not gone(r)), record]

    def at(self, params: Tree) -> bool:
        """Whether a gradient was given for these very parameters."""
        return any(_same(record.params, params) for record in self.records)

    def find(self, params: Tree, grads: Tree) -> Given | None:
        """The record of these leaves, the gradient's laid out anew or cast wider, or None."""
        for record in self.records:
            if _same(record.grads, grads, compat.origin) and _same(record.params, params):
                return record
        return None


def _same(refs: list[weakref.ref], tree: Tree, of: Callable[[Any], Any] = lambda x: x) -> bool:
    leaves = jax.tree.leaves(tree)
    return len(refs) == len(leaves) and all(of(ref()) is of(x) for ref, x in zip(refs, leaves))
