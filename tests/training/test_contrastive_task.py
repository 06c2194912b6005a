"""The task `contrastive`: two views, the projection head, the linear probe, and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax as cx
from curvax import models
from curvax.arithmetic.trees import names
from curvax.training import linear_probe, loop, parallelism
from curvax.training.config import configs
from curvax.training.experiment import build, outline
from curvax.training.linear_probe import Features
from curvax.training.runtime.errors import ConfigError
from curvax.training.step import objective


def tiny(task="contrastive", augment=("shift_crop(1)",), **fields):
    config = configs.defaults(lr=1e-2)
    config.model = {"name": "mlp", "options": {"widths": (16, 8)}}
    config.data.update(name="digits", num_train=64, augment=list(augment))
    config.update(
        name="tiny", task=task, devices=1, batch=16, epochs=1, log_every=1, hessian_examples=16
    )
    config.update(optimizer="sam_perturb(0.05) | adam(lr)", baseline="adam(lr)")
    config.update(fields)
    return config


@pytest.fixture(autouse=True)
def _as_users_have_it(single_precision):
    pass


@pytest.fixture(scope="module")
def experiment():
    with jax.enable_x64(False):
        return build(tiny())


def test_a_batch_has_two_views_of_each_image_by_two_draws(experiment):
    batch = next(experiment.batches())
    seen = experiment.task.in_training(jax.random.key(0), batch)
    assert seen["input"].shape == (16, 2, 8, 8, 1)
    assert seen["label"].shape == (16, 10)
    one, other = seen["input"][:, 0], seen["input"][:, 1]
    moved = np.any(np.asarray(one != other), axis=(1, 2, 3))
    assert 0.5 < moved.mean() < 1  # of nine places each, one in nine is the same
    plain = build(tiny("images", augment=())).task.in_training(jax.random.key(0), batch)
    unmoved = build(tiny(augment=())).task.in_training(jax.random.key(0), batch)
    np.testing.assert_array_equal(unmoved["input"][:, 0], plain["input"])
    np.testing.assert_array_equal(unmoved["input"][:, 1], plain["input"])


def test_training_loss_is_the_contrastive_loss_of_the_views(experiment):
    state, batch = experiment.init(), next(experiment.batches())
    seen = experiment.task.in_training(jax.random.key(0), batch)
    value = objective(experiment.model, experiment.task, {}, seen, state.key)(state.params)
    encoder = models.build("mlp", 0, widths=(16, 8))
    represent = lambda x: jnp.asarray(encoder.apply({"params": state.params}, x))
    h = jnp.stack([represent(seen["input"][:, view]) for view in (0, 1)], axis=1)
    head = state.params["head"]
    hidden = jax.nn.relu(h @ head["hidden"]["kernel"] + head["hidden"]["bias"][None, None])
    z = hidden @ head["projection"]["kernel"]
    assert z.shape == (16, 2, 128)
    expected = cx.supervised_contrastive("label", temperature=0.1)(z, {"label": batch["label"]})
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_temperature_is_a_field_of_the_config(experiment):
    cold = build(tiny(temperature=1.0))
    state, batch = cold.init(), next(cold.batches())
    values = [e.scores(state.params, {}, batch | {"mask": np.ones(16, bool)})["loss"]
              for e in (cold, experiment)]  # fmt: skip
    assert values[0] != pytest.approx(float(values[1]), rel=1e-3)


def test_probe_is_the_logistic_regression_of_the_representation(experiment):
    state = experiment.init()
    encoder = models.build("mlp", 0, widths=(16, 8))

    def by_hand(split):
        batch = experiment.task.in_test({"input": jnp.asarray(split.inputs), "label": split.labels})
        features = encoder.apply({"params": state.params}, batch["input"][:, 0])
        return Features(np.asarray(features), split.labels)

    experiment.config.eval_batch = 50  # does not divide any
    train, test = experiment.data.train, experiment.data.test
    expected = linear_probe.accuracy(by_hand(train), by_hand(test))
    assert experiment.test(state)["accuracy"] == pytest.approx(expected, abs=2e-3)
    assert experiment.score(state, train)["accuracy"] > expected > 0.3


def test_probe_separates_what_planes_separate():
    x = np.random.default_rng(0).normal(size=(90, 3))
    label = x[:, 0].argsort().argsort() // 30  # three slabs
    x[:, 0] += 10 * label
    few = Features(1e-3 * x, label)
    assert linear_probe.accuracy(few, few) == 1.0
    # Two crossing diagonals need a curve.
    corners = np.array([[0, 0], [1, 1], [0, 1], [1, 0]] * 20, float)
    crossed = Features(corners, np.array([0, 0, 1, 1] * 20))
    assert linear_probe.accuracy(crossed, crossed) <= 0.75


def test_a_run_ends_with_the_probes_accuracy_and_resumes(experiment, tmp_path):
    done = loop.fit(experiment, tmp_path)
    assert {"test_accuracy", "train_accuracy", "test_loss", "lambda_max"} <= done.metrics.keys()
    assert experiment.task.metric.result_key == "test_accuracy"
    assert "test/accuracy" in {name for record in done.records for name in record}
    assert loop.fit(experiment, tmp_path).metrics == done.metrics


@pytest.mark.parametrize("tasks", [("contrastive", "images"), ("images", "contrastive")])
def test_a_contrastive_run_and_a_classifier_read_each_others_weights(tasks, tmp_path):
    short = {"optimizer": "sgd(lr)", "epochs": 1, "hessian_examples": 0}
    loop.fit(build(tiny(tasks[0], **short)), tmp_path)
    trained = build(tiny(tasks[1], init_from=str(tmp_path), **short)).trained()["params"]
    assert trained.keys() == {"layer0", "layer1"}  # not the head


MODELS = {
    "mixer_tiny": {"depth": 1, "scan": True, "width": 8, "token_width": 4, "channel_width": 8},
    "vit_tiny": {"depth": 1, "scan": False, "width": 8, "heads": 2, "mlp_width": 8},
    "resnet8": {"width": 4},
    "wrn10_1": {},
}


@pytest.mark.parametrize("name", MODELS)
def test_every_image_model_has_a_representation(name):
    encoder = models.build(name, 0, **MODELS[name])
    whole = models.build(name, 10, **MODELS[name])
    net = models.ProjectionNet(encoder=encoder, outputs=5)
    x = jax.ShapeDtypeStruct((3, 2, 8, 8, 1), jnp.float32)
    outputs, variables = jax.eval_shape(lambda key, x: net.init_with_output(key, x), KEY, x)
    assert outputs.shape == (3, 2, 5)
    plain = jax.eval_shape(whole.init, KEY, jax.ShapeDtypeStruct((6, 8, 8, 1), jnp.float32))
    shapes = lambda tree: {
        names(path): x.shape
        for path, x in jax.tree.leaves_with_path(tree)
        if "head" not in names(path)
    }
    assert shapes(variables) == shapes(plain)


KEY = jax.random.key(0)
DEVICES = 8


@pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs eight devices")
def test_devices_take_the_steps_of_one():
    text = "sam_perturb(0.05, sync_over=axes) | pmean_updates(axes) | sgd(lr)"

    def stepped(**fields):
        experiment = build(tiny(optimizer=text, **fields))
        state, batches = experiment.init(), experiment.batches()
        for _ in range(2):
            batch = experiment.parallelism.place(next(batches))
            state, measured = experiment.step(state, batch)
        return jax.device_get((state.params, measured.metrics["loss"]))

    one, many = stepped(), stepped(parallelism="shard_map", devices=DEVICES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, many)


def test_batch_norm_in_groups_is_found_inside_of_the_encoder():
    config = tiny(optimizer="per_group(4, sam_perturb(0.05)) | sgd(lr)")
    config.model = {"name": "resnet8", "options": {"width": 4}}
    outline(config, jax.devices()[:1])


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"loss": "softmax"}, "`loss` is set"),
        ({"augment": ["mixup()"]}, "`mixup` in `data.augment` is set"),
        (
            {"optimizer": "per_group(4, sam_perturb(0.05)) | pmean_updates(axes) | sgd(lr)",
             "parallelism": "shard_map"},
            "groups of the same number on other devices",
        ),
        ({"temperature": 0.0}, "must be positive and finite"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused(fields, cause):
    with pytest.raises((ConfigError, ValueError), match=cause):
        build(tiny(**fields))


def test_label_smoothing_is_refused():
    config = tiny()
    config.data.label_smoothing = 0.1
    with pytest.raises(ConfigError, match=r"`data\.label_smoothing` is set"):
        build(config)


def test_groups_of_a_config_are_found():
    config = tiny(optimizer="per_group(4, sam_perturb(0.05)) | sgd(lr)")
    assert parallelism.group_sizes(config) == {4}
    build(config)
