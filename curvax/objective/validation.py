"""Checks of an objective's arguments and of what its loss and model return."""

import inspect
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.likelihoods import Likelihood


def check_halves(loss: Callable[..., Any], batch: Tree, model: Callable[..., Any] | None) -> None:
    """Raises unless a likelihood has a model and finds its targets in the batch.

    Raises:
        ValueError: there is no model, or the batch lacks a key that the likelihood names.
    """
    if not isinstance(loss, Likelihood):
        return
    if model is None:
        raise ValueError(
            "A likelihood is a loss of the model's outputs, and `Objective` was given no `model`. "
            f"Write `Objective({loss.name}(...), batch, model=predict)` with "
            "`predict(params, batch) -> outputs`."
        )
    if batch is not None:
        loss.check_batch(batch)


def check_options(batch: Tree, model: Any, key: Any, microbatch: Any, weight: Any) -> None:
    """Checks the options that read the batch, and the key.

    Raises:
        ValueError: there is no batch, or it has no entry called `weight`.
        TypeError: `key` is not a typed key.
    """
    if batch is None and (microbatch or weight or model):
        raise ValueError(
            "`microbatch`, `weight` and `model` of `Objective` read the batch, and there is no "
            "batch. Write `Objective(loss, batch, ...)`."
        )
    if isinstance(weight, str) and (not isinstance(batch, dict) or weight not in batch):
        raise ValueError(
            f"`Objective(weight={weight!r})` names an entry of the batch, and the batch has no "
            "entry of that name. Pass the key of an entry, or a callable `batch -> scalar`."
        )
    if key is not None:
        check_key(key, "`Objective(key=)`")


def batch_size(batch: Tree) -> int:
    """The number of examples in a batch.

    Raises:
        ValueError: there is no batch, or its leaves have different leading axes.
    """
    shapes = [jnp.shape(x) for x in jax.tree.leaves(batch)]
    sizes = {shape[:1] for shape in shapes}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            "The batch of an `Objective` is a pytree of arrays that share one leading axis of "
            f"examples. Got shapes {shapes}. A plain callable has no batch: write "
            "`Objective(loss, batch)` with `loss(params, batch)`."
        )
    return sizes.pop()[0]


def check_scale(scale: Any) -> None:
    """Checks that a scale of the loss is a positive scalar; of traced scales only the shape.

    Raises:
        TypeError: it is not a real scalar.
        ValueError: it is zero, negative or not finite.
    """
    if scale is None:
        return
    number = isinstance(scale, numbers.Real) and not isinstance(scale, bool)
    array = hasattr(scale, "dtype") and jnp.shape(scale) == ()
    if not number and not (array and jnp.issubdtype(scale.dtype, jnp.number)):
        raise TypeError(
            "`Objective(scale=)` multiplies the loss, a scalar, and received "
            f"{scale!r}. Pass a number or a scalar array, such as `dynamic_scale.scale`."
        )
    if number and not 0 < float(scale) < float("inf"):
        raise ValueError(
            "`Objective(scale=)` multiplies the loss, and gradients are divided by it: it must be "
            f"positive and finite, and is {scale}. Powers of two, such as 2.0**15, are exact."
        )


def check_key(key: Any, where: str) -> None:
    """Checks that `key` is a typed key.

    Raises:
        TypeError: it is a raw key, or a seed.
    """
    if not jnp.issubdtype(jnp.result_type(key), jax.dtypes.prng_key):
        raise TypeError(
            f"{where} takes a typed key, and received {key!r}. Write `jax.random.key(seed)`, or "
            "convert a raw key by `jax.random.wrap_key_data(raw_key)`."
        )


def refuse_joined(joined: tuple[Any, ...]) -> None:
    """Raises if the batch is one device's part of a group, whose examples cannot all be read.

    Raises:
        ValueError: `joined` is not empty.
    """
    if joined:
        raise ValueError(
            "A group of `per_group` spans several devices here, each of which holds a part of it: "
            "only the group's loss, gradient and Hessian products can be computed. A stage inside "
            "`per_group` reads outputs, single examples or parts of the batch. Put that stage "
            "outside of `per_group`, or use groups that fit on one device."
        )


def pair(out: Any, half: str) -> tuple[Any, Any]:
    """Unpacks the (value, aux) that a loss or a model with an aux returned.

    Raises:
        TypeError: it returned anything else.
    """
    if not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(
            f"`Objective(has_aux=True)` expects the {half} to return a pair whose second part is "
            f"the aux, and it returned {type(out).__name__}. Return `(value, aux)` or drop "
            "`has_aux`."
        )
    return out


def called(loss: Callable[..., Any], params: Tree, *rest: Any) -> Any:
    """Calls a loss or a model, with a helpful error if its signature or its parameters do not fit.

    Raises:
        TypeError: it takes another number of arguments, or other parameters than these.
    """
    try:
        return loss(params, *rest)
    except (TypeError, AttributeError, KeyError, IndexError) as error:
        if cure := _other_arguments(loss, params, *rest) or _other_parameters(params, error):
            raise TypeError(f"The loss failed with {error!r}. {cure}") from error
        raise


def _other_arguments(loss: Callable[..., Any], *args: Any) -> str | None:
    """The remedy if the loss takes more or fewer arguments than it received, else None."""
    try:
        inspect.signature(loss).bind(*args)
    except ValueError:  # a callable without a signature
        return None
    except TypeError:
        given = ("params", "batch", "key")[: len(args)]
        return (
            f"It is called as `loss({', '.join(given)})`. Pass a loss of parameters and batch as "
            "`value_fn=curvax.Objective(loss, batch)`, with a key for its dropout as "
            "`curvax.Objective(loss, batch, key=key)`, and bind other arguments first, as in "
            "`lambda params, batch: loss(params, batch, step)`."
        )
    return None


def _other_parameters(params: Tree, error: Exception) -> str | None:
    """The remedy if the loss received a vector or an nnx state instead of its own parameters."""
    if trees.is_leaf(params) and jnp.ndim(params) == 1:
        return (
            f"It received one array of {jnp.size(params)} entries as its parameters. If it takes "
            "a tree, a wrapper such as `optax.flatten` has flattened the parameters that reach the "
            "stage, but not those that `value_fn` takes. Wrap only the base optimiser, as in "
            "`sam_perturb(rho) | optax.flatten(base)`."
        )
    if type(params).__module__.startswith("flax.nnx") and "State" in str(error):
        return (
            "It received the parameters, an `nnx.State`, and not the module. Convert a loss of a "
            "module to one of its parameters by `loss, params = curvax.nnx_loss(model, loss_fn)`, "
            "then pass `value_fn=curvax.Objective(loss, batch, has_aux=True)`."
        )
    return None


def scalar(value: Any, has_aux: bool = False) -> jax.Array:
    """The value of a loss in float32 or wider.

    Raises:
        TypeError: it is not a real floating scalar.
    """
    if not trees.is_leaf(value):
        raise TypeError(_no_number(value, has_aux))
    value = jnp.asarray(value)
    if value.shape or not trees.is_float(value):
        raise TypeError(
            f"The loss must be a floating scalar, and is {value.dtype}{list(value.shape)}. Average "
            "it over the examples with `jnp.mean`."
        )
    if jnp.issubdtype(value.dtype, jnp.complexfloating):
        raise TypeError(
            f"The loss must be real, and is {value.dtype}: write `jnp.mean(jnp.abs(z) ** 2)` for "
            "`jnp.mean(z**2)`, or `.real`. A likelihood takes real outputs, such as "
            "`jnp.stack([z.real, z.imag], axis=-1)`."
        )
    return trees.widen(value)


def _no_number(value: Any, has_aux: bool) -> str:
    kind = f"a tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__
    if value is None:
        return "The loss returned None. Return its value, a scalar."
    if has_aux:
        return (
            f"The first part of what the loss returned must be its value, a scalar, and is {kind}. "
            "Return `(value, aux)` with everything else in the aux, `(value, (logits, state))`; "
            "for an nnx module use `nnx_loss(model, loss_fn, has_aux=True)`."
        )
    return (
        f"The loss returned {kind} instead of a scalar. Pass a loss that returns `(scalar, aux)` "
        "as `curvax.Objective(loss_fn, has_aux=True)`, or with its batch as "
        "`curvax.Objective(loss, batch, has_aux=True)`, and return everything but the scalar in "
        "the aux."
    )
