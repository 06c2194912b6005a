"""One training step: (state, batch) ↦ (next state, measurements)."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import curvax
from curvax.arithmetic.trees import Tree, label, names
from curvax.devices import axes
from curvax.pipes.parts import parts_of
from curvax.pipes.signal import kinds
from curvax.pipes.signal import step as apply
from curvax.training import pretrained
from curvax.training.augment.transforms import Batch
from curvax.training.parallelism import Jit
from curvax.training.runtime.errors import ConfigError
from curvax.training.tasks import Task


class State(NamedTuple):
    """The state of training, except for the position in the data."""

    step: jax.Array  # int32 []
    params: Tree
    model_state: Tree  # batch statistics; {} if the model has none
    opt_state: Tree
    key: jax.Array  # typed key []; each step folds its number in

    @property
    def evaluated(self) -> Tree:
        """The parameters that are evaluated: θ, or its average behind `schedule_free`."""
        is_free = lambda x: isinstance(x, optax.contrib.ScheduleFreeState)
        free = [x for x in jax.tree.leaves(self.opt_state, is_leaf=is_free) if is_free(x)]
        if not free:
            return self.params
        return optax.contrib.schedule_free_eval_params(free[0], self.params)


class Measured(NamedTuple):
    """The measurements of one step, on the device until they are fetched."""

    metrics: dict[str, jax.Array]  # loss, scores and the stages' diagnostics, float32 []
    finite: jax.Array  # bool [1 + 2·leaves]: of the loss, each gradient leaf, each update leaf


def init(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    example: jax.ShapeDtypeStruct,
    seed: int,
    trained: Tree,
) -> State:
    """The state before the first step.

    Args:
        model: initialised on zeros.
        optimizer: its state is initialised too.
        example: shape [1, ...] and dtype of an input.
        seed: of the parameters and of all steps.
        trained: variables that replace the drawn ones, all or some; {} for none.
    """
    of_params, of_steps = jax.random.split(jax.random.key(seed))
    drawn = _variables(model, of_params, jnp.zeros(example.shape, example.dtype))
    variables = pretrained.over(drawn, trained)
    params = variables.pop("params")
    opt_state = curvax.pipe(optimizer).init(params)
    return State(jnp.zeros((), jnp.int32), params, variables, opt_state, of_steps)


@functools.partial(jax.jit, static_argnums=0)
def _variables(model: nn.Module, key: jax.Array, example: jax.Array) -> Any:
    return model.init(key, example)


def objective(
    model: nn.Module,
    task: Task,
    model_state: Tree,
    batch: Batch,
    key: jax.Array,
    microbatch: int | None = None,
) -> curvax.Objective:
    """The training loss on a batch; its aux is (new batch statistics, scores)."""

    def predict(params: Tree, batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
        outputs, new = model.apply(
            {"params": params, **model_state},
            batch["input"],
            train=True,
            rngs={"dropout": key},
            mutable=list(model_state),
        )
        scores = {name: score(outputs, batch["label"]) for name, score in task.scores.items()}
        return outputs, (new, scores)

    return curvax.Objective(
        task.loss("label"),
        batch,
        model=predict,
        has_aux=True,
        key=key,
        microbatch=microbatch,
    )


def make_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    task: Task,
    parallelism: Jit,
    shapes: State,
    microbatch: int | None = None,
) -> Any:
    """The compiled step of all devices, (State, batch) ↦ (State, Measured).

    The state's buffers are donated.

    Args:
        model: with parameters as in `shapes`.
        optimizer: a pipe of stages and transformations, or a single one.
        task: gives preprocessing, loss and scores.
        parallelism: maps the step over the devices.
        shapes: the shapes of the state.
        microbatch: examples in memory at once; the whole batch by default.
    """
    pipe = curvax.pipe(optimizer)
    ascends = any(kind.replaces_gradient for kind in kinds(pipe))

    def prepare(state: State, batch: Batch) -> Batch:
        key, _ = _keys(state)
        return task.in_training(key, batch)

    def core(state: State, batch: Batch) -> tuple[State, Measured]:
        _, dropout = _keys(state)
        clean = objective(model, task, state.model_state, batch, dropout, microbatch)
        value_fn, ((loss, aux), grads) = _evaluated(clean, state.params, task, ascends)
        signal = curvax.Signal(
            grads, grads, value=loss, aux=aux, perturbed=False,
            local=value_fn.local_axes(state.params),
        )  # fmt: skip
        signal, opt_state, gradient = _through(
            pipe, signal, state.opt_state, state.params, value_fn=value_fn, value=loss
        )
        _refuse_local(signal.local)
        params = optax.apply_updates(state.params, signal.updates)
        # A pipe without a pass at θ knows the loss of its perturbed pass alone.
        seen = signal.perturbed_value if signal.value is None else signal.value
        watched = _finite((seen, gradient, signal.updates))
        # Aux is read after the pipe: an estimator may have replaced the caller's forward pass by
        # its own, and the compiler then removes the former.
        (model_state, scores), loss, unsound = axes.mean(
            (signal.aux, seen, 1.0 - watched), parallelism.axes
        )
        metrics = {**scores, **curvax.diagnostics(opt_state), "loss": loss}
        state = State(state.step + 1, params, model_state, opt_state, state.key)
        return state, Measured(metrics, unsound == 0)

    return parallelism.map(prepare, core, shapes)


def _evaluated(
    clean: curvax.Objective, params: Tree, task: Task, ascends: bool
) -> tuple[curvax.Objective, Any]:
    """(the loss, under the task's attack if it has one; its value and gradient).

    Every gradient is at an attack of its own; with `share_attack` the attack's last step shares the
    backward pass of the first gradient, and the loss is that at this attack (Chen et al.,
    arXiv:2106.01548, section 5.4), if the pipe `ascends`, which replaces the first gradient.
    """
    attack = task.attack
    if attack is not None and task.share_attack and ascends:
        value, grads, delta = attack.value_and_grad(clean, params)
        return attack.moved(clean, delta), (value, grads)
    value_fn = clean if attack is None else curvax.adversarial(clean, attack)
    return value_fn, value_fn.value_and_grad(params)


def _through(
    pipe: curvax.Stage, signal: curvax.Signal, state: Tree, params: Tree, **extra: Any
) -> tuple[curvax.Signal, Tree, Tree]:
    """Applies a pipe: (signal, state, gradient to check for NaNs).

    Each device checks its local gradient, from before the first average over devices: averaging
    only for this check would cost an all-reduce. After a stage that replaces the updates by a
    gradient of its own, that gradient is checked, for nothing else may need the clean one.
    """
    states: list[Tree] = []
    checked, replaced = signal.gradient, False
    for part, inner in zip(parts_of(pipe), state, strict=True):
        signal, inner = apply(part, signal, inner, params, **extra)
        if any(kind.replaces_gradient for kind in kinds(part)):
            checked, replaced = signal.updates, True
        elif not (replaced or signal.averaged):
            checked = signal.gradient
        states.append(inner)
    return signal, tuple(states), checked


def _keys(state: State) -> jax.Array:
    """This step's keys [2]: of augmentation, of dropout."""
    return jax.random.split(jax.random.fold_in(state.key, state.step))


def _refuse_local(local: frozenset[str]) -> None:
    if local:
        raise ConfigError(
            f"The optimiser's text leaves the updates different on each device of {sorted(local)}. "
            "Average them before the optimiser: `sam_perturb(0.05) | pmean_updates(axes) | "
            "adamw(1e-3)`, or `mean_over=axes` in a method. `axes` stands for the device axes "
            "under any parallelism."
        )


def _finite(watched: Tree) -> jax.Array:
    """Whether each leaf is finite, bool [leaves]."""
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(watched)])


def watched_names(params: Tree) -> list[str]:
    """The name of each entry of `Measured.finite`."""
    leaves = [label(names(path)) for path, _ in jax.tree.leaves_with_path(params)]
    return [
        "the loss",
        *(f"the gradient of `{leaf}`" for leaf in leaves),
        *(f"the update of `{leaf}`" for leaf in leaves),
    ]
