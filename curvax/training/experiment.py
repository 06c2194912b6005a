"""A config made ready to run: task, model, optimiser, data, and the compiled functions."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import optax
from ml_collections import ConfigDict

from curvax import models
from curvax.arithmetic.trees import Tree, map_with_path
from curvax.devices import axes
from curvax.flax_bridge import Layout, layout
from curvax.training import parallelism, pretrained, run_data, scoring, tasks
from curvax.training.config import configs, recipe
from curvax.training.data import datasets
from curvax.training.data.datasets import Examples
from curvax.training.parallelism import Jit
from curvax.training.run_data import Material
from curvax.training.step import State, init, make_step
from curvax.training.tasks import Task


class ExperimentError(ValueError):
    """A config whose parts do not fit together."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All that a run needs. Runs of one config under other seeds share the compiled functions."""

    config: ConfigDict
    hold_out: bool
    task: Task
    material: Material
    model: nn.Module
    optimizer: optax.GradientTransformationExtraArgs
    regime: Jit
    step: Any  # compiled (State, batch) -> (State, Measured)
    scores: scoring.Scores
    largest_eigenvalue: scoring.Curvature

    @property
    def steps_per_epoch(self) -> int:
        return self.material.train.size // self.config.batch

    @property
    def steps(self) -> int:
        return self.config.epochs * self.steps_per_epoch

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        """Of an input, [1, ...], as the model takes it."""
        return _as_taken(self.task, self.material.first)

    def init(self) -> State:
        """The state before the first step, on the devices, with the weights of `init_from`, if any.

        Raises:
            PretrainedError: as in `trained`.
        """
        return self.regime.create(self._init, self.regime.lay(self.trained()))

    @property
    def shapes(self) -> State:
        """Those of the state, with its layout."""
        return self.regime.laid_out(jax.eval_shape(self._init, {}))

    def trained(self) -> Tree:
        """The variables that `init_from` gives, as NumPy arrays, or none of them.

        Raises:
            PretrainedError: they cannot be read, or are those of another model.
        """
        path, new_head = self.config.init_from, self.config.new_head
        if path is None:
            return {}
        shapes = jax.eval_shape(self._init, {})
        variables = {"params": shapes.params, **shapes.model_state}
        return pretrained.read(path, self.model, variables, new_head=new_head)

    def _init(self, trained: Tree) -> State:
        return init(self.model, self.optimizer, self.example, self.config.seed, trained)

    def batches(self) -> Any:
        """This process's part of shuffled training batches without end, whose place can be kept
        and set."""
        return datasets.batches(
            self.material.train,
            self.config.batch,
            seed=self.config.seed,
            shard=jax.process_index(),
            shards=jax.process_count(),
        )

    def reseeded(self, seed: int) -> "Experiment":
        """The same experiment with other parameters, label noise, data order and draws."""
        config = self.config.copy_and_resolve_references()
        config.seed = seed
        gathered = run_data.gather(config, self.task, self.hold_out)
        return dataclasses.replace(self, config=config, material=gathered)

    def score(self, state: State, split: Examples) -> dict[str, float]:
        """The loss and the task's scores on a split."""
        return scoring.average(self.scores, state, split, self.config.eval_batch, self.regime)

    def test(self, state: State) -> dict[str, float]:
        """The scores on the test set, or on what was held out."""
        return self.score(state, self.material.test)

    def appraise(self, state: State) -> dict[str, float]:
        """The figures of a trained state: scores, wrong labels learnt, largest eigenvalue."""
        train, wrong = self.material.train, self.material.wrong
        figures = {f"test_{name}": value for name, value in self.test(state).items()}
        figures |= {f"train_{name}": value for name, value in self.score(state, train).items()}
        figures["train_examples"] = train.size
        if wrong.any():
            figures["wrong_labels"] = float(wrong.mean())
            figures["memorised"] = self.score(state, train.rows(wrong))["accuracy"]
        if count := min(self.config.hessian_examples, train.size):
            few = train.rows(slice(count))
            batch = next(datasets.batches(few, count, shuffle=False, drop_remainder=False))
            value = self.largest_eigenvalue(state.params, state.model_state, batch)
            figures["lambda_max"] = float(value)
        return figures


def build(config: ConfigDict, *, hold_out: bool = False, begins: bool = True) -> Experiment:
    """Makes a config ready to run, and traces one step of it, so that what is wrong shows here.

    Args:
        hold_out: keep 10 % of the training set out of training and score on it, not on test.
        begins: check the weights of `init_from`; a run that resumes from a checkpoint needs none.

    Raises:
        ValueError: a field does not fit.
    """
    configs.check(config)
    task = tasks.build(config)
    gathered = run_data.gather(config, task, hold_out)
    steps = config.epochs * (gathered.train.size // config.batch)
    if steps < 1:
        raise ExperimentError(
            f"{config.epochs} epochs of {gathered.train.size} training examples in batches "
            f"of {config.batch} are no step. Raise `epochs` or lower `batch`."
        )
    regime = parallelism.build(config)
    example = _as_taken(task, gathered.first)
    model = _model(config, gathered.classes, regime)
    optimizer = _optimizer(config, model, example, regime, steps)
    shapes = jax.eval_shape(lambda: init(model, optimizer, example, config.seed, {}))
    clean = scoring.make_clean(model, task)
    experiment = Experiment(
        config,
        hold_out,
        task,
        gathered,
        model,
        optimizer,
        regime,
        make_step(model, optimizer, task, regime, shapes, config.microbatch),
        scoring.make_scores(clean, task),
        scoring.make_largest_eigenvalue(clean),
    )
    batch = {
        name: jax.ShapeDtypeStruct((config.batch, *x.shape[1:]), x.dtype)
        for name, x in gathered.first.items()
    }
    experiment.step.eval_shape(shapes, batch)
    if begins:
        experiment.trained()
    return experiment


def _model(config: ConfigDict, classes: int | None, regime: Jit) -> nn.Module:
    """The model, whose batch norm takes the statistics of a group over all its devices.

    Raises:
        ExperimentError: its options say over which axes, and those are not all.
    """
    model = models.build(config.model.name, classes, **config.model.options)
    over = config.model.options.get("sync_over")
    if over is None:
        grouped = regime.group is not None and hasattr(model, "sync_over")
        return model.clone(sync_over=regime.group) if grouped else model
    if set(axes.as_tuple(over)) != set(regime.axes):
        raise ExperimentError(
            f"`model.options.sync_over` takes batch norm over devices, whose axes are "
            f"{list(regime.axes)} here, and was {over!r}. Leave it out for the statistics of a "
            "group, and under jit of the whole batch, or name all of the axes."
        )
    return model


def _as_taken(task: Task, batch: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    """Inputs of a batch as the model takes them, which may have another size and dtype."""
    return jax.eval_shape(task.in_test, batch)["input"]


def _optimizer(
    config: ConfigDict,
    model: nn.Module,
    example: jax.ShapeDtypeStruct,
    regime: Jit,
    steps: int,
) -> optax.GradientTransformationExtraArgs:
    """The method of a config's text, which may also name `layout`, what each parameter is for
    `spatial_average`, `axes`, the device axes to average over, and `kernels`, the mask of all
    parameters of that name, as for weight decay."""
    names = {"layout": _layout(model, example), "axes": regime.axes, "kernels": _kernels}
    return recipe.parse(config.optimizer, steps=steps, names=configs.numbers(config) | names)


def _kernels(params: Tree) -> Tree:
    """Which leaves are kernels: True or False for each."""
    return map_with_path(lambda path, leaf: path[-1] == "kernel", params)


class Outline(NamedTuple):
    """A config's training step without its data, ready to be lowered and compiled."""

    step: Any  # jitted, (state, batch) ↦ (state, measured)
    state: State  # of ShapeDtypeStructs, laid out on the devices
    batch: dict[str, jax.ShapeDtypeStruct]  # the same


def outline(config: ConfigDict, devices: Sequence[jax.Device]) -> Outline:
    """The step that `build` would make on these devices, which need not be there.

    Raises:
        ValueError: a field does not fit.
    """
    configs.check(config)
    task, facts = tasks.build(config), run_data.foretell(config)
    regime = parallelism.build(config, devices)
    batch = {
        name: jax.ShapeDtypeStruct((config.batch, *x.shape), x.dtype, sharding=regime.split)
        for name, x in {"input": facts.input, "label": facts.label}.items()
    }
    taken = _as_taken(task, batch)
    example = jax.ShapeDtypeStruct((1, *taken.shape[1:]), taken.dtype)
    model = _model(config, facts.classes, regime)
    optimizer = _optimizer(
        config, model, example, regime, config.epochs * (facts.size // config.batch)
    )
    state = jax.eval_shape(lambda: init(model, optimizer, example, config.seed, {}))
    step = make_step(model, optimizer, task, regime, state, config.microbatch)
    return Outline(step, regime.laid_out(state), batch)


def _layout(model: nn.Module, example: jax.ShapeDtypeStruct) -> Layout:
    return layout(model, _variables(model, example), example)


def _variables(model: nn.Module, example: jax.ShapeDtypeStruct) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0), example)
