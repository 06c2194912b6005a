"""An objective and a point ↦ its loss, gradient and aux, over micro-batches, examples and devices.

    value_and_aux           (L, aux) of the batch in one piece
    microbatch_mean         a mean over the micro-batches, each in one piece
    value_aux_and_grad      ((L, aux), ∇L) over micro-batches and the devices of a group

`Objective` offers these to users as `__call__` and `value_and_grad`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.devices import axes
from curvax.objective import microbatching, pieces, scaling, validation
from curvax.objective.aux_values import Pass, Undecided, in_pieces

if TYPE_CHECKING:
    from curvax.objective.objective import Objective

LossAndGradient = tuple[tuple[jax.Array, Any], Tree]
"""((L, aux), ∇L), where aux is None without `has_aux`."""


# Dispatched by type, since `analysis` evaluates losses over whole data sets too.
@functools.singledispatch
def value_aux_and_grad(objective: Objective, params: Tree) -> LossAndGradient:
    """((L(θ), aux), ∇L(θ)), not recorded in the gradient cache; aux is None without `has_aux`."""
    here = axes.vary(params, objective.local_axes(params) | set(objective.joined))
    own = pieces.device_part(objective)
    (value, aux), grads = microbatch_mean(own, lambda part: differentiated(part, own, here))
    value, grads = group_mean(objective, (value, grads))
    return (value, aux), grads


def value_and_aux(objective: Objective, params: Tree) -> tuple[jax.Array, Any]:
    """(L(θ), aux) of the whole batch in one piece."""
    if objective.model is not None:
        outputs, aux = objective.outputs(params)
        return loss_of_outputs(objective, outputs), aux
    value, aux = call(objective, "loss", params)
    return validation.scalar(value, objective.has_aux), aux


def differentiated(
    part: Objective,
    whole: Objective,
    params: Tree,
    f: Callable[[Objective, Tree], tuple[jax.Array, Any]] = value_and_aux,
) -> LossAndGradient:
    """((L, aux), ∇L) of a part of the batch, in one piece; (L, aux) = f(part, params).

    States that are overwritten by their gradients (fp8 scales, which track the largest entries
    of cotangents) must see the cotangents of the whole batch's mean, so the part's loss is
    multiplied by its share of that mean, and other gradients are divided by it.
    """
    share: Any = None
    if part is not whole and trees.has_overwritten(params):
        share = part.size / whole.size
        own, total = part.batch_weight(), whole.batch_weight()
        if own is not None and total is not None:
            share = trees.ratio(own, total)
        share = jnp.asarray(share)
    return scaling.differentiated(lambda p: f(part, p), params, part.scale, share)


def refuse_undecided(aux: Any) -> None:
    """Raises if the aux of the whole batch does not follow from those of its micro-batches.

    Raises:
        ValueError: it does not.
    """
    if isinstance(aux, Undecided):
        raise ValueError(aux.message)


def value(objective: Objective, params: Tree) -> jax.Array:
    """L(θ), a scalar that JAX can differentiate; micro-batches are rematerialised."""

    def of(part: Objective) -> jax.Array:
        loss = lambda p: value_and_aux(part, p)[0]
        return (jax.checkpoint(loss) if objective.microbatch else loss)(params)

    own = pieces.device_part(objective)
    return group_mean(objective, microbatch_mean(own, of, aux=False))


def device_mean(objective: Objective, params: Tree, over: tuple[axes.Along, ...]) -> jax.Array:
    """L(θ), averaged over bound device axes.

    Matrix products run at the highest precision, since callers subtract nearby losses.
    """
    with jax.default_matmul_precision("highest"):
        return axes.mean(objective(params), over, objective.batch_weight())


def group_mean(objective: Objective, tree: Tree) -> Tree:
    """The weighted mean of `tree` over the devices of the objective's group."""
    return axes.mean(tree, objective.joined, pieces.device_part(objective).batch_weight())


def loss_of_outputs(objective: Objective, outputs: Tree) -> jax.Array:
    """The loss of given outputs of the model, a scalar in float32 or wider."""
    return validation.scalar(objective.loss(outputs, objective.batch))


def call(objective: Objective, half: str, params: Tree) -> tuple[Any, Any]:
    """(result, aux) of the "loss" or the "model"; for a piece, the aux as `Parts` to reduce."""
    f = getattr(objective, half)
    rest = () if objective.batch is None else (objective.batch,)
    rest = (*rest, *pieces.keys(objective))
    if not objective.has_aux:
        return validation.called(f, params, *rest), None
    both = lambda *args: validation.pair(validation.called(f, *args), half)
    if objective.whole is None:
        return both(params, *rest)
    return in_pieces(Pass(both, params, rest, objective.whole), objective.reduce_aux)


def microbatch_mean(
    objective: Objective, f: Callable[..., Tree], *batched: Tree, aux: bool = True
) -> Tree:
    """The weighted mean over micro-batches of `f`; `f(objective)` without micro-batches.

    Floating leaves are accumulated in float32, other leaves are those of the last micro-batch,
    and the aux is that of the whole batch.

    Args:
        objective: the loss.
        f: `f(part, *batched)`, where `part` is the objective on a micro-batch.
        batched: trees with a leading axis of examples, divided like the batch.
        aux: whether the result of `f` contains the aux.

    Raises:
        ValueError: the batch is one device's part of a group.
    """
    validation.refuse_joined(objective.joined)
    each = objective.microbatch
    if not each or each == objective.size:
        return f(objective, *batched)
    size, whole = objective.size, pieces.whole_batch(objective)
    count = size // each

    def of_piece(i: jax.Array, piece: Tree) -> tuple[Tree, jax.Array | None]:
        batch, *rest = piece
        part = objective.piece(batch, i, count)
        part = pieces.as_piece_of(part, whole) if aux else part
        return f(part, *rest), part.batch_weight()

    cut = microbatching.split((objective.batch, *batched), size, each, "`Objective(microbatch=)`")
    found = microbatching.mean_over_scan(of_piece, cut, count)
    # A piece of a larger batch is finished once all pieces of that batch are reduced.
    return found if objective.whole else microbatching.finished(found)


def map_examples(
    objective: Objective, f: Callable[..., Tree], *shared: Tree
) -> tuple[Tree, jax.Array | None]:
    """`f` on every example, by `vmap`.

    Args:
        objective: the loss.
        f: `f(example, *shared)`, where `example` is the objective on a batch of one, with a
            dropout key of its own.
        shared: trees passed unchanged.

    Returns:
        (the results stacked along a new first axis, the weights of the examples [n] or None)
    """

    def one(i: jax.Array, batch: Tree, *shared: Tree) -> tuple[Tree, jax.Array | None]:
        example = objective.piece(batch, i, objective.size)
        return f(example, *shared), example.batch_weight()

    return microbatching.stack_over_vmap(one, objective.groups(1), objective.size, *shared)
