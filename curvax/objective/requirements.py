"""An objective that can do what is asked of it, or an error that shows the one to pass."""

from collections.abc import Callable
from typing import Any

from curvax import checks
from curvax.arithmetic.trees import Tree
from curvax.likelihoods import Likelihood
from curvax.objective.objective import Objective


def as_objective(value_fn: Callable[..., Any] | None, stage: str, params: Tree = ()) -> Objective:
    """The `value_fn` of an update as an objective.

    Raises:
        ValueError: there is none, or there are no parameters to evaluate it at.
    """
    if params is None:
        raise ValueError(
            f"`{stage}` evaluates the loss at the parameters, and got none. Pass them as the third "
            "argument: `tx.update(grads, state, params, value_fn=objective)`."
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
            f"`{stage}` evaluates the loss, and `value_fn` is no function but a "
            f"{type(value_fn).__name__}. Pass the loss as a function of the parameters, or "
            "`curvax.Objective(loss, batch)`; its value at the parameters is `value=`."
        )
    checks.refuse_complex(params, stage)
    return value_fn if isinstance(value_fn, Objective) else Objective(value_fn)


def require_batch(objective: Objective, stage: str) -> Objective:
    """The objective, if it can see its examples.

    Raises:
        ValueError: it was made from a callable of the parameters alone.
    """
    if objective.batch is None:
        raise ValueError(
            f"`{stage}` reads the batch behind the loss, and `value_fn` is a callable of the "
            "parameters alone. Pass `value_fn=curvax.Objective(loss, batch)` with "
            "`loss(params, batch) -> scalar`."
        )
    return objective


def require_model(objective: Objective, what: str) -> Objective:
    """The objective, if it sees the model and the loss of its outputs apart.

    Raises:
        ValueError: it does not.
    """
    if objective.model is None:
        raise ValueError(
            f"{what} sees the model and the loss of its outputs apart, and was given "
            f"{'a loss of the parameters' if objective.batch is None else 'both in one'}. Pass "
            "`curvax.Objective(loss, batch, model=predict)` with `predict(params, batch) -> "
            "outputs` and `loss(outputs, batch) -> scalar`, or a likelihood such as "
            '`curvax.categorical("label")` as the loss.'
        )
    return objective


def require_likelihood(objective: Objective, what: str) -> Likelihood:
    """The likelihood that is the objective's loss.

    Raises:
        ValueError: the loss is another callable.
    """
    loss = require_model(objective, what).loss
    if not isinstance(loss, Likelihood):
        raise ValueError(
            f"{what} is an expectation over labels drawn from the model, and the loss is a "
            "callable that does not say how labels are distributed. Pass `curvax.categorical`, "
            "`bernoulli`, `gaussian` or `poisson` as the loss of the `Objective`; or take "
            "`ggnvp`, which serves any convex loss, or `empirical_fvp`, which takes the labels "
            "of the batch."
        )
    return loss
