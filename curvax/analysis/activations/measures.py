"""A model and a point ↦ what goes on inside: active units, norms of activations, attention."""

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.analysis.activations.intermediates import Name, Seen, intermediates
from curvax.analysis.dataset_loss import Sweep
from curvax.analysis.evaluation.compiling import compiled_once
from curvax.analysis.evaluation.whole_sets import averaged
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.devices import axes
from curvax.devices.axes import AxisNames
from curvax.objective import Objective, as_objective, require_batch

Measure = Callable[[Seen], jax.Array]
NUMBER = re.compile(r"_\d+$")


def active_fraction(
    objective: Objective | Sweep, params: Tree, *, mean_over: AxisNames = None
) -> dict[str, jax.Array]:
    """The share of units whose pre-activation is positive, at every ReLU, GELU, SiLU of a model.

    The slope of such a unit is near 1, that of others near 0: the fewer are active, the smaller is
    the Hessian below them. SAM makes the first layers of an MLP-Mixer sparse. Chen, Hsieh & Gong,
    arXiv:2106.01548, section 4.4 and Fig. 2.

    The activations are found in the traced model: the functions of `jax.nn` by their names, and
    GELU or SiLU written out as x·σ(x). They are called after the modules around them, of linen as
    they are, of nnx if the model is wrapped in `curvax.flax_bridge.named_modules`.

    Args:
        objective: an `Objective` with a batch (with `microbatch=` in the memory of so many
            examples), or a `Sweep` over a loader. The model is looked into if there is one, else
            the loss.
        params: the point θ.
        mean_over: the device axes to average over; `()` for each device's own.

    Returns:
        `{"block_0/mlp/gelu": share}`, in the order of the model, scanned layers numbered. Means
        over units, positions and examples.

    Raises:
        ValueError: the model has no such activation.
    """
    return _measured(objective, params, "active_fraction", _share, mean_over)


def activation_norms(
    objective: Objective | Sweep, params: Tree, *, mean_over: AxisNames = None
) -> dict[str, jax.Array]:
    """The norm ‖a‖₂ of what comes out of every activation, over all of its units and positions.

    Chen, Hsieh & Gong, arXiv:2106.01548, Table 3: SAM makes it larger, weight decay or not.

    Args:
        objective: as in `active_fraction`.
        params: the point θ.
        mean_over: the device axes to average over; `()` for each device's own.

    Returns:
        `{"block_0/mlp/gelu": mean over examples}`.

    Raises:
        ValueError: the model has no such activation.
    """
    return _measured(objective, params, "activation_norms", _norm, mean_over)


def attention_maps(objective: Objective, params: Tree) -> dict[str, jax.Array]:
    """What every token attends to, example by example, at every softmax over three axes or more.

    Chen, Hsieh & Gong, arXiv:2106.01548, section 4.4: after SAM they show where the object is.

    Args:
        objective: an `Objective` with a batch, without micro-batches.
        params: the point θ.

    Returns:
        `{"block_0/attention": weights}`, with Flax's attention [n, heads, queries, keys], each row
        summing to 1. Under an axis, of this device's examples.

    Raises:
        ValueError: the model has no attention.
    """
    objective = _checked(objective, params, "attention_maps")
    return dict(_maps(objective, params))


def _norm(seen: Seen) -> jax.Array:
    a = trees.widen(seen.after)
    return jnp.mean(jnp.linalg.norm(a.reshape(len(a), -1), axis=1))


def _share(seen: Seen) -> jax.Array:
    return jnp.mean(seen.before > 0, dtype=jnp.result_type(float))


def _measured(
    objective: Objective | Sweep, params: Tree, name: str, measure: Measure, mean_over: AxisNames
) -> dict[str, jax.Array]:
    if not isinstance(objective, Sweep):
        objective = _checked(objective, params, name)
    options = dict(name=name, measure=measure, mean_over=mean_over)
    return dict(averaged(_means, objective, params, **options))


def _means(
    objective: Objective, params: Tree, *, name: str, measure: Measure, mean_over: AxisNames
) -> OrderedDict[str, jax.Array]:
    over = checks.averaged_axes(mean_over, objective.local_axes(params), stage=name)

    def inside(part: Objective) -> OrderedDict[str, jax.Array]:
        seen = _seen(part, params, _is_unit, name)
        return OrderedDict((path, measure(x)) for path, x in seen.items())

    return axes.mean(objective._microbatch_mean(inside), over, objective.batch_weight())


@compiled_once
def _maps(objective: Objective, params: Tree) -> OrderedDict[str, jax.Array]:
    seen = _seen(objective, params, _is_attention, "attention_maps")
    own = lambda path: path.rpartition("/")[0] or path
    return OrderedDict(
        (own(path), _by_example(x.after, objective.size)) for path, x in seen.items()
    )


def _by_example(x: jax.Array, n: int) -> jax.Array:
    """Without the axes of size one that a vmap of one put before the examples."""
    while x.shape[0] == 1 != n and x.ndim > 3:
        x = x[0]
    return x


def _seen(
    objective: Objective, params: Tree, wanted: Callable[[Name, Seen], bool], where: str
) -> dict[str, Seen]:
    """What of a model is wanted, by paths that start like those of the parameters."""
    forward = objective._evaluate if objective.model is None else objective.outputs
    found = intermediates(lambda p: forward(p)[0], params)
    kept = {name: x for name, x in found.items() if wanted(name, x)}
    if not kept:
        others = ", ".join(f"`{'/'.join(name)}`" for name in found) or "nothing"
        raise ValueError(
            f"`{where}` looks for the activations of `jax.nn`, for x·σ(x), and for softmaxes over "
            f"three axes or more, and this model has none that it can use: it found {others}."
        )
    tops = {trees.names(path)[0] for path, _ in jax.tree.leaves_with_path(params) if path}
    return {"/".join(_below_the_model(name, tops)): x for name, x in kept.items()}


def _below_the_model(name: Name, tops: set[Any]) -> Name:
    """A name without the scope of the model itself, which the paths of parameters do not have."""
    known = name[0] in tops or NUMBER.sub("", name[0]) in tops
    return name if known or len(name) == 1 else name[1:]


def _is_unit(name: Name, seen: Seen) -> bool:
    return not name[-1].startswith("softmax")


def _is_attention(name: Name, seen: Seen) -> bool:
    return name[-1].startswith("softmax") and seen.after.ndim >= 3


def _checked(objective: Any, params: Tree, name: str) -> Objective:
    return require_batch(as_objective(objective, name, params), name)
