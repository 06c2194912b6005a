"""A linen train state whose transformation may evaluate the loss, with batch statistics."""

from collections.abc import Callable, Mapping
from typing import Any

import optax
from flax import struct
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

from curvax.objective import Objective, as_objective


class TrainState(train_state.TrainState, kw_only=True):
    """Flax's `TrainState`, for transformations that evaluate the loss elsewhere.

        def loss(params, batch, key):
            logits, new = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats}, batch["image"], train=True,
                mutable=["batch_stats"], rngs={"dropout": key})
            return cross_entropy(logits, batch["label"]), new["batch_stats"]

        objective = curvax.Objective(loss, batch, has_aux=True, key=key)
        (value, batch_stats), grads = objective.value_and_grad(state.params)
        state = state.apply_gradients(grads=grads, value_fn=objective, batch_stats=batch_stats)

    A subclass adds fields as in Flax. Where `params` is a module's variables with the collection
    `_overwrite_with_gradient`, which linen's fp8 layers keep their scales in, the transformation
    is given `params["params"]` and a loss of it alone. The perturbed passes see the scales of this
    step, and the new ones are those of `grads`, the clean pass.

    Attributes:
        batch_stats: linen's collection of that name; empty for a model without batch norm.
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
        """One step: `tx.update` with the loss at hand, then `step`, `params` and `opt_state`.

        The transformation is handed `value_fn`, `value` and, beside a `value_fn`, the gradient as
        `grad` (Optax's line searches look for it); one without extra arguments is handed none.

        Args:
            grads: gradients of the shape of `params`.
            value_fn: the loss as a function of the parameters, such as a `curvax.Objective`.
            value: the loss at `params`, where it is known.
            **changes: fields to replace, as `batch_stats=new_batch_stats`.

        Returns:
            The next state; this one is left as it was.
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
        """The loss of `params["params"]`, the collection that is overwritten held fixed."""
        kept = self.params[OVERWRITE_WITH_GRADIENT]
        objective = as_objective(value_fn, "TrainState.apply_gradients")
        inner = objective.through(lambda params: {"params": params, OVERWRITE_WITH_GRADIENT: kept})
        own = self.params["params"], grads["params"]
        return inner._inherit_gradients(objective, (self.params, grads), own)
