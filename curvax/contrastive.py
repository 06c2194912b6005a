"""The contrastive loss: embeddings of one class are to be near each other and far from the others.

    outputs [n, views, d], classes [n] ↦ mean over anchors i of log Σₐ exp(sᵢₐ) - meanₚ sᵢₚ

a runs over all other embeddings and p over the positives, those of the anchor's class.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from curvax import checks
from curvax.arithmetic import safe_math, trees
from curvax.arithmetic.trees import Tree
from curvax.devices import axes, meshes
from curvax.devices.axes import AxisNames
from curvax.likelihoods import batch_entries
from curvax.likelihoods.batch_entries import Entry

_NAME = "supervised_contrastive"
_OUTPUTS, _TARGETS, _MASK = (f"`{_NAME}{of}`" for of in ("", "(targets)", "(mask=)"))


class _Embedded(NamedTuple):
    """The embeddings of some examples."""

    z: jax.Array
    """Of length 1, or 0 where `known` is False, [n, views, d] in float32 or wider."""
    label: jax.Array | None
    """Classes, integers [n]; None if each example is a class of its own."""
    known: jax.Array | None
    """Which examples count, bool [n]; None for all."""


def supervised_contrastive(
    targets: Entry = None,
    *,
    temperature: float | jax.Array = 0.1,
    mask: Entry = None,
    sync_over: AxisNames = None,
) -> Callable[[jax.Array, Tree], jax.Array]:
    """The supervised contrastive loss of embeddings, for `Objective(loss, batch, model=predict)`.

        L = mean over i of  -1/|P(i)| Σ_{p ∈ P(i)} log( exp(zᵢ·zₚ/τ) / Σ_{a ≠ i} exp(zᵢ·zₐ/τ) )

    Every view of every example is an anchor i; P(i) are all other embeddings of its class, the
    other views of the example among them. Embeddings are normalised to length 1 first. Khosla et
    al., arXiv:2004.11362, eq. 2 (L_out). Without targets P(i) are the other views alone, as in the
    NT-Xent loss of SimCLR, Chen et al., arXiv:2002.05709, eq. 1.

    This differs from the authors' code in: 1. no factor τ (TensorFlow) or τ/0.07 (PyTorch); 2. an
    anchor that has one view and k positives is not divided by k again, as in TensorFlow's.

    Args:
        targets: a key of the batch or a callable `batch -> array` for the classes, integers [n];
            None for the loss without classes.
        temperature: τ > 0, a number or a traced scalar; 0.1 is the paper's for ImageNet.
        mask: a key or callable for a boolean array [n], False at examples that are neither anchors
            nor among the others, such as padding, even if they are NaN.
        sync_over: device axes whose devices tell each other their embeddings, so that each anchor
            is compared with the embeddings of all; `()` for those of its own device alone.

    Returns:
        `loss(outputs, batch) -> scalar` in float32 or wider, of embeddings [n, views, d], or [n, d]
        for one view. An anchor without positives, which has one view, has the loss 0, and counts in
        the mean. Under device axes it is the loss of this device's anchors: the mean over the
        devices of the gradients that `Objective.value_and_grad` returns is the gradient of the loss
        of the whole batch.

    Raises:
        ValueError, TypeError: τ is not positive, or an entry is neither a key nor a callable; when
            called: shapes or dtypes do not fit, there is a single example, or one view and no
            targets; one view and a class with a single example, unless traced; the batch is divided
            among devices and `sync_over` is missing.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> loss = curvax.supervised_contrastive("label", temperature=0.5)
        >>> views = jnp.array([[[1.0, 0.0], [2.0, 0.0]], [[0.0, 1.0], [0.0, 3.0]]])
        >>> round(float(loss(views, {"label": jnp.array([0, 1])})), 3)  # log(1 + 2 exp(-2))
        0.24
        >>> round(float(loss(views, {"label": jnp.array([0, 0])})), 3)
        1.573
    """
    _check_temperature(temperature)
    batch_entries.check_entry(targets, _TARGETS)
    batch_entries.check_entry(mask, _MASK)

    def loss(outputs: jax.Array, batch: Tree) -> jax.Array:
        z = _embeddings(outputs)
        label = None if targets is None else _entry(targets, batch, z, _TARGETS)
        known = None if mask is None else _entry(mask, batch, z, _MASK)
        _check_positives(z, label, known)
        over = _device_axes(sync_over, z)
        own = _Embedded(_unit(z, known), label, known)
        everyone = _everywhere(own, over)
        _refuse_alone(everyone, own)
        device, _ = axes.index_and_size(over)
        return _mean(own, everyone, device * len(z), temperature)

    return loss


def _mean(own: _Embedded, everyone: _Embedded, first: Any, temperature: Any) -> jax.Array:
    """The sum over a device's anchors, divided by the mean number of anchors of a device.

    `first` is the place of the device's first example in `everyone`.
    """
    n, views, _ = own.z.shape
    each = _of_anchors(own, everyone, first, temperature)
    if own.known is None or everyone.known is None:
        return jnp.sum(each) / (n * views)
    kept = jnp.where(own.known[:, None], each, 0)
    return trees.ratio(jnp.sum(kept), jnp.sum(everyone.known) * views * n / len(everyone.z))


def _of_anchors(own: _Embedded, everyone: _Embedded, first: Any, temperature: Any) -> jax.Array:
    """The loss of each anchor, [n, views]; 0 without positives."""
    s = jnp.einsum("ivd,jwd->ivjw", own.z, everyone.z, precision=lax.Precision.HIGHEST)
    s = s / jnp.asarray(temperature, s.dtype)
    others, positive = _pairs(own, everyone, first)
    count = jnp.sum(positive, axis=(2, 3))
    lone = count == 0
    # A sum over no others would be log 0, and its unused derivative 0/0, which stops `debug_nans`.
    total = jax.nn.logsumexp(s, axis=(2, 3), where=others | lone[:, :, None, None])
    near = jnp.sum(jnp.where(positive, s, 0), axis=(2, 3)) / jnp.where(lone, 1, count)
    return jnp.where(lone, 0, total - near)


def _pairs(own: _Embedded, everyone: _Embedded, first: Any) -> tuple[jax.Array, jax.Array]:
    """Which embeddings are compared with an anchor, and which are its positives: bool
    [n, views, N, views]."""
    n, views, _ = own.z.shape
    equal = lambda a, b: (a[:, None] == b[None])[:, None, :, None]
    same_example = equal(first + jnp.arange(n), jnp.arange(len(everyone.z)))
    others = ~(same_example & np.eye(views, dtype=bool)[None, :, None])
    if everyone.known is not None:
        others &= everyone.known[None, None, :, None]
    same = same_example if own.label is None else equal(own.label, everyone.label)
    return others, others & same


def _unit(z: jax.Array, known: jax.Array | None) -> jax.Array:
    """z / ‖z‖ along the last axis, and 0 for z = 0, with finite derivatives at every scale."""
    if known is not None:
        z = jnp.where(known[:, None, None], z, 0)
    largest = jnp.max(jnp.abs(z), axis=-1, keepdims=True)
    z = z * trees.inverse(trees.power_of_two(largest))
    length = safe_math.root(jnp.sum(z * z, axis=-1, keepdims=True))
    return safe_math.ratio(z, length)


def _everywhere(own: _Embedded, over: tuple[str, ...]) -> _Embedded:
    """The embeddings of all devices along these axes, the first axis slowest.

    The transpose of `all_gather` adds the cotangents of all devices, so that a device's gradient
    is that of the sum of all devices' losses in its own parameters.
    """
    if not over:
        return meshes.gathered(own)
    gather = lambda x: lax.all_gather(axes.vary(x, over), over, tiled=True)
    return jax.tree.map(gather, own)


def _device_axes(sync_over: AxisNames, z: jax.Array) -> tuple[str, ...]:
    """The bound axes of `sync_over`; by types, those over which the embeddings vary."""
    typed = axes.tracked()
    local = axes.varying(z) if typed else frozenset(axes.manual())
    over = checks.averaged_axes(sync_over, local, stage=_NAME, option="sync_over", partly=True)
    return tuple(axis for axis in over if not typed or axis in local)


def _check_temperature(temperature: Any) -> None:
    if isinstance(temperature, str) or jnp.shape(temperature) != ():
        raise TypeError(
            f"`{_NAME}(temperature=)` is a number or a traced scalar, and received "
            f"{temperature!r}. The paper's value for ImageNet is 0.1."
        )
    if isinstance(temperature, numbers.Real) and not 0 < float(temperature) < float("inf"):
        raise ValueError(
            f"`{_NAME}(temperature=)` divides the cosines, must be positive and finite, and is "
            f"{temperature}. The paper's value for ImageNet is 0.1."
        )


def _embeddings(outputs: Any) -> jax.Array:
    """The outputs as [n, views, d] in float32 or wider.

    Raises:
        TypeError, ValueError: they are not one floating array, or have another number of axes.
    """
    if not hasattr(outputs, "dtype") or not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise TypeError(
            f"{_OUTPUTS} takes the embeddings as one real floating array, and received "
            f"{getattr(outputs, 'dtype', type(outputs).__name__)}. If the model also returns its "
            "new state, write `Objective(..., has_aux=True)`."
        )
    if outputs.ndim not in (2, 3):
        raise ValueError(
            f"{_OUTPUTS} takes embeddings [n, views, d], or [n, d] for one view, and received "
            f"{list(outputs.shape)}. Reshape them in the model, for instance by "
            "`z.reshape(n, 2, -1)`."
        )
    z = trees.widen(outputs)
    return meshes.by_rows(z if z.ndim == 3 else z[:, None])


def _entry(entry: Entry, batch: Tree, z: jax.Array, option: str) -> jax.Array:
    """The classes or the mask, [n].

    Raises:
        TypeError, ValueError: they have another shape or dtype.
    """
    found = batch_entries.read(entry, batch, option)
    if option == _MASK:
        batch_entries.check_mask(found, option)
    elif not jnp.issubdtype(found.dtype, jnp.integer):
        raise TypeError(
            f"{option} are classes, integers [{len(z)}] here, and are {found.dtype} "
            f"{list(found.shape)}. Convert rows of a one-hot matrix in a callable, "
            f'`{_NAME}(lambda batch: batch["label"].argmax(-1))`.'
        )
    if found.shape != (len(z),):
        raise ValueError(
            f"{option} has one entry for each example, [{len(z)}] for the embeddings "
            f"{list(z.shape)}, and has the shape {list(found.shape)}. The views of an example are "
            "on the second axis of the embeddings, [n, views, d], and share its entry."
        )
    return found


def _check_positives(z: jax.Array, label: jax.Array | None, known: jax.Array | None) -> None:
    """Raises if anchors have no positives, as far as is known before tracing."""
    if z.shape[1] > 1:
        return
    if label is None:
        raise ValueError(
            f"`{_NAME}()` without `targets` compares the views of an example with each other, and "
            f"the embeddings {list(z.shape)} have a single view. Return [n, 2, d] of two "
            "augmented views, or name the classes."
        )
    if any(isinstance(x, jax.core.Tracer) for x in (label, known)) or axes.manual():
        return
    counted = np.asarray(label if known is None else label[known])
    classes, counts = np.unique(counted, return_counts=True)
    if (counts == 1).any():
        raise ValueError(
            f"With one view, an anchor's positives are the other examples of its class, and the "
            f"class {classes[counts == 1][0]} has a single example in the batch. Pass two views, "
            "[n, 2, d], or batches with several examples of each class. (Under `jit` the classes "
            "are not known, and such an anchor has the loss 0.)"
        )


def _refuse_alone(everyone: _Embedded, own: _Embedded) -> None:
    if len(everyone.z) == 1:
        raise ValueError(
            f"{_OUTPUTS} compares the examples of a batch, and received {list(own.z.shape)}, a "
            "single one. It has no meaning for single examples, as in `empirical_fisher_diag` or "
            "with groups or micro-batches of one."
        )
