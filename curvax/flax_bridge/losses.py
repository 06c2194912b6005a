"""An nnx module and a loss of it ↦ a loss of parameters, free of side effects."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx

from curvax import compat

Loss = Callable[..., tuple[jax.Array, Any]]


def nnx_loss(
    model: nnx.Module, fn: Callable[..., jax.Array], *, wrt: Any = nnx.Param
) -> tuple[Loss, nnx.State]:
    """Splits a module into its parameters and a pure loss of them.

    Every evaluation starts from the state that the module has now (batch statistics, dropout
    counters), so both passes of SAM draw the same dropout masks, and from that state alone does
    the new one follow: it is handed back and advances once, when it is written back.

        loss, params = nnx_loss(model, cross_entropy)
        objective = curvax.Objective(loss, batch, has_aux=True)
        (value, state), grads = objective.value_and_grad(params)
        optimizer.update(model, grads, value_fn=objective)
        nnx.update(model, state)

    Call it in the step, before the first evaluation: a module changed later is not seen.

    Args:
        model: the module, which is not changed.
        fn: `fn(model, batch) -> scalar`, a mean over the batch; or `-> outputs`, where the result
            is to be the `model=` of an `Objective`. It may change the model it is given, a copy.
        wrt: filter for the parameters; the same as the optimiser's.

    Returns:
        `loss(params, batch) -> (what fn returns, state)` and the parameters, an `nnx.State` with
        the optimiser's structure. `state` is all of the module but the parameters and the keys of
        its random streams (these never change, their counters do), as plain arrays.
        With `Objective(..., key=)` it is called as `loss(params, batch, key)`, and the key is
        folded into every random stream, so that groups and micro-batches have masks of their own.
    """
    graphdef, params, *others = nnx.split(model, wrt, nnx.RngKey, ...)
    streams, rest = compat.as_pure(others)

    def loss(params: Any, batch: Any, key: jax.Array | None = None) -> tuple[jax.Array, Any]:
        seeds = streams if key is None else jax.tree.map(partial(_fold, key), streams)
        live = nnx.merge(graphdef, params, seeds, rest, copy=True)
        value = fn(live, batch)
        return value, compat.as_pure(nnx.split(live, wrt, nnx.RngKey, ...)[-1])

    # New Variables: those of the split are the module's own and would follow its updates.
    return loss, jax.tree.map(lambda x: x, params)


def _fold(key: jax.Array, stream: jax.Array) -> jax.Array:
    """The stream's key, or each of its keys where layers are stacked, with another folded in."""
    fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    return fold(stream.reshape(-1), jax.random.bits(key)).reshape(stream.shape)
