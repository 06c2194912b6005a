"""Where a batch keeps its targets, and how much each of them counts."""

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp

from curvax.arithmetic.trees import Tree

Entry = Any
"""A key of the batch, or a callable `batch -> array`."""


def check_entry(entry: Entry, option: str) -> None:
    """Refuses what can name nothing in a batch: the array itself, say.

    Raises:
        TypeError: neither a key nor a callable.
    """
    if not callable(entry) and not isinstance(entry, Hashable):
        raise TypeError(
            f"{option} is a key of the batch or a callable `batch -> array`, and was a "
            f"{type(entry).__name__}. Put the array into the batch and name it here, so that it "
            "is cut with the batch."
        )


def read(entry: Entry, batch: Tree, option: str) -> jax.Array:
    """The array that an entry names.

    Raises:
        ValueError: the batch has no such key.
    """
    if callable(entry):
        return jnp.asarray(entry(batch))
    try:
        return jnp.asarray(batch[entry])
    except (KeyError, IndexError, TypeError) as error:
        has = list(batch) if isinstance(batch, dict) else f"a {type(batch).__name__}"
        raise ValueError(
            f"{option} names the entry {entry!r} of the batch, which is not there (there is: "
            f"{has}). Pass a key of the batch, or a callable `batch -> array`."
        ) from error


def check_mask(mask: jax.Array, option: str) -> None:
    """Refuses a mask of numbers.

    Raises:
        TypeError: it is not boolean.
    """
    if mask.dtype != bool:
        raise TypeError(
            f"{option} is boolean, True where a target counts, and has dtype {mask.dtype}. "
            "Write `mask > 0`, or pass numbers as `weights=`."
        )


def spread(x: jax.Array, sites: tuple[int, ...], option: str) -> jax.Array:
    """x along the first axes of the sites, in the default float, one value for each.

    Raises:
        ValueError: it does not lie along them.
    """
    if x.shape != sites[: x.ndim]:
        raise ValueError(
            f"{option} has shape {list(x.shape)}, and the targets that it weighs lie along "
            f"{list(sites)}. It takes one value for each of them, or for each of the first axes."
        )
    values = with_axes(x.astype(jnp.result_type(float)), len(sites))
    return jnp.broadcast_to(values, sites)


def with_axes(x: jax.Array, ndim: int) -> jax.Array:
    """x with axes of size one appended, up to `ndim`."""
    return x.reshape(*x.shape, *[1] * (ndim - x.ndim))
