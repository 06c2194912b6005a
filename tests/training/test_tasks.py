"""Tasks other than image classification: their losses, scores and limits."""

import json
from typing import Any

import flight_table
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from jax.flatten_util import ravel_pytree
from sklearn.metrics import roc_auc_score

import curvax
from curvax.training import loop, selection_metric, tasks
from curvax.training.compare import comparison, report
from curvax.training.config import configs as config
from curvax.training.data import flights
from curvax.training.experiment import build
from curvax.training.runtime import run_dir
from curvax.training.step import objective

MODELS = {
    "images": ("mlp", {"widths": (8,)}),
    "autoencoder": ("autoencoder_tiny", {"widths": (8,), "code": 3}),
    "regression": ("mlp", {"widths": (8,)}),
    "language": ("lm_tiny", {"width": 8, "depth": 1, "heads": 2, "mlp_width": 8}),
    "clicks": (
        "dlrm",
        {"categories": flight_table.COUNTS, "width": 4, "bottom": (6,), "top": (6,)},
    ),
}
DATA = {
    "autoencoder": "digits",
    "regression": "diabetes",
    "language": "pydoc",
    "clicks": "flights",
}
NEW = list(DATA)
FEW_TABLES = [task for task in MODELS if task != "clicks"]
"""Without the model that takes longest to compile, whose likelihood is the autoencoder's."""
APART = "partition({True: adagrad(lr), False: adahessian(lr)}, embeddings)"
OPTIMIZERS = {"clicks": APART}


@pytest.fixture(scope="module", autouse=True)
def _table(tmp_path_factory):
    """A small table of flights in the place of the package's."""
    path = flight_table.write(tmp_path_factory.mktemp("data") / "a.zip", flight_table.rows())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(flights, "packaged_file", lambda *names: path)
        yield


def tiny(task, **fields):
    """A run of 12 steps of the task."""
    own = config.defaults(lr=1e-2)
    name, options = MODELS[task]
    own.model = {"name": name, "options": options}
    own.data.update(name=DATA.get(task, "digits"), num_train=64, seq_len=8)
    own.update(
        name="tiny", task=task, devices=1, batch=16, epochs=3, log_every=1, hessian_examples=16
    )
    own.update(optimizer=OPTIMIZERS.get(task, "adam(lr)"), baseline="sgd(lr)")
    own.update(fields)
    return own


@pytest.fixture(scope="module", params=NEW)
def experiment(request):
    return build(tiny(request.param))


# Losses written out by hand: of outputs and labels, averaged over examples (and over their bytes).
BITS = lambda z, y: (np.log1p(np.exp(z)) - y * z).reshape(len(z), -1).sum(-1).mean()
LOSSES = {
    "images": lambda z, y: -np.sum(y * np.asarray(jax.nn.log_softmax(z)), -1).mean(),
    "autoencoder": BITS,
    "clicks": BITS,
    "regression": lambda z, y: 0.5 * ((z - y) ** 2).sum(-1).mean(),
    "language": lambda z, y: (
        -np.take_along_axis(np.asarray(jax.nn.log_softmax(z)), y[..., None], -1).mean()
    ),
}


@pytest.mark.parametrize("task", FEW_TABLES)
def test_training_loss_is_the_likelihood_of_the_task(task):
    experiment = build(tiny(task))
    state, batch = experiment.init(), next(experiment.batches())
    batch = experiment.task.in_test(batch)
    state = state._replace(params=jax.tree.map(lambda x: x + 0.1, state.params))
    clean = objective(experiment.model, experiment.task, {}, batch, state.key)
    outputs = experiment.model.apply({"params": state.params}, batch["input"])
    expected = LOSSES[task](np.asarray(outputs, np.float64), np.asarray(batch["label"]))
    (loss, (_, scores)), _ = clean.value_and_grad(state.params)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert scores.keys() == experiment.task.scores.keys()


def test_curvature_products_of_a_task_have_model_and_loss(experiment):
    state, batch = experiment.init(), next(experiment.batches())
    draw = lambda key: lambda x: jax.random.normal(jax.random.key(key + x.size), x.shape, x.dtype)
    v = jax.tree.map(draw(1), state.params)
    params = jax.tree.map(lambda x: x + 0.1 * draw(2)(x), state.params)

    def product(oracle, microbatch):
        def of(params, v):
            task, key = experiment.task, jax.random.key(0)
            whole = objective(experiment.model, task, {}, batch, key, microbatch)
            return ravel_pytree(oracle(whole, params)(v))[0]

        return jax.jit(of)(params, v)

    ggn = product(curvax.ggnvp, None)
    size = float(jnp.abs(ggn).max())
    assert size > 0
    np.testing.assert_allclose(product(curvax.ggnvp, 4), ggn, atol=1e-5 * size)
    np.testing.assert_allclose(product(curvax.fvp, None), ggn, atol=1e-5 * size)


def test_test_scores_in_batches_are_those_of_all_outputs(experiment):
    state, split = experiment.init(), experiment.data.test
    experiment.config.eval_batch = 50  # does not divide any
    found = experiment.test(state)
    inputs, labels = (jnp.asarray(part) for part in split)
    if experiment.config.task == "autoencoder":
        assert np.array_equal(inputs, labels)
    outputs = experiment.model.apply({"params": state.params}, inputs)
    expected = LOSSES[experiment.config.task](np.asarray(outputs, np.float64), np.asarray(labels))
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    if experiment.config.task == "language":
        hits = float(jnp.mean(outputs.argmax(-1) == labels))
        assert found["accuracy"] == pytest.approx(hits, abs=1e-6)
    if experiment.config.task == "regression":
        assert found["squared_error"] == pytest.approx(2 * found["loss"], rel=1e-5)
    if experiment.config.task == "clicks":
        hits = float(jnp.mean((outputs > 0) == labels))
        assert found["accuracy"] == pytest.approx(hits, abs=1e-6)
        assert split.size % 32  # no chunk of all devices divides it
        assert found["auc"] == pytest.approx(roc_auc_score(labels, outputs), abs=1e-9)
        assert experiment.task.metric.best([0.5, found["auc"], 0.25]) == max(0.5, found["auc"])


def test_training_step_of_a_regression_is_sgd_on_its_loss():
    experiment = build(tiny("regression", optimizer="sgd(0.1)"))
    state, batch = experiment.init(), next(experiment.batches())

    def loss(params):
        z = experiment.model.apply({"params": params}, batch["input"])
        return 0.5 * jnp.sum((z - batch["label"]) ** 2) / 16

    grads = jax.grad(loss)(state.params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads)
    state, _ = experiment.step(state, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, expected)


def test_an_interrupted_run_resumes_bit_for_bit(experiment, tmp_path, monkeypatch):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    loop.fit(experiment, whole)
    settle = loop._Trainer.settle

    def interrupted(self, step, names):
        if step == 6:
            raise KeyboardInterrupt
        return settle(self, step, names)

    with monkeypatch.context() as patched:
        patched.setattr(loop._Trainer, "settle", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.fit(experiment, parted)
    loop.fit(experiment, parted)
    assert (parted / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    figures, wanted = (json.loads((f / "results.json").read_text()) for f in (parted, whole))
    assert figures | {"seconds": 0} == wanted | {"seconds": 0}
    assert {"test_loss", "lambda_max", "train_loss"} <= figures.keys()
    assert experiment.task.metric.result_key in figures


@pytest.mark.parametrize("task", FEW_TABLES[1:])
def test_gauss_newton_trains_every_task(task):
    text = "gauss_newton(1.0, damping=1.0, solver=cg(5))"
    experiment = build(tiny(task, optimizer=text, microbatch=8))
    state, batch = experiment.init(), next(experiment.batches())
    _, before = experiment.step(state, batch)
    assert bool(before.finite.all())


@pytest.mark.parametrize(
    ("task", "fields", "words"),
    [
        ("images", {"task": "speech"}, "images, contrastive, .*clicks, .*`speech`"),
        ("regression", {"loss": "softmax"}, "squared for the task `regression`.*`softmax`"),
        ("images", {"loss": "squared"}, "softmax, sigmoid for the task `images`"),
        ("language", {"data.label_noise": 0.2}, "`data.label_noise` is for labelled images"),
        ("autoencoder", {"data.augment": ["flip()"]}, "`data.augment` is for labelled images"),
        ("autoencoder", {"data.name": "diabetes"}, "no data set `diabetes`"),
        ("regression", {"data.name": "digits"}, "`digits`"),
        ("regression", {"data.path": "own.csv"}, "own.csv"),
        ("clicks", {"data.name": "digits"}, "`flights`.*`digits`"),
        ("clicks", {"loss": "softmax"}, "sigmoid for the task `clicks`"),
        ("clicks", {"model.name": "dlrm"}, "`categories` has the number"),
        ("clicks", {"model.options.categories": (4, 3)}, r"\(4, 3\) where .*\(4, 3, 5, 6, 3, 7\)"),
        ("language", {"data.name": "digits"}, "`pydoc`.*`digits`"),
        ("language", {"data.seq_len": 0}, "windows of 0 bytes"),
        ("autoencoder", {"model.name": "mlp"}, "`mlp` was built with None"),
        ("images", {"model.name": "autoencoder"}, "`autoencoder` was built with 10"),
    ],
)
def test_fields_that_do_not_fit_the_task_are_refused(task, fields, words):
    own = tiny(task)
    own.model.options = {}
    own.update_from_flattened_dict(fields)
    with pytest.raises(ValueError, match=words):
        build(own)


def test_image_classification_trains_on_soft_labels():
    own = comparison.replace(tiny_run.get_config(), optimizer="sgd(0.1)")
    own.data.update(label_smoothing=0.1, augment=["mixup(1.0, 0.5)"])
    experiment = build(own)
    batch = experiment.task.in_training(jax.random.key(0), next(experiment.batches()))
    np.testing.assert_allclose(batch["label"].sum(-1), 1, rtol=1e-6)
    assert ((batch["label"] > 0.01) & (batch["label"] < 0.9)).any()
    state = experiment.init()
    clean = objective(experiment.model, experiment.task, {}, batch, state.key)
    value, (_, scores) = clean.value_and_grad(state.params)[0]
    logits = experiment.model.apply(
        {"params": state.params}, batch["input"], train=True, rngs={"dropout": state.key}
    )
    expected = optax.softmax_cross_entropy(logits, batch["label"]).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert 0 <= float(scores["accuracy"]) <= 1


def test_embeddings_and_the_rest_have_their_own_methods():
    """Adagrad's equation on the tables, AdaHessian on the loss of all other parameters."""
    experiment = build(tiny("clicks"))
    state, batch = experiment.init(), next(experiment.batches())
    parts = lambda tree, keep: {k: x for k, x in tree.items() if k.startswith("table") is keep}
    adahessian = curvax.adahessian(1e-2)

    @jax.jit
    def expected(params):
        tables, rest = parts(params, True), parts(params, False)

        def loss(rest, tables):
            z: Any = experiment.model.apply({"params": tables | rest}, batch["input"])
            return jnp.mean(jnp.logaddexp(0.0, z) - batch["label"] * z)

        of_rest, of_tables = jax.grad(loss, (0, 1))(rest, tables)
        inside = lambda rest: loss(rest, tables)
        moved, _ = adahessian.update(of_rest, adahessian.init(rest), rest, value_fn=inside)
        adagrad = lambda g: -1e-2 * g / jnp.sqrt(0.1 + g**2 + 1e-7)  # Optax's start and ε
        return moved | jax.tree.map(adagrad, of_tables)

    before = jax.tree.map(np.asarray, state.params)
    wanted = expected(state.params)
    after = experiment.step(state, batch)[0].params
    found = jax.tree.map(lambda new, old: np.asarray(new) - old, after, before)
    assert found.keys() == wanted.keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found, wanted)
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(found)) > 1e-4


# Metrics and verdicts


def outcome(metric, value):
    figures = {metric.result_key: value, "train_examples": 64, "seconds": 1.0}
    return [run_dir.Outcome(figures, [{"step": 1, metric.log_key: value - 0.25}])]


def test_verdict_and_best_follow_a_metric_where_less_is_better():
    own = tiny("language")
    task = tasks.build(own)
    arms = {"a": outcome(task.metric, 2.5), "b": outcome(task.metric, 2.25)}
    words = report.verdict(own, task, arms)
    assert "64 windows of pydoc" in words
    assert "`b` predicts the test text at 2.250 nats a byte (2.000 at its best epoch)" in words
    assert "0.250 nats ahead" in words
    assert "0.250 nats behind" in report.verdict(own, task, dict(reversed(arms.items())))
    scores = comparison.score(arms, task.metric)
    assert report.gains(scores, task.metric) == "b: -0.250 nats against a."
    better = comparison.with_better_baseline({"x": arms["a"], "y": arms["b"]}, task.metric)
    assert better["x, better of both"] == arms["b"]


@pytest.mark.parametrize("task", MODELS)
def test_table_of_a_run_has_the_metric_of_its_task(task):
    assert tasks.build(tiny(task)).metric.result_key in report.ROWS


def test_best_of_a_metric_ignores_nan():
    assert selection_metric.CLASSIFICATION.best([0.5, float("nan"), 0.75]) == 0.75
    assert selection_metric.LANGUAGE.best([0.5, float("nan"), 0.75]) == 0.5
    assert np.isnan(selection_metric.LANGUAGE.best([]))


def test_three_methods_get_a_verdict_without_a_lead():
    own = tiny("regression")
    task = tasks.build(own)
    arms = {name: outcome(task.metric, 0.5) for name in "abc"}
    words = report.verdict(own, task, arms)
    assert all(f"`{name}` predicts the test targets" in words for name in "abc")
    assert "At the end" not in words


def test_verdict_says_when_the_lowest_loss_of_the_baseline_was_reached():
    own = tiny("regression")
    task = tasks.build(own)

    def run(*losses):
        records = [{"step": step, "train/loss": loss} for step, loss in enumerate(losses, 1)]
        figures = {task.metric.result_key: 1.0, "train_examples": 64, "steps": 3}
        return [run_dir.Outcome(figures, records)]

    arms = {"a": run(3.0, 1.0, 2.0), "b": run(1.5, 0.75, 0.5), "c": run(3.0, 2.0, 1.5)}
    words = report.verdict(own, task, arms)
    assert "`b` reached the lowest training loss of the baseline, 1, at step 2 of 3." in words
    assert "`c` reached the lowest" not in words
