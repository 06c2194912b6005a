"""Reads targets, masks and weights from a batch, and checks their shapes."""

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp

from curvax.arithmetic.trees import Tree

Entry = Any
"""A key of the batch, or a callable `batch -> array`."""


def check_entry(entry: Entry, option: str) -> None:
    """Checks that an entry can name an array of the batch.

    Raises:
        TypeError: it is neither a key nor a callable, but the array itself for example.
    """
    if not callable(entry) and not isinstance(entry, Hashable):
        raise TypeError(
            f"{option} is a key of the batch or a callable `batch -> array`, and received a "
            f"{type(entry).__name__}. Put the array into the batch and name it here, so that it "
            "is divided together with the batch."
        )


def read(entry: Entry, batch: Tree, option: str) -> jax.Array:
    """The array that an entry names; its shape, of a batch of shapes.

    Raises:
        ValueError: the batch has no such key.
    """
    if callable(entry):
        return jnp.asarray(entry(batch))
    try:
        found: Any = batch[entry]
        is_shape = isinstance(found, jax.ShapeDtypeStruct)
        return found if is_shape else jnp.asarray(found)
    except (KeyError, IndexError, TypeError) as error:
        has = list(batch) if isinstance(batch, dict) else f"the type {type(batch).__name__}"
        raise ValueError(
            f"{option} names the entry {entry!r} of the batch, which does not exist (the batch "
            f"has {has}). Pass a key of the batch, or a callable `batch -> array`."
        ) from error


def check_mask(mask: jax.Array, option: str) -> None:
    """Checks the dtype of a mask.

    Raises:
        TypeError: it is not boolean.
    """
    if mask.dtype != bool:
        raise TypeError(
            f"{option} is boolean, True where a target counts, and received {mask.dtype}. "
            "Write `mask > 0`, or pass numbers as `weights=`."
        )


def spread(x: jax.Array, sites: tuple[int, ...], option: str) -> jax.Array:
    """Broadcasts x from the first axes of the sites to all of them, in the default float dtype.

    Raises:
        ValueError: its shape is not that of the first axes.
    """
    if x.shape != sites[: x.ndim]:
        raise ValueError(
            f"{option} has shape {list(x.shape)}, and the targets that it weights have the sites "
            f"{list(sites)}. Pass one value for each site, or for each position along their first "
            "axes."
        )
    values = with_axes(x.astype(jnp.result_type(float)), len(sites))
    return jnp.broadcast_to(values, sites)


def with_axes(x: jax.Array, ndim: int) -> jax.Array:
    """x with axes of size one appended, up to `ndim`."""
    return x.reshape(*x.shape, *[1] * (ndim - x.ndim))
