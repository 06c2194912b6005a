"""An nnx module and a loss of it ↦ a loss of parameters, free of side effects."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from curvax import compat

Loss = Callable[..., tuple[Any, Any]]
Place = tuple[Any, ...]
"""The names and numbers that lead to a variable."""


def nnx_loss(
    model: nnx.Module,
    fn: Callable[..., Any],
    *,
    wrt: Any = nnx.Param,
    has_aux: bool = False,
    rngs: nnx.Rngs | None = None,
) -> tuple[Loss, nnx.State]:
    """Splits a module into its parameters and a pure loss of them.

    Every evaluation starts from the state that the module has now (batch statistics, dropout
    counters), so both passes of SAM draw the same dropout masks, and from that state alone does
    the new one follow: it is handed back and advances once, when it is written back.

        loss, params = nnx_loss(model, cross_entropy)
        objective = curvax.Objective(loss, batch, has_aux=True)
        (value, state), grads = objective.value_and_grad(params)
        optimizer.update(model, grads, value_fn=objective, value=value)
        nnx.update(model, state)

    What else there is comes with the state, in this order: `(logits, state)` with `has_aux`,
    `(state, streams)` with `rngs`, `(logits, state, streams)` with both.

        loss, params = nnx_loss(model, loss_fn, has_aux=True, rngs=rngs)
        objective = curvax.Objective(loss, batch, has_aux=True)
        (value, (logits, state, streams)), grads = objective.value_and_grad(params)
        optimizer.update(model, grads, value_fn=objective, value=value)
        nnx.update(model, state)
        nnx.update(rngs, streams)

    Call it in the step, before the first evaluation: a module changed later is not seen.

    Args:
        model: the module, which is not changed.
        fn: `fn(model, batch) -> scalar`, a mean over the batch; or `-> outputs`, where the result
            is to be the `model=` of an `Objective`. It may change the model it is given, a copy,
            and sow into it. With `rngs` it is called as `fn(model, batch, rngs)`, or with `rngs`
            where its signature has a parameter of that name.
        wrt: filter for the parameters; the same as the optimiser's. Where that one's is narrower,
            the loss is one of its parameters, all others held fixed.
        has_aux: `fn` returns `(scalar or outputs, aux)`.
        rngs: the random streams that `fn` takes, which are not changed: every evaluation draws
            what comes next in them. Without, `Objective(key=)` gives `fn` an `nnx.Rngs` of its key.

    Returns:
        `loss(params, batch) -> (what fn returns, state)` and the parameters, an `nnx.State` with
        the optimiser's structure. `state` is all of the module but the parameters and the keys of
        its random streams (these never change, their counters do), as plain arrays; variables that
        the loss created are `nnx.Variable`s. `streams` are the counters of `rngs`.
        With `Objective(..., key=)` it is called as `loss(params, batch, key)`, and the key is
        folded into every random stream, so that groups and micro-batches have masks of their own.

    Raises:
        TypeError: `rngs` is no `nnx.Rngs`; when called, it is given a module, or `fn` returns a
            pair and `has_aux` is not given, or the other way round, or needs
            `rngs` and gets none.
        ValueError: when called, the parameters are not this module's, or the loss creates
            parameters or removes variables.
    """
    graphdef, params, *others = nnx.split(model, wrt, nnx.RngKey, ...)
    streams, rest = compat.as_pure(others)
    known = _paths(others[1])
    draws = _Draws(fn, rngs)
    # New Variables: those of the split are the module's own and would follow its updates.
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
        beside = (*([aux] if has_aux else []), state, *counts)
        return value, beside if len(beside) > 1 else state

    return loss, params


class _Draws:
    """A loss of a module, with or without random streams of its own."""

    def __init__(self, fn: Callable[..., Any], rngs: nnx.Rngs | None):
        if rngs is not None and not isinstance(rngs, (nnx.Rngs, nnx.RngStream)):
            raise TypeError(
                f"`nnx_loss(rngs=)` takes the `nnx.Rngs` that the loss is called with, and got "
                f"{type(rngs).__name__}. A key goes to `Objective(loss, batch, key=key)`."
            )
        self.fn, self.place = fn, _place_of_rngs(fn, rngs is not None)
        self.split = None if rngs is None else nnx.split(rngs, nnx.RngKey, ...)

    def call(self, live: nnx.Module, batch: Any, key: jax.Array | None) -> tuple[Any, ...]:
        """(what fn returns, and the counters of its streams after it where these were given)."""
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
                "The loss given to `nnx_loss` takes `rngs`, and got none. Pass them, "
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
    """The position at which a loss takes its random streams; None where it takes none."""
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
    """The keys of random streams, each with another folded in."""
    return streams if key is None else jax.tree.map(partial(_fold, key), streams)


def _fold(key: jax.Array, stream: jax.Array) -> jax.Array:
    """The stream's key, or each of its keys where layers are stacked, with another folded in."""
    fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    return fold(stream.reshape(-1), jax.random.bits(key)).reshape(stream.shape)


def _completed(whole: nnx.State, given: Any) -> Any:
    """The parameters given, and those of the module where none are."""
    if isinstance(given, nnx.Module):
        raise TypeError(
            "The loss of `nnx_loss` was handed the module in the place of its parameters. Write "
            "`loss, params = nnx_loss(model, fn)`, then `objective.value_and_grad(params)`."
        )
    # As arrays: a variable may hold a tree, which arrays alone do not tell from the module's.
    trees = (compat.as_pure(nnx.State(tree)) for tree in (whole, given))
    known, found = (dict(nnx.to_flat_state(tree)) for tree in trees)
    if set(known) == set(found):
        return given
    if strange := [path for path in found if path not in known]:
        label = "/".join(map(str, strange[0]))
        raise ValueError(
            f"The loss of `nnx_loss` was handed a parameter `{label}` that is none of those it "
            f"was made for: {['/'.join(map(str, path)) for path in known]}. Give `nnx_loss` and "
            "`nnx.Optimizer` the same filter, as in `nnx_loss(model, fn, wrt=nnx.LoRAParam)`."
        )
    return nnx.from_flat_state({**known, **found})


def _written_back(known: set[Place], after: nnx.State) -> nnx.State:
    """The new state as plain arrays, which `nnx.update` takes for variables that are there, and as
    Variables where they were created."""
    leaves = nnx.to_flat_state(after)
    if all(path in known for path, _ in leaves):
        return compat.as_pure(after)
    return nnx.from_flat_state(
        {path: compat.as_pure(x) if path in known else x for path, x in leaves}
    )


def _paths(state: nnx.State) -> set[Place]:
    """The places of a state's variables, which may hold trees themselves."""
    return {path for path, _ in nnx.to_flat_state(state)}


def _refuse_changed_structure(
    params: set[Place], rest: set[Place], params_after: set[Place], rest_after: set[Place]
) -> None:
    if born := params_after - params:
        raise ValueError(
            f"The loss created the parameter `{_label(born)}`, which no optimiser knows. Create it "
            "before: build the layers in `__init__`, or call the model once."
        )
    if gone := rest - rest_after:
        raise ValueError(
            f"The loss removed the variable `{_label(gone)}`, which the module had before it, and "
            "`nnx.update(model, state)` cannot. Remove it before the step: "
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
    """Outputs may be a tuple; a tuple that begins with a scalar is a loss with its aux."""
    if isinstance(found, tuple) and found and jnp.shape(found[0]) == () and len(found) == 2:
        raise TypeError(
            "The loss given to `nnx_loss` returned a pair that begins with a scalar. A loss that "
            "returns `(value, aux)` is passed as `nnx_loss(model, loss_fn, has_aux=True)`; the aux "
            "of the `Objective` is then `(aux, state)`."
        )
    return found
