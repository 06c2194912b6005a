"""Names for the types that signatures of several packages share.

Modules whose signatures use the longer ones import `annotations` from `__future__`, so that `help`
shows the names.
"""

from collections.abc import Callable
from typing import Any

import jax

from curvax.arithmetic.trees import Tree

Scalar = float | jax.Array
"""A number of Python, or a scalar array, traced or not."""
ScalarOrSchedule = Scalar | Callable[[jax.Array], Scalar]
"""A scalar, or a function of the number of the step (int32), as the schedules of Optax."""
Period = int | jax.Array
"""A number of steps: an int, or a traced one."""
Key = jax.Array | int
"""A typed PRNG key, or a seed."""
Sampler = Callable[[jax.Array, Tree], Tree]
"""(typed key, tree) ↦ a random tree like it."""
TreePrefix = Tree
"""A tree whose leaves stand for whole subtrees of the parameters; a single leaf for all of them."""
Mask = TreePrefix | Callable[[Tree], TreePrefix]
"""A tree prefix of booleans, or a function of the parameters that returns one."""
Matvec = Callable[[Tree], Tree]
"""v ↦ C v, a linear map of trees; a `Product` is one."""
Score = Callable[[Tree], jax.Array]
"""x ↦ a scalar, lower is better: ranks the iterates of a solver."""
ValueFn = Callable[..., Any]
"""The `value_fn` of an update, params ↦ the loss, or (loss, aux); an `Objective` is one."""
