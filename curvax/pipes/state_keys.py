"""PRNG keys in an optimiser's state: stored as uint32 data, typed where they are used.

Every checkpoint format takes uint32. The data does not contain the implementation of the key, so
the stage that draws remembers it. A transformation that changes the keys of inner stages learns it
from their `init`, traced once with typed keys.
"""

import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp

from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Key

_typed_init = ContextVar("_typed_init", default=False)


def is_key(x: Any) -> bool:
    """Whether x is a typed key, or an array of them."""
    return jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)


def _default_impl() -> str:
    return jax.config.jax_default_prng_impl  # type: ignore[attr-defined]


class DrawingKey:
    """The key of a stage, as stored in its state and as used for drawing.

    Args:
        key: a typed key of any implementation, or a seed for JAX's default.
    """

    def __init__(self, key: Key):
        self._key, typed = key, is_key(key)
        self._impl = jax.random.key_impl(key) if typed else _default_impl()

    def initial(self) -> jax.Array:
        """The data of the key, uint32, as a new buffer: donating the state must not delete the key
        of the stage.
        """
        key = self._key if is_key(self._key) else jax.random.key(self._key, impl=self._impl)
        return jnp.copy(key if _typed_init.get() else jax.random.key_data(key))

    def of(self, kept: jax.Array) -> jax.Array:
        """The typed key of a state. States of earlier versions hold typed keys, which are kept."""
        return kept if is_key(kept) else jax.random.wrap_key_data(kept, impl=self._impl)


class StateKeys:
    """The keys among the leaves of a state.

    Args:
        init: the `params -> state` that made the state.
        params: the parameters, for their shapes.
    """

    def __init__(self, init: Callable[[Tree], Any], params: Tree):
        self._impls: list[Any] = []

        def typed(params: Tree) -> Any:
            # A jitted `init` may have been traced before, with its keys as data.
            with jax.disable_jit():
                state = init(params)
            leaves = jax.tree.leaves(state)
            self._impls = [jax.random.key_impl(x) if is_key(x) else None for x in leaves]
            return state

        token = _typed_init.set(True)
        try:
            with warnings.catch_warnings(action="ignore"):  # issued when the state was made
                jax.eval_shape(typed, params)
        finally:
            _typed_init.reset(token)

    def map(self, f: Callable[[jax.Array], jax.Array], state: Any) -> Any:
        """The state with `f`, a function of typed keys, applied to each key."""

        def change(impl: Any, x: jax.Array) -> jax.Array:
            if is_key(x):
                return f(x)
            return jax.random.key_data(f(jax.random.wrap_key_data(x, impl=impl)))

        return self._each(change, state)

    def without(self, state: Any) -> Any:
        """The state with False in place of each key."""
        return self._each(lambda impl, x: False, state)

    def put_back(self, kept: Any, state: Any) -> Any:
        """The state with the keys of `kept`, a state of the same structure."""
        return self._each(lambda impl, x, old: old, state, kept)

    def _each(self, f: Callable[..., Any], state: Any, *others: Any) -> Any:
        leaves, treedef = jax.tree.flatten(state)
        rows = zip(self._impls, leaves, *map(jax.tree.leaves, others), strict=True)
        new = [x if impl is None else f(impl, x, *rest) for impl, x, *rest in rows]
        return jax.tree.unflatten(treedef, new)
