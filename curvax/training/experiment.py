"""A config made ready to run: task, data, model, optimiser, and the compiled functions."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

import curvax
from curvax import models
from curvax.arithmetic.trees import Tree, map_with_path
from curvax.devices import axes
from curvax.flax_bridge import Layout, layout
from curvax.pipes.parts import parts_of
from curvax.training import linear_probe, parallelism, pretrained, run_data, scoring, tasks
from curvax.training.config import configs, recipe
from curvax.training.data import datasets
from curvax.training.data.datasets import Examples
from curvax.training.parallelism import Jit
from curvax.training.run_data import RunData
from curvax.training.runtime.errors import ConfigError
from curvax.training.step import State, init, make_step, objective
from curvax.training.tasks import Task


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All parts of a run. Runs of one config with other seeds share the compiled functions."""

    config: ConfigDict
    hold_out: bool  # score on 10 % of the training set, not on the test set
    task: Task
    data: RunData
    model: nn.Module
    optimizer: optax.GradientTransformationExtraArgs
    parallelism: Jit
    step: Any  # compiled (State, batch) ↦ (State, Measured)
    scores: scoring.Scores
    largest_eigenvalue: scoring.LargestEigenvalue
    represent: linear_probe.Represent | None  # of a task that a linear probe scores

    @property
    def steps_per_epoch(self) -> int:
        return self.data.train.size // self.config.batch

    @property
    def steps(self) -> int:
        return self.config.epochs * self.steps_per_epoch

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        """Shape [1, ...] and dtype of a model input."""
        return _model_input(self.task, self.data.first)

    def init(self) -> State:
        """The state before the first step, on the devices, with the weights of `init_from`, if any.

        Raises:
            ConfigError: as in `trained`.
        """
        return self.parallelism.create(self._init, self.parallelism.shard(self.trained()))

    @property
    def shapes(self) -> State:
        """The shapes, dtypes and shardings of the state."""
        return self.parallelism.sharded_shapes(jax.eval_shape(self._init, {}))

    def trained(self) -> Tree:
        """The variables read from `init_from`, as NumPy arrays; {} if it is not set.

        Raises:
            ConfigError: they cannot be read, or belong to another model.
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
        """An endless iterator over this process's part of shuffled training batches.

        Its position can be saved and restored.
        """
        return datasets.batches(
            self.data.train,
            self.config.batch,
            seed=self.config.seed,
            numbered=_numbered(self.config),
            shard=jax.process_index(),
            shards=jax.process_count(),
        )

    def with_seed(self, seed: int) -> "Experiment":
        """The same experiment with another seed for parameters, label noise, order and draws."""
        config = self.config.copy_and_resolve_references()
        config.seed = seed
        data = run_data.load(config, self.task, self.hold_out)
        return dataclasses.replace(self, config=config, data=data)

    def score(self, state: State, split: Examples) -> dict[str, float]:
        """The loss and the task's scores on a split."""
        size, mapping, rankings = self.config.eval_batch, self.parallelism, self.task.rankings
        found = scoring.average(self.scores, state, split, size, mapping, rankings)
        if self.represent is None:
            return found
        train, test = (
            linear_probe.features_of(self.represent, state, part, size, mapping)
            for part in (self.data.train, split)
        )
        return found | {"accuracy": linear_probe.accuracy(train, test)}

    def test(self, state: State) -> dict[str, float]:
        """The scores on the test set, or on the held-out examples."""
        return self.score(state, self.data.test)

    def final_metrics(self, state: State) -> dict[str, float]:
        """The metrics of a trained state: scores, share of wrong labels fitted, largest eigenvalue.

        Keys are `test_*` and `train_*` for each score, `train_examples`, with wrong labels also
        `wrong_labels` and `memorised`, and `lambda_max` if `hessian_examples` is above 0.
        """
        train, wrong = self.data.train, self.data.wrong
        metrics = {f"test_{name}": value for name, value in self.test(state).items()}
        metrics |= {f"train_{name}": value for name, value in self.score(state, train).items()}
        metrics["train_examples"] = train.size
        if wrong.any():
            metrics["wrong_labels"] = float(wrong.mean())
            metrics["memorised"] = self.score(state, train.rows(wrong))["accuracy"]
        if count := min(self.config.hessian_examples, train.size):
            few = train.rows(slice(count))
            batch = next(datasets.batches(few, count, shuffle=False, drop_remainder=False))
            value = self.largest_eigenvalue(state.evaluated, state.model_state, batch)
            metrics["lambda_max"] = float(value)
        return metrics


def build(config: ConfigDict, *, hold_out: bool = False, begins: bool = True) -> Experiment:
    """Makes a config ready to run, and traces one step, so that errors appear here.

    Args:
        config: all fields of the run.
        hold_out: test on 10 % of the training set, which is then left out of training.
        begins: check the weights of `init_from`; a run that resumes from a checkpoint needs none.

    Raises:
        ValueError: a field does not fit.
    """
    configs.check(config)
    task = tasks.build(config)
    data = run_data.load(config, task, hold_out)
    steps = config.epochs * (data.train.size // config.batch)
    if steps < 1:
        raise ConfigError(
            f"{config.epochs} epochs of {data.train.size} training examples in batches of "
            f"{config.batch} are no step. Raise `epochs` or lower `batch`."
        )
    mapping = parallelism.build(config)
    example = _model_input(task, data.first)
    model = _model(config, task, data.classes, mapping)
    batch = {
        name: jax.ShapeDtypeStruct((config.batch, *x.shape[1:]), x.dtype)
        for name, x in data.first.items()
    } | _index(config)
    optimizer = _optimizer(config, model, task, batch, mapping, steps, data.train.size)
    shapes = jax.eval_shape(lambda: init(model, optimizer, example, config.seed, {}))
    eval_objective = scoring.make_eval_objective(model, task)
    experiment = Experiment(
        config,
        hold_out,
        task,
        data,
        model,
        optimizer,
        mapping,
        make_step(model, optimizer, task, mapping, shapes, config.microbatch),
        scoring.make_scores(eval_objective, task, mapping),
        scoring.make_largest_eigenvalue(eval_objective),
        linear_probe.make_represent(model, task, mapping) if task.probed else None,
    )
    experiment.step.eval_shape(shapes, batch)
    if begins:
        experiment.trained()
    return experiment


def _model(config: ConfigDict, task: Task, classes: int | None, mapping: Jit) -> nn.Module:
    """The model of a task; one that a linear probe scores has a projection head."""
    if not task.probed:
        return _network(config, classes, mapping)
    return models.ProjectionNet(encoder=_network(config, 0, mapping))


def _network(config: ConfigDict, classes: int | None, mapping: Jit) -> nn.Module:
    """The network; in groups over several devices, batch norm is synchronised within a group.

    Raises:
        ConfigError: `sync_over` names some but not all of the device axes.
    """
    model = models.build(config.model.name, classes, **config.model.options)
    over = config.model.options.get("sync_over")
    if over is None:
        grouped = mapping.group is not None and hasattr(model, "sync_over")
        return model.clone(sync_over=mapping.group) if grouped else model
    if set(axes.as_tuple(over)) != set(mapping.axes):
        raise ConfigError(
            f"`model.options.sync_over` takes batch norm over devices, whose axes are "
            f"{list(mapping.axes)} here, and was {over!r}. Leave it out for the statistics of a "
            "group, and under jit of the whole batch, or name all of the axes."
        )
    return model


def _model_input(task: Task, batch: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a batch's inputs after preprocessing."""
    return jax.eval_shape(task.in_test, batch)["input"]


def _optimizer(
    config: ConfigDict,
    model: nn.Module,
    task: Task,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    mapping: Jit,
    steps: int,
    size: int,
) -> optax.GradientTransformationExtraArgs:
    """Parses the config's optimiser text.

    In addition to the config's numbers the text may name `layout`, the parameter roles for
    `spatial_average`; `axes`, the device axes to average over; `kernels` and `embeddings`, the
    masks of all parameters called "kernel" and "embedding", for a weight decay and a `partition`;
    `like`, an objective with the shapes of training, for stages of Kronecker factors; and
    `examples` and `outputs`, the number of training examples and the shape of the model's outputs
    of one, for `trajectory_loss`.
    """
    example = _example(task, batch)
    masks = {"kernels": _called("kernel"), "embeddings": _called("embedding")}
    names = {"layout": _layout(model, example), "axes": mapping.axes, **masks}
    if _numbered(config):
        apply = lambda variables, x: _alone(model).apply(variables, x, train=False)
        found = jax.eval_shape(apply, _variables(_alone(model), example), example)
        names |= {"examples": size, "outputs": found.shape[1:]}
    if re.search(r"\blike\b", config.optimizer):
        names["like"] = _like(model, task, batch, example)
    return recipe.parse(config.optimizer, steps=steps, names=configs.numbers(config) | names)


def _numbered(config: ConfigDict) -> bool:
    """Whether the method reads the numbers of the examples."""
    return re.search(r"\btrajectory_loss\b", config.optimizer) is not None


def _index(config: ConfigDict, sharding: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape of the numbers of a batch's examples, where they are read."""
    if not _numbered(config):
        return {}
    return {"index": jax.ShapeDtypeStruct((config.batch,), jnp.int32, sharding=sharding)}


def _like(
    model: nn.Module,
    task: Task,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    example: jax.ShapeDtypeStruct,
) -> curvax.Objective:
    """The training loss on a batch of shapes, on one device."""
    alone = _alone(model)
    variables = _variables(alone, example)
    statistics = {name: x for name, x in variables.items() if name != "params"}
    statistics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), statistics)
    key = jax.random.key(0)
    return objective(alone, task, statistics, jax.eval_shape(task.in_training, key, batch), key)


def _alone(model: nn.Module) -> nn.Module:
    """The model on one device."""
    if isinstance(model, models.ProjectionNet):
        return model.clone(encoder=_alone(model.encoder))
    return model.clone(sync_over=None) if hasattr(model, "sync_over") else model


def _called(name: str) -> Callable[[Tree], Tree]:
    """The mask of all leaves of that name."""
    return lambda params: map_with_path(lambda path, leaf: path[-1] == name, params)


class Outline(NamedTuple):
    """A training step without data, ready to be lowered and compiled."""

    step: Any  # jitted (state, batch) ↦ (state, measured)
    state: State  # of ShapeDtypeStructs with shardings
    batch: dict[str, jax.ShapeDtypeStruct]  # with shardings
    factors: int  # bytes of the Kronecker factors that an estimator makes, 0 without one


def outline(config: ConfigDict, devices: Sequence[jax.Device]) -> Outline:
    """The step that `build` would make on these devices, which may belong to another machine.

    Raises:
        ValueError: a field does not fit.
    """
    configs.check(config)
    task, spec = tasks.build(config), run_data.data_spec(config)
    mapping = parallelism.build(config, devices)
    batch = {
        name: jax.ShapeDtypeStruct((config.batch, *x.shape), x.dtype, sharding=mapping.split)
        for name, x in {"input": spec.input, "label": spec.label}.items()
    } | _index(config, mapping.split)
    model = _model(config, task, spec.classes, mapping)
    steps = config.epochs * (spec.size // config.batch)
    optimizer = _optimizer(config, model, task, batch, mapping, steps, spec.size)
    example = _example(task, batch)
    state = jax.eval_shape(lambda: init(model, optimizer, example, config.seed, {}))
    step = make_step(model, optimizer, task, mapping, state, config.microbatch)
    size = _bytes_of_factors(optimizer, state.params)
    return Outline(step, mapping.sharded_shapes(state), batch, size)


def _bytes_of_factors(optimizer: optax.GradientTransformation, params: Tree) -> int:
    parts = parts_of(curvax.pipe(optimizer))
    makers = [part.init.factors for part in parts if hasattr(part.init, "factors")]
    if not makers:
        return 0
    factors = jax.eval_shape(makers[0], params, None)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(factors))


def _example(task: Task, batch: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    """Shape [1, ...] and dtype of a model input."""
    inputs = _model_input(task, batch)
    return jax.ShapeDtypeStruct((1, *inputs.shape[1:]), inputs.dtype)


def _layout(model: nn.Module, example: jax.ShapeDtypeStruct) -> Layout:
    return layout(model, _variables(model, example), example)


def _variables(model: nn.Module, example: jax.ShapeDtypeStruct) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0), example)
