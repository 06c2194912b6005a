"""A loss that holds the model to its own earlier outputs: sharpness at the price of one gradient.

L(θ) + λ τ² KL(softmax(z_old / τ) ‖ softmax(z / τ)),   z_old the outputs of some visits before
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import ScalarOrSchedule, ValueFn
from curvax.devices import axes, meshes
from curvax.devices.axes import AxisNames
from curvax.hyperparameters import injectable
from curvax.likelihoods import Likelihood, batch_entries
from curvax.objective import Objective, as_objective, pieces, require_model, value_aux_and_grad
from curvax.pipes import order
from curvax.pipes.diagnostics import Flags, Metrics, StageMetrics, metrics_of, no_metrics
from curvax.pipes.signal import Signal, Stage, at, stage


class TrajectoryState(NamedTuple):
    step: jax.Array
    """t, int32 scalar."""
    visits: jax.Array
    """How often each example was seen, int32 [N]."""
    outputs: jax.Array
    """The outputs of the last visits of each example, [lag, N, *shape] in the default float."""
    measured: Flags
    figures: Metrics
    """`trajectory_kl`, the mean divergence at temperature τ, without λ τ²."""


class _Remembered(NamedTuple):
    """A batch and what is remembered of its n examples."""

    batch: Tree
    outputs: jax.Array
    """z_old, [n, *shape]."""
    known: jax.Array
    """Whether they were seen often enough, bool [n]."""


@injectable
def trajectory_loss(
    size: int,
    shape: int | tuple[int, ...],
    *,
    strength: ScalarOrSchedule = 10.0,
    temperature: ScalarOrSchedule = 2.0,
    lag: int = 5,
    index: Any = "index",
    sync_over: AxisNames = None,
) -> Stage:
    """Replaces the gradient by that of a loss that penalises the change of the outputs over epochs.

        L(θ) + λ τ² KL(softmax(z_old / τ) ‖ softmax(z / τ))

    z are the logits of an example and z_old those of its `lag`-th visit before. Sharp minima are
    reached by fast falls of the loss along the trajectory of training, which this divergence
    penalises. Du et al., Sharpness-Aware Training for Free (SAF), arXiv:2205.14083, with the factor
    τ² of the authors' code. A step costs one gradient, that of the given gradient being
    removed by the compiler if nothing else needs it, and the memory of `lag` · N outputs.

    Args:
        size: N, number of training examples.
        shape: shape of the outputs of one example, such as the number of classes, which are on the
            last axis.
        strength: λ >= 0, a number or a schedule of steps; 0 gives the gradient of L.
        temperature: τ > 0, a number or a schedule.
        lag: number of visits of an example, of epochs if each has every example once, between z_old
            and z. The first `lag` visits of an example have no divergence.
        index: key of the batch, or callable `batch -> array`, for the numbers of the examples in
            the training set, integers [n] from 0 to N - 1. A number outside gives NaN.
        sync_over: device axes whose devices tell each other the outputs of their examples, so that
            all remember all; `()` if an example is always on the same device, whose state is then
            its own.

    Returns:
        A stage that needs an `Objective` with a model that returns logits. It sets `updates`, and
        `aux` to that of its own pass; `gradient` and `value` stay those of L. Outputs that are not
        finite are not remembered. Its metric is `trajectory_kl`, the mean divergence.

    Raises:
        ValueError, TypeError: an option is out of range; in `update`, the objective has no model,
            the outputs or the numbers have another shape, the stage is inside `per_group`, or the
            batch is divided among devices and `sync_over` is missing.

    Examples:
        >>> import jax.numpy as jnp, optax, curvax
        >>> tx = curvax.trajectory_loss(4, 2, lag=1, strength=1.0) | optax.sgd(1.0)
        >>> batch = {"x": jnp.eye(4), "label": jnp.array([0, 1, 0, 1]), "index": jnp.arange(4)}
        >>> predict = lambda w, batch: batch["x"] @ w
        >>> objective = curvax.Objective(curvax.categorical("label"), batch, model=predict)
        >>> w = jnp.zeros((4, 2))
        >>> state = tx.init(w)
        >>> for _ in range(2):
        ...     _, grads = objective.value_and_grad(w)
        ...     updates, state = tx.update(grads, state, w, value_fn=objective)
        ...     w = w + updates
        >>> round(float(curvax.diagnostics(state)["trajectory_kl"]), 4)
        0.002
    """
    of_one = (shape,) if isinstance(shape, int) else tuple(shape)
    _check_options(size, of_one, strength, temperature, lag, index)

    def init(params: Tree) -> TrajectoryState:
        trees.require_floating(params, "trajectory_loss")
        step, visits = jnp.zeros((), jnp.int32), jnp.zeros(size, jnp.int32)
        outputs = jnp.zeros((lag, size, *of_one))
        return TrajectoryState(step, visits, outputs, *no_metrics("trajectory_kl"))

    def rule(
        signal: Signal,
        state: TrajectoryState,
        params: Tree,
        *,
        value_fn: ValueFn | None = None,
        **extra: Any,
    ) -> tuple[Signal, TrajectoryState]:
        del extra
        objective, local = _checked(signal, value_fn, params)
        over = checks.averaged_axes(sync_over, local, stage="trajectory_loss", option="sync_over")
        numbers = meshes.gathered(_numbers(index, objective))
        factor, tau = at(strength, state.step), at(temperature, state.step)
        remembered = _recalled(state, numbers, objective.batch)
        own = _with_divergence(objective, remembered, factor, tau, of_one)
        (_, (aux, outputs)), gradient = value_aux_and_grad(own, params)
        outputs = meshes.gathered(jax.lax.stop_gradient(outputs))
        metrics = _metrics(remembered, outputs, tau, local)
        kept = _written(state, _everywhere(numbers, over), _everywhere(outputs, over))
        updates = trees.cast_like(gradient, signal.updates)
        new = kept._replace(step=state.step + 1, **metrics._asdict())
        return signal._replace(updates=updates, aux=aux, local=local), new

    return stage(init, rule, replaces_gradient=True)


def _check_options(
    size: int, shape: tuple[int, ...], strength: Any, temperature: Any, lag: int, index: Any
) -> None:
    counts = {f"shape[{i}]": n for i, n in enumerate(shape)}
    checks.check_count("trajectory_loss", size=size, lag=lag, **counts)
    checks.check_range("strength", strength, 0, jnp.inf, stage="trajectory_loss")
    checks.check_range("temperature", temperature, 0, jnp.inf, stage="trajectory_loss")
    if isinstance(temperature, int | float) and temperature == 0:
        raise ValueError(
            "`trajectory_loss(temperature=)` divides the logits, and is 0. Give a positive one; at "
            "1 the divergence is that of the predictions."
        )
    batch_entries.check_entry(index, "`trajectory_loss(index=)`")


def _checked(
    signal: Signal, value_fn: ValueFn | None, params: Tree
) -> tuple[Objective, frozenset[str]]:
    """(the objective of an update, its local axes)

    Raises:
        ValueError, TypeError: it has no model, is the loss of a group, or the updates are not its
            gradient.
    """
    objective = as_objective(value_fn, "trajectory_loss", params)
    if objective.grouped:
        raise ValueError(
            "`trajectory_loss` remembers the outputs of all examples, and inside `per_group` it "
            "sees those of one group. Put it behind: `trajectory_loss(...) | adamw(1e-3)`."
        )
    local = order.local_axes_of_gradient(signal, objective, params, "trajectory_loss")
    return require_model(objective, "`trajectory_loss`"), local


def _metrics(
    remembered: _Remembered, outputs: jax.Array, temperature: Any, local: frozenset[str]
) -> StageMetrics:
    alone = meshes.gathered(remembered._replace(batch=()))
    divergence = _divergence(alone, outputs, temperature).mean()
    over = tuple(axis for axis in axes.manual() if axis in local)
    return metrics_of({"trajectory_kl": divergence}, over)


def _numbers(index: Any, objective: Objective) -> jax.Array:
    """The numbers of the examples of a batch, [n].

    Raises:
        TypeError, ValueError: they are no integers, or not one for each example.
    """
    numbers = batch_entries.read(index, objective.batch, "`trajectory_loss(index=)`")
    if not jnp.issubdtype(numbers.dtype, jnp.integer) or numbers.shape != (objective.size,):
        raise ValueError(
            f"`trajectory_loss(index={index!r})` names the numbers of the examples in the training "
            f"set, integers [{objective.size}] here, and they are {numbers.dtype} "
            f"{list(numbers.shape)}. Put `np.arange(size)[rows]` of the rows of the batch there."
        )
    return numbers


def _recalled(state: TrajectoryState, numbers: jax.Array, batch: Tree) -> _Remembered:
    """The outputs of the oldest visit in the memory; NaN for numbers that do not exist."""
    lag, size = state.outputs.shape[:2]
    inside = (numbers >= 0) & (numbers < size)
    rows = jnp.where(inside, numbers, 0)
    old = state.outputs[state.visits[rows] % lag, rows]
    old = jnp.where(batch_entries.with_axes(inside, old.ndim), old, jnp.nan)
    known = (state.visits[rows] >= lag) | ~inside
    split = meshes.leading(batch)
    return _Remembered(batch, meshes.laid_out(old, split), meshes.laid_out(known, split))


def _written(state: TrajectoryState, numbers: jax.Array, outputs: jax.Array) -> TrajectoryState:
    """The memory with these outputs in place of the oldest, where they are finite."""
    lag, size = state.outputs.shape[:2]
    finite = jnp.isfinite(outputs).reshape(len(numbers), -1).all(axis=1)
    rows = jnp.where(finite & (numbers >= 0), numbers, size)  # those outside are dropped
    slots = state.visits.at[rows].get(mode="fill", fill_value=0) % lag
    new = outputs.astype(state.outputs.dtype)
    return state._replace(
        visits=state.visits.at[rows].add(1, mode="drop"),
        outputs=state.outputs.at[slots, rows].set(new, mode="drop"),
    )


def _with_divergence(
    objective: Objective,
    remembered: _Remembered,
    strength: Any,
    temperature: Any,
    shape: tuple[int, ...],
) -> Objective:
    """L(θ) plus the divergence; its aux is (that of L, outputs)."""
    model, loss, has_aux = objective.model, objective.loss, objective.has_aux

    def outputs_of(params: Tree, given: _Remembered, *keys: jax.Array) -> tuple[jax.Array, Any]:
        assert model is not None
        found = model(params, given.batch, *keys)
        outputs, aux = found if has_aux else (found, None)
        _refuse_unlike(outputs, given.outputs, shape)
        return outputs, (aux, outputs)

    def penalised(outputs: jax.Array, given: _Remembered) -> jax.Array:
        divergence = _divergence(given, outputs, temperature)
        if isinstance(loss, Likelihood):
            w = loss.site_weights(outputs, given.batch)[..., 0]
            mean = jnp.sum(jnp.where(w == 0, 0, w * divergence))
        else:
            mean = divergence.mean()
        return loss(outputs, given.batch) + strength * temperature**2 * mean

    return pieces.changed(
        objective, loss=penalised, model=outputs_of, batch=remembered, has_aux=True,
        weight=_weight_of(objective), reduce_aux=_reductions_of(objective),
    )  # fmt: skip


def _weight_of(objective: Objective) -> Any:
    """The weight of a remembered batch, that of its batch."""
    loss, weight = objective.loss, objective.weight
    if isinstance(loss, Likelihood) and loss.weighted:
        return lambda given: loss.total_weight(given.batch)
    if weight is None:
        return None
    read = (lambda batch: jnp.sum(batch[weight])) if isinstance(weight, str) else weight
    return lambda given: read(given.batch)


def _reductions_of(objective: Objective) -> Any:
    """How the aux (that of the objective, outputs) is joined over parts of the batch."""
    named: Any = objective.reduce_aux
    if callable(named):
        return lambda path: named(path[1:]) if str(path[0]) == "0" else "concat"
    return None if named is None else (named, "concat")


def _divergence(given: _Remembered, outputs: jax.Array, temperature: Any) -> jax.Array:
    """KL(softmax(z_old / τ) ‖ softmax(z / τ)) at each site, 0 for examples not seen before."""
    # Outputs that do not count are replaced before, so that NaNs in them do not reach a gradient.
    known = batch_entries.with_axes(given.known, outputs.ndim)
    old, new = (jnp.where(known, trees.widen(z), 0) for z in (given.outputs, outputs))
    log_old, log_new = (jax.nn.log_softmax(z / temperature) for z in (old, new))
    return jnp.sum(jnp.exp(log_old) * (log_old - log_new), axis=-1)


def _everywhere(x: jax.Array, over: tuple[str, ...]) -> jax.Array:
    """The rows of all devices along these axes, the same on each."""
    if not over:
        return x
    here, count = axes.index_and_size(over)
    whole = jnp.zeros((count, *x.shape), x.dtype).at[here].set(x)
    return axes.total(whole, over).reshape(-1, *x.shape[1:])


def _refuse_unlike(outputs: Any, old: jax.Array, shape: tuple[int, ...]) -> None:
    found = jnp.shape(outputs)
    if not trees.is_leaf(outputs) or found[1:] != shape or found[0] != len(old):
        raise ValueError(
            f"`trajectory_loss(size, shape)` remembers outputs of the shape {list(shape)} of each "
            f"example, and the model gives {list(found)} for {len(old)} examples. Pass the shape "
            "of the logits of one example, such as the number of classes."
        )
