"""A linen train state for transformations that evaluate the loss, with batch statistics."""

from collections.abc import Callable, Mapping
from typing import Any

import optax
from flax import struct
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

from curvax.objective import Objective, as_objective


class TrainState(train_state.TrainState, kw_only=True):
    """Flax's `TrainState`, for transformations that evaluate the loss.

        def loss(params, batch, key):
            logits, new = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats}, batch["image"], train=True,
                mutable=["batch_stats"], rngs={"dropout": key})
            return cross_entropy(logits, batch["label"]), new["batch_stats"]

        objective = curvax.Objective(loss, batch, has_aux=True, key=key)
        (value, batch_stats), grads = objective.value_and_grad(state.params)
        state = state.apply_gradients(grads=grads, value_fn=objective, batch_stats=batch_stats)

    Subclasses add fields as in Flax. With linen's fp8 layers, whose variables have a collection
    `_overwrite_with_gradient`, `params` is the dictionary of both collections; the transformation
    then receives `params["params"]` and a loss of them. Perturbed passes use the scales of the
    current step; the new scales are those of `grads`.

    Attributes:
        batch_stats: linen's collection of that name; empty for a model without batch norm.

    Examples:
        >>> import jax.numpy as jnp, optax, curvax
        >>> predict = lambda params, x: x @ params["w"]
        >>> tx, params = curvax.sam(optax.sgd(0.1), rho=0.1), {"w": jnp.zeros(1)}
        >>> state = curvax.TrainState.create(apply_fn=predict, params=params, tx=tx)
        >>> loss = lambda params, x: jnp.mean((state.apply_fn(params, x) - 1.0) ** 2)
        >>> objective = curvax.Objective(loss, jnp.ones((4, 1)))
        >>> value, grads = objective.value_and_grad(state.params)
        >>> state = state.apply_gradients(grads=grads, value_fn=objective)
        >>> int(state.step), round(float(state.params["w"][0]), 3)
        (1, 0.22)
    """

    batch_stats: Mapping[str, Any] = struct.field(default_factory=dict)

    def apply_gradients(
        self,
        *,
        grads: Any,
        value_fn: Callable[..., Any] | None = None,
        value: Any = None,
        **changes: Any,
    ) -> "TrainState":
        """Takes one step: `tx.update` with the loss, then new `step`, `params` and `opt_state`.

        The transformation receives `value_fn`, `value` and, next to a `value_fn`, the gradient as
        `grad`, which Optax's line searches use. A transformation without extra arguments receives
        none of them.

        Args:
            grads: gradients, a tree like `params`.
            value_fn: the loss as a function of the parameters, such as a `curvax.Objective`.
            value: the loss at `params`, where it is known.
            **changes: fields to replace, as in `batch_stats=new_batch_stats`.

        Returns:
            The next state; this one is unchanged.
        """
        forward = optax.with_extra_args_support(self.tx).update
        extra = {} if value is None else {"value": value}

        def update(updates: Any, state: Any, params: Any) -> Any:
            if value_fn is None:
                return forward(updates, state, params, **extra)
            loss = value_fn if params is self.params else self._of_params(value_fn, grads)
            return forward(updates, state, params, **extra, value_fn=loss, grad=updates)

        bound = self.replace(tx=optax.GradientTransformation(self.tx.init, update))
        stepped = super(TrainState, bound).apply_gradients(grads=grads, **changes)
        return stepped.replace(tx=self.tx)

    def _of_params(self, value_fn: Callable[..., Any], grads: Any) -> Objective:
        """The loss of `params["params"]`, with the overwritten collection fixed."""
        kept = self.params[OVERWRITE_WITH_GRADIENT]
        objective = as_objective(value_fn, "TrainState.apply_gradients")
        inner = objective.through(lambda params: {"params": params, OVERWRITE_WITH_GRADIENT: kept})
        own = self.params["params"], grads["params"]
        inner.gradients.inherit(objective.gradients, (self.params, grads), own)
        return inner
