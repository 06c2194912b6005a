"""Checks that an objective has what a stage needs, with errors that show the one to pass."""

from collections.abc import Callable
from typing import Any

from curvax import checks
from curvax.arithmetic.trees import Tree
from curvax.likelihoods import Likelihood
from curvax.objective.objective import Objective


def as_objective(value_fn: Callable[..., Any] | None, stage: str, params: Tree = ()) -> Objective:
    """Converts the `value_fn` of an update to an `Objective`.

    Args:
        value_fn: an `Objective`, or a callable `params -> scalar`.
        stage: the name of the stage, for errors.
        params: the parameters of the update.

    Raises:
        ValueError: `value_fn` or `params` is None.
        TypeError: `value_fn` is not callable, or a parameter is complex.
    """
    if params is None:
        raise ValueError(
            f"`{stage}` evaluates the loss at the parameters, and `params` is None. Pass them as "
            "the third argument: `tx.update(grads, state, params, value_fn=objective)`."
        )
    if value_fn is None:
        raise ValueError(
            f"`{stage}` evaluates the loss, and no `value_fn` reached it. Pass it to the update: "
            "`tx.update(grads, state, params, value_fn=objective)`. If you did, something between "
            "dropped it. Flax's own `TrainState.apply_gradients` does: `curvax.TrainState` takes "
            "`apply_gradients(grads=grads, value_fn=objective)`. So do the train steps of axlearn, "
            "Kauldron and EasyLM, which call `tx.update(grads, state, params)`: pass it there by "
            "hand. So do `optax.lookahead`, `optax.flatten` (of some versions) and plain "
            "`optax.GradientTransformation(init, update)`s around the stages: put them behind "
            "these."
        )
    if not callable(value_fn):
        raise TypeError(
            f"`{stage}` evaluates the loss, and `value_fn` is not a function but a "
            f"{type(value_fn).__name__}. Pass the loss as a function of the parameters, or "
            "`curvax.Objective(loss, batch)`; the value of the loss is passed as `value=`."
        )
    checks.refuse_complex(params, stage)
    return value_fn if isinstance(value_fn, Objective) else Objective(value_fn)


def require_batch(objective: Objective, stage: str) -> Objective:
    """Returns the objective if it has a batch.

    Raises:
        ValueError: it was built from a callable of the parameters alone.
    """
    if objective.batch is None:
        raise ValueError(
            f"`{stage}` reads the batch behind the loss, and `value_fn` is a callable of the "
            "parameters alone. Pass `value_fn=curvax.Objective(loss, batch)` with "
            "`loss(params, batch) -> scalar`."
        )
    return objective


def require_model(objective: Objective, what: str) -> Objective:
    """Returns the objective if it has a model and a loss of the model's outputs.

    Raises:
        ValueError: it was built without `model=`.
    """
    if objective.model is None:
        raise ValueError(
            f"{what} needs the model and the loss of its outputs as two functions, and received "
            f"{'a loss of the parameters' if objective.batch is None else 'one for both'}. Pass "
            "`curvax.Objective(loss, batch, model=predict)` with `predict(params, batch) -> "
            "outputs` and `loss(outputs, batch) -> scalar`, or a likelihood such as "
            '`curvax.categorical("label")` as the loss.'
        )
    return objective


def require_likelihood(objective: Objective, what: str) -> Likelihood:
    """Returns the objective's loss if it is a likelihood.

    Raises:
        ValueError: the loss is any other callable, or there is no model.
    """
    loss = require_model(objective, what).loss
    if not isinstance(loss, Likelihood):
        raise ValueError(
            f"{what} is an expectation over labels drawn from the model, and the loss is a "
            "callable that does not define a distribution of labels. Pass `curvax.categorical`, "
            "`bernoulli`, `gaussian` or `poisson` as the loss of the `Objective`; or use "
            "`ggnvp`, which takes any convex loss, or `empirical_fvp`, which takes the labels "
            "of the batch."
        )
    return loss


def first_part(objective: Objective, fraction: float, name: str) -> Objective:
    """The loss on the first `fraction` of the batch; itself if that is 1.

    Raises:
        ValueError: the objective has no batch, or micro-batches do not divide the part.
    """
    if fraction == 1:
        return objective
    return require_batch(objective, f"{name}(fraction=)").first(fraction)
