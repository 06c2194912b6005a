"""A model and a point ↦ shares of active units, norms of activations, attention maps."""

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.analysis.activations.intermediates import Activation, Name, intermediates
from curvax.analysis.compiling import compiled_once
from curvax.analysis.dataset_loss import DatasetLoss
from curvax.analysis.evaluation import evaluate_mean
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import ValueFn
from curvax.devices import axes
from curvax.devices.axes import AxisNames
from curvax.objective import Objective, as_objective, microbatch_mean, require_batch, value_and_aux

Statistic = Callable[[Activation], jax.Array]
NUMBER = re.compile(r"_\d+$")


def active_fraction(
    objective: Objective | DatasetLoss, params: Tree, *, mean_over: AxisNames = None
) -> dict[str, jax.Array]:
    """Computes the share of units with positive pre-activation at each ReLU, GELU, SiLU of a model.

        mean over units, positions and examples of 1[h > 0]

    Inactive units have slopes near 0, and the fewer units are active, the smaller is the Hessian
    of the layers below. SAM makes the first layers of an MLP-Mixer sparse. Chen, Hsieh & Gong,
    arXiv:2106.01548, section 4.4 and Fig. 2.

    Activations are found in the traced model: functions of `jax.nn` by name, and GELU or SiLU
    written out as x·σ(x). Their names are those of the modules around them; for nnx wrap the model
    in `curvax.flax_bridge.named_modules`.

    Args:
        objective: an `Objective` with a batch (with `microbatch=` in the memory of that many
            examples), or a `DatasetLoss`. Its `model` is traced, or its loss if it has no model.
        params: the point θ.
        mean_over: device axes to average over; `()` for the means of each device.

    Returns:
        `{"block_0/mlp/gelu": share}` in the order of the model, with scanned layers numbered.

    Raises:
        ValueError: the model has no such activation.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import curvax
        >>> loss = lambda w, batch: jnp.mean(jax.nn.relu(batch * w))
        >>> objective = curvax.Objective(loss, jnp.array([[1.0, 2.0, 3.0, -4.0]]))
        >>> shares = curvax.analysis.active_fraction(objective, jnp.ones(4))
        >>> {name: round(float(x), 3) for name, x in shares.items()}
        {'relu': 0.75}
    """
    return _mean_statistic(objective, params, "active_fraction", _share, mean_over)


def activation_norms(
    objective: Objective | DatasetLoss, params: Tree, *, mean_over: AxisNames = None
) -> dict[str, jax.Array]:
    """Computes the norm of the outputs of each activation function of a model.

        mean over examples of ‖a‖₂, over all units and positions

    Chen, Hsieh & Gong, arXiv:2106.01548, Table 3: SAM makes it larger, with and without weight
    decay.

    Args:
        objective: as in `active_fraction`.
        params: the point θ.
        mean_over: device axes to average over; `()` for the means of each device.

    Returns:
        `{"block_0/mlp/gelu": norm}` in the order of the model, with scanned layers numbered.

    Raises:
        ValueError: the model has no such activation.

    Examples:
        >>> import jax, jax.numpy as jnp, curvax
        >>> loss = lambda w, batch: jnp.mean(jax.nn.relu(batch * w))
        >>> objective = curvax.Objective(loss, jnp.array([[3.0, 4.0, -1.0]]))
        >>> norms = curvax.analysis.activation_norms(objective, jnp.ones(3))
        >>> {name: round(float(x), 3) for name, x in norms.items()}
        {'relu': 5.0}
    """
    return _mean_statistic(objective, params, "activation_norms", _norm, mean_over)


def attention_maps(objective: Objective, params: Tree) -> dict[str, jax.Array]:
    """Collects the attention weights of each example: every softmax over three axes or more.

    Chen, Hsieh & Gong, arXiv:2106.01548, section 4.4: after SAM they outline the object.

    Args:
        objective: an `Objective` with a batch and without micro-batches.
        params: the point θ.

    Returns:
        `{"block_0/attention": weights}`, for Flax's attention [n, heads, queries, keys], with rows
        that sum to 1; of the local examples inside pmap or shard_map.

    Raises:
        ValueError: the model has no attention.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import curvax
        >>> def loss(params, batch):
        ...     with jax.named_scope("attention"):
        ...         return jnp.mean(jax.nn.softmax(params["attention"] * batch) ** 2)
        >>> objective = curvax.Objective(loss, jnp.ones((2, 3, 5, 5)))
        >>> maps = curvax.analysis.attention_maps(objective, {"attention": jnp.ones(())})
        >>> {name: x.shape for name, x in maps.items()}
        {'attention': (2, 3, 5, 5)}
    """
    objective = _checked(objective, params, "attention_maps")
    return dict(_maps(objective, params))


def _norm(seen: Activation) -> jax.Array:
    a = trees.widen(seen.after)
    return jnp.mean(jnp.linalg.norm(a.reshape(len(a), -1), axis=1))


def _share(seen: Activation) -> jax.Array:
    return jnp.mean(seen.before > 0, dtype=jnp.result_type(float))


def _mean_statistic(
    objective: Objective | DatasetLoss,
    params: Tree,
    name: str,
    statistic: Statistic,
    mean_over: AxisNames,
) -> dict[str, jax.Array]:
    if not isinstance(objective, DatasetLoss):
        objective = _checked(objective, params, name)
    options = dict(name=name, statistic=statistic, mean_over=mean_over)
    return dict(evaluate_mean(_means, objective, params, **options))


def _means(
    objective: Objective, params: Tree, *, name: str, statistic: Statistic, mean_over: AxisNames
) -> OrderedDict[str, jax.Array]:
    over = checks.averaged_axes(mean_over, objective.local_axes(params), stage=name)

    def inside(part: Objective) -> OrderedDict[str, jax.Array]:
        seen = _activations(part, params, _is_unit, name)
        return OrderedDict((path, statistic(x)) for path, x in seen.items())

    return axes.mean(microbatch_mean(objective, inside), over, objective.batch_weight())


@compiled_once
def _maps(objective: Objective, params: Tree) -> OrderedDict[str, jax.Array]:
    seen = _activations(objective, params, _is_attention, "attention_maps")
    own = lambda path: path.rpartition("/")[0] or path
    return OrderedDict(
        (own(path), _by_example(x.after, objective.size)) for path, x in seen.items()
    )


def _by_example(x: jax.Array, n: int) -> jax.Array:
    """Removes leading axes of size one, which a vmap over one entry adds before the examples."""
    while x.shape[0] == 1 != n and x.ndim > 3:
        x = x[0]
    return x


def _activations(
    objective: Objective, params: Tree, wanted: Callable[[Name, Activation], bool], where: str
) -> dict[str, Activation]:
    """The activations that `wanted` selects, by paths that start like those of the parameters."""
    if objective.model is None:
        forward = lambda p: value_and_aux(objective, p)[0]
    else:
        forward = lambda p: objective.outputs(p)[0]
    found = intermediates(forward, params)
    kept = {name: x for name, x in found.items() if wanted(name, x)}
    if not kept:
        others = ", ".join(f"`{'/'.join(name)}`" for name in found) or "nothing"
        raise ValueError(
            f"`{where}` looks for activations of `jax.nn`, for x·σ(x), or for a softmax over three "
            f"axes or more, and found {others} in this model. Write them by `jax.nn`, outside of "
            "`while_loop` and `cond`."
        )
    tops = {trees.names(path)[0] for path, _ in jax.tree.leaves_with_path(params) if path}
    return {"/".join(_below_the_model(name, tops)): x for name, x in kept.items()}


def _below_the_model(name: Name, tops: set[Any]) -> Name:
    """A name without the scope of the model itself, which is absent from paths of parameters."""
    known = name[0] in tops or NUMBER.sub("", name[0]) in tops
    return name if known or len(name) == 1 else name[1:]


def _is_unit(name: Name, seen: Activation) -> bool:
    return not name[-1].startswith("softmax")


def _is_attention(name: Name, seen: Activation) -> bool:
    return name[-1].startswith("softmax") and seen.after.ndim >= 3


def _checked(objective: Objective | ValueFn, params: Tree, name: str) -> Objective:
    return require_batch(as_objective(objective, name, params), name)
