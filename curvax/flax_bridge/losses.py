"""An nnx module and a loss of it ↦ a pure loss of its parameters."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from curvax import compat

PureLoss = Callable[..., tuple[Any, Any]]
Place = tuple[Any, ...]
"""The path of a variable: names and numbers."""


def nnx_loss(
    model: nnx.Module,
    fn: Callable[..., Any],
    *,
    wrt: Any = nnx.Param,
    has_aux: bool = False,
    rngs: nnx.Rngs | None = None,
) -> tuple[PureLoss, nnx.State]:
    """Splits an nnx module into its parameters and a pure loss of them.

    Every evaluation starts from the module's current state (batch statistics, dropout counters), so
    that both passes of SAM draw the same dropout masks. The new state of an evaluation is returned;
    it takes effect when it is written back:

        loss, params = nnx_loss(model, cross_entropy)
        objective = curvax.Objective(loss, batch, has_aux=True)
        (value, state), grads = objective.value_and_grad(params)
        optimizer.update(model, grads, value_fn=objective, value=value)
        nnx.update(model, state)

    The aux of the objective is `state`; `(aux, state)` with `has_aux`; `(state, streams)` with
    `rngs`; `(aux, state, streams)` with both:

        loss, params = nnx_loss(model, loss_fn, has_aux=True, rngs=rngs)
        objective = curvax.Objective(loss, batch, has_aux=True)
        (value, (logits, state, streams)), grads = objective.value_and_grad(params)
        optimizer.update(model, grads, value_fn=objective, value=value)
        nnx.update(model, state)
        nnx.update(rngs, streams)

    It belongs in the training step, before the first evaluation: later changes of the module are
    not seen.

    Args:
        model: the module, which is not changed.
        fn: `fn(model, batch) -> scalar`, a mean over the batch; or `-> outputs`, if the result is
            to be the `model=` of an `Objective`. It receives a copy of the module, which it may
            change. With `rngs` it is called as `fn(model, batch, rngs)`, or with `rngs` at the
            place of a parameter of that name.
        wrt: filter of the parameters, the same as the optimiser's. If the optimiser's filter is
            narrower, all other parameters are held fixed.
        has_aux: whether `fn` returns `(scalar or outputs, aux)`.
        rngs: random streams of `fn`, which are not changed: every evaluation draws the same
            numbers. Without it, `Objective(key=)` passes `fn` an `nnx.Rngs` of its key.

    Returns:
        The loss, and the parameters as an `nnx.State` with the optimiser's structure. The loss is
        `loss(params, batch) -> (result of fn, state)`, or `loss(params, batch, key)` with
        `Objective(key=)`, where the key is folded into every random stream, so that groups and
        micro-batches have their own dropout masks. `state` is everything in the module except the
        parameters and the keys of random streams (whose counters change, not the keys), as plain
        arrays; variables that the loss creates are `nnx.Variable`s. `streams` are the counters of
        `rngs`.

    Raises:
        TypeError: `rngs` is not an `nnx.Rngs`; in a call, the parameters are a module, `has_aux`
            does not match the result of `fn`, or `fn` needs `rngs` and receives none.
        ValueError: in a call, the parameters are not those of this module, or the loss creates
            parameters or removes variables.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> from flax import nnx
        >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
        >>> loss, params = curvax.nnx_loss(model, lambda model, batch: jnp.mean(model(batch) ** 2))
        >>> objective = curvax.Objective(loss, jnp.ones((4, 3)), has_aux=True)
        >>> (value, state), grads = objective.value_and_grad(params)
        >>> grads["kernel"][...].shape
        (3, 1)
    """
    graphdef, params, *others = nnx.split(model, wrt, nnx.RngKey, ...)
    streams, rest = compat.as_pure(others)
    known = _paths(others[1])
    draws = _Draws(fn, rngs)
    # New Variables: those of the split are shared with the module and would change with it.
    params = jax.tree.map(lambda x: x, params)

    def loss(given: Any, batch: Any, key: jax.Array | None = None) -> tuple[Any, Any]:
        live = nnx.merge(
            graphdef, _completed(params, given), _folded(key, streams), rest, copy=True
        )
        found, *counts = draws.call(live, batch, key)
        after, _, state = nnx.state(live, wrt, nnx.RngKey, ...)
        _refuse_changed_structure(_paths(params), known, _paths(after), _paths(state))
        state = _written_back(known, state)
        value, aux = _pair(found) if has_aux else (_no_pair(found), None)
        extra = (*([aux] if has_aux else []), state, *counts)
        return value, extra if len(extra) > 1 else state

    return loss, params


class _Draws:
    """A loss of a module, with or without random streams."""

    def __init__(self, fn: Callable[..., Any], rngs: nnx.Rngs | None):
        if rngs is not None and not isinstance(rngs, (nnx.Rngs, nnx.RngStream)):
            raise TypeError(
                f"`nnx_loss(rngs=)` takes an `nnx.Rngs`, with which the loss is called, and got "
                f"{type(rngs).__name__}. Pass a key to `Objective(loss, batch, key=key)` instead."
            )
        self.fn, self.place = fn, _place_of_rngs(fn, rngs is not None)
        self.split = None if rngs is None else nnx.split(rngs, nnx.RngKey, ...)

    def call(self, live: nnx.Module, batch: Any, key: jax.Array | None) -> tuple[Any, ...]:
        """(the result of fn, and the counters of its streams afterwards if there are any)."""
        if self.place is None:
            return (self.fn(live, batch),)
        if self.split is not None:
            graphdef, *states = self.split
            streams, counts = compat.as_pure(states)
            rngs = nnx.merge(graphdef, _folded(key, streams), counts, copy=True)
        elif key is not None:
            rngs = nnx.Rngs(key)
        else:
            raise TypeError(
                "The loss given to `nnx_loss` takes `rngs`, and received none. Pass them, "
                "`nnx_loss(model, loss_fn, rngs=rngs)`, or a key to the "
                "`curvax.Objective(loss, batch, has_aux=True, key=key)`."
            )
        args = [live, batch]
        args.insert(self.place, rngs)
        found = self.fn(*args)
        if self.split is None:
            return (found,)
        return found, compat.as_pure(nnx.state(rngs, nnx.RngKey, ...)[-1])


def _place_of_rngs(fn: Callable[..., Any], given: bool) -> int | None:
    """The position of the random streams among the parameters of a loss; None if it takes none."""
    try:
        found = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # a callable without a signature
        found = []
    names = [p.name for p in found[:3]]
    if "rngs" in names and found[names.index("rngs")].default in (inspect.Parameter.empty, None):
        return names.index("rngs") if given or _required(found[names.index("rngs")]) else None
    return 2 if given or (len(found) > 2 and _required(found[2])) else None


def _required(parameter: inspect.Parameter) -> bool:
    positional = (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    return parameter.kind in positional and parameter.default is parameter.empty


def _folded(key: jax.Array | None, streams: nnx.State) -> nnx.State:
    """The keys of random streams with `key` folded into each."""
    return streams if key is None else jax.tree.map(partial(_fold, key), streams)


def _fold(key: jax.Array, stream: jax.Array) -> jax.Array:
    """The key of a stream, or the keys of stacked layers, with `key` folded in."""
    fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    return fold(stream.reshape(-1), jax.random.bits(key)).reshape(stream.shape)


def _completed(whole: nnx.State, given: Any) -> Any:
    """The given parameters, completed by those of the module."""
    if isinstance(given, nnx.Module):
        raise TypeError(
            "The loss of `nnx_loss` received the module in place of its parameters. Write "
            "`loss, params = nnx_loss(model, fn)`, then `objective.value_and_grad(params)`."
        )
    # Compared as arrays, since a variable may hold a tree.
    trees = (compat.as_pure(nnx.State(tree)) for tree in (whole, given))
    known, found = (dict(nnx.to_flat_state(tree)) for tree in trees)
    if set(known) == set(found):
        return given
    if strange := [path for path in found if path not in known]:
        label = "/".join(map(str, strange[0]))
        raise ValueError(
            f"The loss of `nnx_loss` received a parameter `{label}` that is not one of its own: "
            f"{['/'.join(map(str, path)) for path in known]}. Give `nnx_loss` and "
            "`nnx.Optimizer` the same filter, as in `nnx_loss(model, fn, wrt=nnx.LoRAParam)`."
        )
    return nnx.from_flat_state({**known, **found})


def _written_back(known: set[Place], after: nnx.State) -> nnx.State:
    """The new state: plain arrays, which `nnx.update` writes to existing variables, and Variables
    for those that the loss created.
    """
    leaves = nnx.to_flat_state(after)
    if all(path in known for path, _ in leaves):
        return compat.as_pure(after)
    return nnx.from_flat_state(
        {path: compat.as_pure(x) if path in known else x for path, x in leaves}
    )


def _paths(state: nnx.State) -> set[Place]:
    """The paths of a state's variables, whose values may be trees."""
    return {path for path, _ in nnx.to_flat_state(state)}


def _refuse_changed_structure(
    params: set[Place], rest: set[Place], params_after: set[Place], rest_after: set[Place]
) -> None:
    if born := params_after - params:
        raise ValueError(
            f"The loss created the parameter `{_label(born)}`, which no optimiser knows. Create it "
            "earlier: build the layers in `__init__`, or call the model once."
        )
    if gone := rest - rest_after:
        raise ValueError(
            f"The loss removed the variable `{_label(gone)}` of the module, which "
            "`nnx.update(model, state)` cannot do. Remove it before the step: "
            "`nnx.pop(model, nnx.Intermediate)` before `nnx_loss(model, fn)`."
        )


def _label(places: set[Place]) -> str:
    return "/".join(map(str, min(places, key=str)))


def _pair(found: Any) -> tuple[Any, Any]:
    if not (isinstance(found, tuple) and len(found) == 2):
        raise TypeError(
            "`nnx_loss(has_aux=True)` expects the loss to return a pair whose second part is the "
            f"aux, and got {type(found).__name__}. Return `(value, aux)` or drop `has_aux`."
        )
    return found


def _no_pair(found: Any) -> Any:
    """The outputs, which may be a tuple, but not a pair that begins with a scalar: that is a loss
    and its aux.
    """
    if isinstance(found, tuple) and found and jnp.shape(found[0]) == () and len(found) == 2:
        raise TypeError(
            "The loss given to `nnx_loss` returned a pair that begins with a scalar. A loss that "
            "returns `(value, aux)` is passed as `nnx_loss(model, loss_fn, has_aux=True)`; the aux "
            "of the `Objective` is then `(aux, state)`."
        )
    return found
