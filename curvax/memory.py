"""Which gradient an objective gave for which parameters, told by the identity of the leaves.

Parameters and gradients are held by weak reference, and a record goes with its gradient: nothing
traced outlives its trace.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import jax

from curvax.trees import Tree


class Given(NamedTuple):
    """One gradient that was given."""

    params: list[weakref.ref]
    grads: list[weakref.ref]
    value: jax.Array
    """L(θ), scalar."""
    local: frozenset[str]
    """The device axes over which loss and gradient are each device's own."""


class Memory:
    """The gradients given so far that somebody still holds."""

    def __init__(self) -> None:
        self.records: list[Given] = []

    def keep(self, params: Tree, grads: Tree, value: jax.Array, local: frozenset[str]) -> None:
        """Remembers a gradient; numbers that are no arrays are not remembered."""
        me = weakref.ref(self)

        def forget(dead: weakref.ref) -> None:
            if memory := me():
                memory.records = [r for r in memory.records if all(g is not dead for g in r.grads)]

        try:
            given = [weakref.ref(x, forget) for x in jax.tree.leaves(grads)]
            at = [weakref.ref(x) for x in jax.tree.leaves(params)]
        except TypeError:
            return
        self.records.append(Given(at, given, value, local))

    def find(self, params: Tree, grads: Tree) -> Given | None:
        """The record of these very leaves, or None."""
        for record in self.records:
            if _same(record.grads, grads) and _same(record.params, params):
                return record
        return None


def _same(refs: list[weakref.ref], tree: Tree) -> bool:
    leaves = jax.tree.leaves(tree)
    return len(refs) == len(leaves) and all(ref() is x for ref, x in zip(refs, leaves))
