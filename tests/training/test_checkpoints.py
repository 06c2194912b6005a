"""What a checkpoint keeps, and what its errors name."""

import jax
import jax.numpy as jnp
import pytest
from short_runs import assert_same_bits, changed

from curvax.training import checkpoints
from curvax.training.checkpoints import CheckpointError, Checkpoints
from curvax.training.experiment import build


def test_checkpoint_keeps_keys_of_the_optimiser_state(tmp_path):
    experiment = build(changed(optimizer="adahessian(lr, key=seed)", seed=7))
    state = experiment.init()
    keys = [x for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.uint32]
    assert len(keys) == 1
    Checkpoints(tmp_path).save(state, {"next": [1, 2]})
    restored, place = Checkpoints(tmp_path).restore(
        build(changed(optimizer="adahessian(lr)")).init()
    )
    assert_same_bits(restored, state)
    assert place == {"next": [1, 2]}


def test_a_checkpoint_with_typed_keys_of_an_earlier_version_is_read(tmp_path):
    experiment = build(changed(optimizer="adahessian(lr, key=seed)", seed=7))
    state = experiment.init()
    typed = lambda x: jax.random.wrap_key_data(x) if x.dtype == jnp.uint32 else x
    Checkpoints(tmp_path).save(state._replace(opt_state=jax.tree.map(typed, state.opt_state)), {})
    restored, _ = Checkpoints(tmp_path).restore(experiment.shapes)
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert kinds(restored) == kinds(state)
    assert_same_bits(restored, state)


def test_checkpoint_keeps_empty_arrays(tmp_path):
    experiment = build(changed())
    empty = {"seen": jnp.zeros((0, 3)), "ids": jnp.zeros(0, jnp.int32)}
    state = experiment.init()._replace(model_state=empty)
    Checkpoints(tmp_path).save(state, {})
    restored, _ = Checkpoints(tmp_path).restore(state)
    assert_same_bits(restored, state)
    assert restored.model_state["seen"].shape == (0, 3)
    assert restored.model_state["ids"].dtype == jnp.int32


def test_leaves_of_colliding_names_are_refused_by_name(tmp_path):
    twice = {"a.b": jnp.ones(3), "a": {"b": jnp.zeros(3)}}
    state = build(changed()).init()._replace(model_state=twice)
    with pytest.raises(CheckpointError, match=r"`model_state\.a\.b`.*disk is not the cause"):
        Checkpoints(tmp_path).save(state, {})


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (OSError(28, "No space left on device"), "Make room"),
        (OSError(122, "Disk quota exceeded"), "Make room"),
        (ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device"), "Make room"),
        (PermissionError(13, "Permission denied"), "Make the folder writable"),
        (ValueError("Unsupported type: <class 'str'> for key: ('a',)."), "disk is not the cause"),
    ],
)
def test_checkpoint_error_gives_its_cause(error, cure, tmp_path, monkeypatch):
    def fail(self, step, **_):
        raise error

    monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "save", fail)
    state = build(changed()).init()
    with pytest.raises(CheckpointError, match=cure) as told:
        Checkpoints(tmp_path).save(state, {})
    assert ("Make room" in str(told.value)) == (cure == "Make room")
    assert str(error.args[-1])[:20] in str(told.value)
