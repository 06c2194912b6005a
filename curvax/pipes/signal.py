"""Composition: a stage is a rule on signals, a pipe is a sequence of stages.

A stage called with a signal returns a signal; called with plain updates, as by Optax, it returns
plain updates. So `|` is associative, the state of a pipe is a flat tuple with one entry per part,
and every Optax wrapper takes a pipe.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Matvec, ScalarOrSchedule, ValueFn
from curvax.devices import axes
from curvax.objective import Objective, as_objective
from curvax.parameter_roles import frozen
from curvax.pipes import initial, order
from curvax.pipes.initial import takes_factors
from curvax.pipes.parts import NamedUpdate, name_of, parts_of


class Signal(NamedTuple):
    """What the stages of a pipe pass on within one `update`. It is not part of the state.

    Attributes:
        updates: the updates of Optax, a tree like the parameters.
        gradient: ∇L(θ) before any perturbation, a tree like the parameters.
        diagonal: a diagonal of the curvature, in float32 or wider, shaped like the parameters.
        matvec: a curvature product v ↦ C v on such trees.
        value: L(θ), a scalar; None where it is unknown.
        perturbed_value: the loss at the perturbed point, a scalar; on steps that
            `sam_perturb(every=)` skips, the last one, averaged over devices.
        aux: the auxiliary output of the loss at θ.
        perturbed: whether `updates` are a gradient at a perturbed point, a bool, traced or not;
            None where no stage set it.
        local: the device axes over which `updates` are this device's own.
        averaged: the device axes that updates have been averaged over, even if a later stage made
            them local again.
        factors: a Kronecker-factored curvature, such as `KroneckerFactors`.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> signal, stage = curvax.Signal(jnp.array([3.0, -4.0])), curvax.squared_gradient()
        >>> signal, state = stage.update(signal, stage.init(signal.updates), signal.updates)
        >>> print(signal.diagonal)
        [ 9. 16.]
    """

    updates: Tree
    gradient: Tree = None
    diagonal: Tree = None
    matvec: Matvec | None = None
    value: jax.Array | None = None
    perturbed_value: jax.Array | None = None
    aux: Any = None
    perturbed: jax.Array | bool | None = None
    local: frozenset[str] = frozenset()
    averaged: frozenset[str] = frozenset()
    factors: Any = None


Rule = Callable[..., tuple[Signal, optax.OptState]]


class Stage(optax.GradientTransformationExtraArgs):
    """An Optax transformation that also passes on curvature, and composes with `|`.

    Stages are made by factories such as `sam_perturb`, by `stage` and by `pipe`.

    Attributes:
        init: `params -> state`, as in Optax.
        update: `(updates, state, params, **extra) -> (updates, state)`, as in Optax; with a
            `Signal` in place of the updates it returns a `Signal`.

    Examples:
        >>> import optax, curvax
        >>> tx = curvax.sam_perturb(0.05) | optax.adamw(1e-3)
        >>> isinstance(tx, curvax.Stage), isinstance(tx, optax.GradientTransformationExtraArgs)
        (True, True)
    """

    def __or__(self, other: optax.GradientTransformation) -> Stage:
        return pipe(self, other)

    def __ror__(self, other: optax.GradientTransformation) -> Stage:
        return pipe(other, self)


def stage(
    init: Callable[[Tree], optax.OptState],
    rule: Rule,
    *,
    name: str | None = None,
    evaluates_loss: bool | None = None,
    replaces_gradient: bool = False,
    complex_leaves: bool = False,
) -> Stage:
    """Makes a stage of a rule on signals.

    Args:
        init: `params -> state`.
        rule: `rule(signal, state, params, **extra) -> (signal, state)`, where `extra` is what the
            caller passed to `update`: `value_fn`, `value`, and others.
        name: name in error messages; by default that of the function in which the rule was defined.
        evaluates_loss: whether the rule evaluates the loss on the batch at hand, so that
            `optax.MultiSteps` around it is an error. By default, whether the rule takes `value_fn`
            by name.
        replaces_gradient: whether the rule replaces the updates by a gradient of its own, so that
            changes of the updates before it are an error.
        complex_leaves: whether the rule is correct for complex parameters; they are an error at
            `init` otherwise.

    Returns:
        A stage.

    Examples:
        >>> import jax.numpy as jnp, optax, curvax
        >>> def flip(signal, state, params=None, **extra):
        ...     return signal._replace(updates=-signal.updates), state
        >>> tx = curvax.stage(lambda params: optax.EmptyState(), flip) | optax.sgd(1.0)
        >>> g = jnp.array([3.0, -4.0])
        >>> print(tx.update(g, tx.init(g), g)[0])
        [ 3. -4.]
    """
    name = name or rule.__qualname__.split(".")[0]
    if evaluates_loss is None:
        evaluates_loss = "value_fn" in inspect.signature(rule).parameters
    return _lifted(
        init,
        rule,
        name,
        (Kind(name, evaluates_loss, replaces_gradient),),
        complex_leaves=complex_leaves,
    )


def pipe(*parts: optax.GradientTransformation) -> Stage:
    """Applies parts one after the other: `pipe(a, b, c)` is `a | b | c`.

    Plain Optax parts see and change the updates only. `|` needs a stage on one side, so a pipe that
    starts with two plain parts is written with this function. `optax.MultiSteps` may be a part.

    Args:
        *parts: stages, pipes and Optax transformations.

    Returns:
        A stage. Its state is a tuple with one entry per part; pipes inside are flattened.

    Raises:
        TypeError: a part is not a gradient transformation.
        ValueError: a plain part changes the updates before a stage that replaces them.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda w: 0.5 * jnp.sum(w**2)
        >>> clip = optax.clip_by_global_norm(1.0)
        >>> tx = curvax.pipe(curvax.sam_perturb(0.1), clip, optax.sgd(1.0))
        >>> w = jnp.array([3.0, 4.0])
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(x), 3) for x in updates]
        [-0.6, -0.8]
    """
    parts = tuple(piece for part in parts for piece in _pieces(part))
    _refuse_lost(parts)

    def init(params: Tree, factors: Any = None) -> optax.OptState:
        states = initial.initial_of_all(parts, params, factors)
        frozen.warn_of_frozen(parts, states, params)
        return states

    def rule(
        signal: Signal, state: optax.OptState, params: Tree = None, **extra: Any
    ) -> tuple[Signal, optax.OptState]:
        new_state = []
        for part, inner in zip(parts, state, strict=True):
            signal, inner = step(part, signal, inner, params, **extra)
            new_state.append(inner)
        return signal, tuple(new_state)

    name = " | ".join(map(name_of, parts))
    below = tuple(kind for part in parts for kind in kinds(part))
    moving = [part.init.moves for part in parts if hasattr(part.init, "moves")]
    told: dict[str, Any] = {"moves": moving[0]} if moving else {}
    if make := initial.factors_of_all(parts):
        told["factors"] = make
    return _lifted(initial.telling(init, **told), rule, name, below, parts)


def step(
    part: optax.GradientTransformation,
    signal: Signal,
    state: optax.OptState,
    params: Tree,
    **extra: Any,
) -> tuple[Signal, optax.OptState]:
    """Applies one part to a signal; a plain Optax part sees and changes the updates only."""
    if isinstance(part, Stage):
        return part.update(signal, state, params, **extra)
    _refuse_local_moments(part, state, signal)
    part = optax.with_extra_args_support(part)
    updates, state = part.update(signal.updates, state, params, **extra)
    # With `check_vma=True` the types show whether a plain part averaged over devices.
    local = signal.local & axes.varying(updates) if axes.tracked() else signal.local
    return signal._replace(updates=updates, local=local), state


class Kind(NamedTuple):
    """How a stage uses the loss."""

    name: str
    evaluates_loss: bool
    replaces_gradient: bool
    converted: bool = False
    """Whether the gradient may reach it in another convention than the objective's."""


def kinds(part: optax.GradientTransformation) -> tuple[Kind, ...]:
    """How a stage, and the stages inside it, use the loss; () for a plain part."""
    return part.update.kinds if isinstance(part.update, _Update) else ()


def containing(
    init: Callable[[Tree], optax.OptState],
    rule: Rule,
    *inner: optax.GradientTransformation,
    evaluates_loss: bool = False,
    converted: bool = False,
) -> Stage:
    """A stage around others, with their kinds, that passes on their factors if `init` takes some.

    `converted`: the gradient may reach the stages inside in another convention than the
    objective's.
    """
    name = rule.__qualname__.split(".")[0]
    if takes_factors(init) and (make := initial.factors_of_all(inner)):
        init = initial.telling(init, factors=make)
    below = tuple(kind for part in inner for kind in kinds(part))
    if converted:
        below = tuple(kind._replace(converted=True) for kind in below)
    return _lifted(init, rule, name, (Kind(name, evaluates_loss, False), *below))


def _lifted(
    init: Callable[[Tree], optax.OptState],
    rule: Rule,
    name: str,
    kinds: tuple[Kind, ...],
    parts: tuple[optax.GradientTransformation, ...] = (),
    *,
    complex_leaves: bool = True,
) -> Stage:
    return Stage(_Init(init, name, kinds, complex_leaves), _Update(rule, name, kinds, parts))


class _Init:
    def __init__(
        self,
        init: Callable[[Tree], optax.OptState],
        name: str,
        kinds: tuple[Kind, ...],
        complex_leaves: bool,
    ):
        self.init, self.name, self.kinds = init, name, kinds
        self.complex_leaves = complex_leaves
        # What `frozen.warn_of_frozen` and `initial` read; stages around others pass it on.
        for attribute in ("moves", "factors"):
            if hasattr(init, attribute):
                setattr(self, attribute, getattr(init, attribute))

    def __call__(self, params: Tree, factors: Any = None) -> optax.OptState:
        checks.refuse_masked(params, self.name)
        if not self.complex_leaves:
            checks.refuse_complex(params, self.name)
        for kind in self.kinds:
            if kind.evaluates_loss:
                order.refuse_multi_steps_around(kind.name, replaces_gradient=kind.replaces_gradient)
        params = trees.arrays(params)
        given = (params, factors) if takes_factors(self.init) else (params,)
        return self.init(*given)


class _Update(NamedUpdate):
    """The update of a stage: plain updates become a signal before the rule, and are returned after
    it.
    """

    def __init__(
        self,
        rule: Rule,
        name: str,
        kinds: tuple[Kind, ...],
        parts: tuple[optax.GradientTransformation, ...] = (),
    ):
        self.rule, self.name, self.kinds, self.parts = rule, name, kinds, parts

    def __call__(
        self, updates: Tree, state: optax.OptState, params: Tree = None, **extra: Any
    ) -> tuple[Tree, optax.OptState]:
        if isinstance(updates, Signal):
            return self.rule(updates, state, params, **extra)
        checks.refuse_masked(updates, self.name)
        extra = _by_our_names(extra)
        value_fn = extra.get("value_fn")
        for kind in self.kinds:
            comparable = kind.replaces_gradient and not kind.converted
            if comparable and isinstance(value_fn, Objective):
                order.refuse_changed_gradient(value_fn, params, updates, kind.name)
        checks.refuse_unlike(updates, params, self.name)
        updates, params = trees.arrays((updates, params))
        signal, state = self.rule(_begin(updates, params, extra), state, params, **extra)
        order.refuse_unaveraged(signal.local, self.name)
        return signal.updates, state


def _by_our_names(extra: dict[str, Any]) -> dict[str, Any]:
    """The extra arguments, with `obj_fn` as `value_fn` and `loss` as `value`.

    `obj_fn` is the name in `optax.contrib.sophia` and in Levanter; `loss` is taken if it is a
    scalar.
    """
    found = dict(extra)
    if found.get("value_fn") is None and callable(found.get("obj_fn")):
        found["value_fn"] = found["obj_fn"]
    loss = found.get("loss")
    numbers = (float, np.floating, np.ndarray, jax.Array)
    if found.get("value") is None and isinstance(loss, numbers) and not jnp.ndim(loss):
        found["value"] = loss
    checks.refuse_no_value(found.get("value"))
    return found


def _begin(updates: Tree, params: Tree, extra: Mapping[str, Any]) -> Signal:
    """The signal of plain updates, with what the gradient cache of the objective holds for them.

    The value is the caller's, or the cached one; it never costs a forward pass.
    """
    value, value_fn = extra.get("value"), extra.get("value_fn")
    given = value_fn.cached_gradient(params, updates) if isinstance(value_fn, Objective) else None
    if value is None and given is not None:
        value = given.value
    value = None if value is None else trees.widen(value)
    local = frozenset() if given is None else given.local
    return Signal(updates, gradient=updates, value=value, perturbed=False, local=local)


def _pieces(part: Any) -> tuple[optax.GradientTransformation, ...]:
    if steps := order.multi_steps_of(part):
        return (optax.GradientTransformationExtraArgs(steps.init, steps.update),)
    if not isinstance(part, optax.GradientTransformation):
        raise TypeError(
            "The parts of a pipe are stages and Optax transformations, and one of them is "
            f"{part!r}. Write for instance `sam_perturb(0.05) | optax.sgd(0.1)`: a factory needs "
            "its parentheses, and a number is written `optax.scale(...)`."
        )
    return parts_of(part)


def _refuse_lost(parts: tuple[optax.GradientTransformation, ...]) -> None:
    """Refuses plain parts before a stage that replaces the updates, and accumulation before a stage
    that evaluates the loss.
    """
    for place, part in enumerate(parts):
        behind = (kind for later in parts[place + 1 :] for kind in kinds(later))
        stage = next((kind.name for kind in behind if kind.replaces_gradient), None)
        if stage and not isinstance(part, Stage):
            order.refuse_part_before(name_of(part), stage)
        behind = (kind for later in parts[place + 1 :] for kind in kinds(later))
        stage = next((kind.name for kind in behind if kind.evaluates_loss), None)
        if stage and not isinstance(part, Stage):
            order.refuse_accumulation_before(part, name_of(part), stage)


def _refuse_local_moments(
    part: optax.GradientTransformation, state: optax.OptState, signal: Signal
) -> None:
    if signal.local and any(jnp.ndim(x) and trees.is_float(x) for x in jax.tree.leaves(state)):
        axis = sorted(signal.local)
        raise ValueError(
            f"`{name_of(part)}` would compute its moments from the updates of one device, and the "
            f"devices of {axis} would diverge. Put `pmean_updates({axis[0]!r})` before it "
            "(`mean_over=` in a method), or `pmean_updates(())` if local moments are intended."
        )


def weight_of(
    signal: Signal, value_fn: ValueFn | None, over: tuple[str, ...], stage: str
) -> jax.Array | None:
    """The weight of the updates in a mean over these device axes; None where devices count equally.

    It is the weight of their examples. Where an earlier stage averaged over a device axis, it is
    the sum over all devices along it (with `check_vma=True`, `axes.mean` does this itself).

    Raises:
        ValueError: the mean is over some of the axes, and earlier averages are unknown.
    """
    weight = None if value_fn is None else as_objective(value_fn, stage).batch_weight()
    if weight is None or axes.tracked():
        return weight
    if over and not signal.local and not signal.averaged and set(over) < set(axes.manual()):
        raise ValueError(
            f"`{stage}` averages over {list(over)} of the device axes {list(axes.manual())}, where "
            "devices count by the weights of their examples, and cannot know over which axes the "
            "updates have been averaged before: they come from outside of this pipe and are not "
            "the gradient of the objective. Write the stages as one pipe, `a | b` instead of "
            "`optax.chain(a, b)`, average over all axes at once, or leave `check_vma=True`."
        )
    before = signal.averaged - signal.local
    return axes.total(weight, tuple(axis for axis in axes.manual() if axis in before))


def mean_over_devices(signal: Signal, over: tuple[str, ...], weight: jax.Array | None) -> Signal:
    """The signal with updates, clean gradient and losses averaged over bound device axes."""
    mean = lambda tree: axes.mean(tree, over, weight)
    same = trees.same_leaves(signal.gradient, signal.updates)
    shared = signal.averaged - signal.local
    updates = axes.mean(signal.updates, tuple(a for a in over if a not in shared), weight)
    gradient = updates if same else mean(signal.gradient)
    value, perturbed_value = mean((signal.value, signal.perturbed_value))
    return signal._replace(
        updates=updates, gradient=gradient, value=value, perturbed_value=perturbed_value,
        averaged=signal.averaged.union(over),
    )  # fmt: skip


class StepState(NamedTuple):
    """The state of a stage that only counts steps."""

    step: jax.Array
    """Steps taken, int32 scalar: the argument of schedules."""


def at(value: ScalarOrSchedule | None, count: jax.Array) -> Any:
    """A hyperparameter at a step: the value of a schedule, or the value itself."""
    return value(count) if callable(value) else value
