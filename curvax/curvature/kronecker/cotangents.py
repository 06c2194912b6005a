"""Cotangents of a model's outputs whose outer products have the curvature of the loss as mean.

Σ_j c_j c_jᵀ is ∇²ℓ of the mean loss if exact, and otherwise an outer product of scores: of sampled
labels, or of the labels of the batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from curvax.arithmetic import safe_math, trees
from curvax.arithmetic.trees import Tree
from curvax.curvature.fisher import by_example, draw
from curvax.likelihoods import Likelihood
from curvax.objective import Objective, loss_of_outputs, require_likelihood


class Columns(NamedTuple):
    """`count` cotangents of the outputs of all examples."""

    count: int  # type: ignore[assignment]
    at: Callable[[Any], Tree]
    """j ↦ c_j, shaped like the outputs."""


def columns(part: Objective, outputs: Any, fisher: str, *draws: jax.Array) -> Columns:
    """The cotangents of a part of the batch.

    Args:
        part: the objective on that part.
        outputs: z of the model.
        fisher: `exact`, `sampled` or `empirical`.
        draws: for `sampled`, labels [n, S, ...] or keys [n, 1] to draw them with.
    """
    if fisher == "exact":
        return _of_root(part, outputs)
    if fisher == "sampled":
        return _of_labels(part, outputs, *draws)
    return Columns(1, lambda j: _observed(part, outputs))


def _of_root(part: Objective, outputs: jax.Array) -> Columns:
    """The columns of the root of ∇²ℓ, one for each entry of the outputs of an example.

    All examples are taken at once, since they do not depend on each other; the sites of an
    example, such as its tokens, do, and have columns of their own.
    """
    likelihood, shape = require_likelihood(part, "The Fisher matrix"), outputs.shape[1:]
    count = int(np.prod(shape, dtype=int))

    def at(j: Any) -> jax.Array:
        e = (jnp.arange(count) == j).astype(outputs.dtype).reshape(1, *shape)
        return likelihood.root(outputs, part.batch, jnp.broadcast_to(e, outputs.shape))

    return Columns(count, at)


def _of_labels(part: Objective, outputs: jax.Array, draws: jax.Array) -> Columns:
    likelihood = require_likelihood(part, "The Fisher matrix")
    if jnp.issubdtype(draws.dtype, jax.dtypes.prng_key):
        draws = draw(likelihood, draws, outputs, part.batch)
    count = draws.shape[1]
    share = safe_math.root(likelihood.site_weights(outputs, part.batch) / count)
    score = lambda labels: likelihood.on_labels(labels).scores(outputs, part.batch)
    return Columns(count, lambda j: share * trees.widen(score(draws[:, j])))


def _observed(part: Objective, outputs: Tree) -> Tree:
    """The scores of the labels of the batch; of any other loss, its gradient times √n."""
    if isinstance(part.loss, Likelihood):
        share = safe_math.root(part.loss.site_weights(outputs, part.batch))
        return share * trees.widen(part.loss.scores(outputs, part.batch))
    weight = part.batch_weight()
    total = jnp.asarray(part.size if weight is None else weight, jnp.result_type(float))
    return trees.scale(jnp.sqrt(total), jax.grad(lambda z: loss_of_outputs(part, z))(outputs))


def draws_of(
    objective: Objective, fisher: str, labels: jax.Array | None, key: jax.Array | None
) -> tuple[jax.Array, ...]:
    """(labels or keys with a leading axis of examples,), or () if none are needed."""
    if fisher != "sampled":
        return ()
    if labels is None:
        assert key is not None
        return (objective.example_keys(key)[:, None],)
    likelihood = require_likelihood(objective, "The Fisher matrix")
    shape = likelihood.label_shape(objective.batch)
    return (by_example(jnp.asarray(labels), shape, "kronecker_factors"),)


def with_signs(part: Objective, j: Any, cotangent: Tree) -> Tree:
    """A cotangent with a random sign for each example, the same on any number of devices."""
    keys = part.example_keys(jax.random.fold_in(jax.random.key(0), j))

    def signed(x: jax.Array) -> jax.Array:
        draw = lambda k: jax.random.rademacher(k, (1,) * (x.ndim - 1), x.dtype)
        return jax.vmap(draw)(keys) * x

    return jax.tree.map(signed, cotangent)
