"""What the halves and the options of an objective must be, and what a loss must return."""

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
    """Refuses a likelihood without a model, or whose targets the batch has not.

    Raises:
        ValueError: either.
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
    """Refuses options that read a batch where there is none, and keys that are none.

    Raises:
        ValueError: no batch, or no such entry in it.
        TypeError: `key` is no typed key.
    """
    if batch is None and (microbatch or weight or model):
        raise ValueError(
            "`Objective` was given `microbatch`, `weight` or `model`, which read the batch, "
            "and no batch. Write `Objective(loss, batch, ...)`."
        )
    if isinstance(weight, str) and (not isinstance(batch, dict) or weight not in batch):
        raise ValueError(
            f"`Objective(weight={weight!r})` names an entry of the batch, and the batch has none "
            "of that name. Pass a name that is there, or a callable `batch -> scalar`."
        )
    if key is not None:
        check_key(key, "`Objective(key=)`")


def check_scale(scale: Any) -> None:
    """Refuses a scale of the loss that is no positive scalar; traced ones pass by their shape.

    Raises:
        TypeError: it is no real scalar.
        ValueError: it is zero, negative or not finite.
    """
    if scale is None:
        return
    number = isinstance(scale, numbers.Real) and not isinstance(scale, bool)
    array = hasattr(scale, "dtype") and jnp.shape(scale) == ()
    if not number and not (array and jnp.issubdtype(scale.dtype, jnp.number)):
        raise TypeError(
            "`Objective(scale=)` multiplies the loss and takes a number or a scalar array, such as "
            f"`dynamic_scale.scale`, and got {scale!r}."
        )
    if number and not 0 < float(scale) < float("inf"):
        raise ValueError(
            "`Objective(scale=)` multiplies the loss, and its gradients are divided by it: it must "
            f"be positive and finite, and is {scale}. Powers of two, such as 2.0**15, are exact."
        )


def check_key(key: Any, where: str) -> None:
    """Refuses what is no typed key.

    Raises:
        TypeError: it is a raw key, or a seed.
    """
    if not jnp.issubdtype(jnp.result_type(key), jax.dtypes.prng_key):
        raise TypeError(
            f"{where} takes a typed key. Write `jax.random.key(seed)`, or "
            "`jax.random.wrap_key_data(raw_key)` for an old one."
        )


def refuse_joined(joined: tuple[Any, ...]) -> None:
    """Refuses a look into a batch that is a device's part of a group.

    Raises:
        ValueError: it is.
    """
    if joined:
        raise ValueError(
            "`per_group` makes one group of several devices here, of which each sees its own part: "
            "known are the group's loss, gradient and Hessian products. A stage within it looks "
            "further, at outputs, single examples or parts of the batch. Put it outside of "
            "`per_group`, or take groups that one device holds."
        )


def pair(out: Any, half: str) -> tuple[Any, Any]:
    """(value, aux), as a loss or a model with an aux returns them.

    Raises:
        TypeError: it returned something else.
    """
    if not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(
            f"`Objective(has_aux=True)` expects the {half} to return a pair whose second part is "
            f"the aux, and got {type(out).__name__}. Return `(value, aux)` or drop `has_aux`."
        )
    return out


def called(loss: Callable[..., Any], params: Tree, *rest: Any) -> Any:
    """What a loss or a model returns for these parameters.

    Raises:
        TypeError: it fails on arguments or parameters that it was hardly written for.
    """
    try:
        return loss(params, *rest)
    except (TypeError, AttributeError, KeyError, IndexError) as error:
        if cure := _other_arguments(loss, params, *rest) or _other_parameters(params, error):
            raise TypeError(f"The loss failed with {error!r}. {cure}") from error
        raise


def _other_arguments(loss: Callable[..., Any], *args: Any) -> str | None:
    """What is done about a loss that takes more or fewer arguments."""
    try:
        inspect.signature(loss).bind(*args)
    except ValueError:  # a callable without a signature
        return None
    except TypeError:
        given = ("params", "batch", "key")[: len(args)]
        return (
            f"It is called as `loss({', '.join(given)})`. A loss of parameters and batch is "
            "`value_fn=curvax.Objective(loss, batch)`, with a key of its dropout "
            "`curvax.Objective(loss, batch, key=key)`; what else it takes is bound before, as in "
            "`lambda params, batch: loss(params, batch, step)`."
        )
    return None


def _other_parameters(params: Tree, error: Exception) -> str | None:
    """What is done about a loss that meets a vector or an nnx state in the place of its own."""
    if trees.is_leaf(params) and jnp.ndim(params) == 1:
        return (
            f"It was handed one array of {jnp.size(params)} entries as its parameters. If it takes "
            "a tree, a wrapper such as `optax.flatten` has made a vector of the parameters that "
            "reach the stage, but not of those of `value_fn`. Put the wrapper around the base "
            "alone, as in `sam_perturb(rho) | optax.flatten(base)`."
        )
    if type(params).__module__.startswith("flax.nnx") and "State" in str(error):
        return (
            "It was handed the parameters, an `nnx.State`, and not the module. A loss of a module "
            "is made one of its parameters by `loss, params = curvax.nnx_loss(model, loss_fn)`, "
            "then `value_fn=curvax.Objective(loss, batch, has_aux=True)`."
        )
    return None


def scalar(value: Any, has_aux: bool = False) -> jax.Array:
    """The value of a loss in float32 or wider.

    Raises:
        TypeError: it is no real floating scalar.
    """
    if not trees.is_leaf(value):
        raise TypeError(_no_number(value, has_aux))
    value = jnp.asarray(value)
    if value.shape or not trees.is_float(value):
        raise TypeError(
            f"The loss must be a floating scalar, and is {value.dtype}{list(value.shape)}. Reduce "
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
            "Return `(value, aux)` with all else in the aux, `(value, (logits, state))`; for an "
            "nnx module, `nnx_loss(model, loss_fn, has_aux=True)` does so."
        )
    return (
        f"The loss returned {kind}. A loss that returns `(scalar, aux)` is passed as "
        "`curvax.Objective(loss_fn, has_aux=True)`, or with its batch as "
        "`curvax.Objective(loss, batch, has_aux=True)`, instead of a plain callable; all else "
        "than the scalar goes into the aux."
    )
