"""Sophia against the runs of Optax's own, probe by probe, and against Optax itself."""

import jax
import numpy as np
import optax
import pytest
from small_problems import assert_trees_close, net_batch, net_loss, net_params
from trajectories import Run, assert_same, follow, recorded

import curvax as cx

OPTIONS = {
    "learning_rate": "learning_rate",
    "b1": "b1",
    "b2": "b2",
    "eps": "eps",
    "gamma": "gamma",
    "clip_threshold": "threshold",
    "update_interval": "every",
    "weight_decay": "weight_decay",
}


@pytest.mark.parametrize("path", recorded("sophia_*"))
def test_sophia_h_follows_optax(path):
    run = Run(path)
    known = {ours: run.hyper[theirs] for theirs, ours in OPTIONS.items() if theirs in run.hyper}
    assert set(run.hyper) <= set(OPTIONS) | {"random_seed_key"}
    method = lambda z: cx.sophia_h(**known, sampler=lambda key, tree: z)
    params, _ = follow(run, method, run.tree("z"))
    trajectory, _ = run.tolerances
    assert_same(params, run.params, trajectory)


def test_sophia_h_is_optax_sophia_on_the_same_probes():
    """Every option that differs from its default, over several refreshes."""
    params, batch = net_params(), net_batch()
    loss = lambda p: net_loss(p, batch)
    seen = []

    def signs(updates, state, params=None, obj_fn=None, **extra):
        key, draw = jax.random.split(state)
        z = cx.rademacher(draw, params)
        seen.append(draw)
        product = jax.jvp(jax.grad(obj_fn), (params,), (z,))[1]
        return jax.tree.map(lambda a, b: a * b, z, product), key

    theirs = optax.contrib.sophia(
        0.1,
        b1=0.8,
        b2=0.7,
        eps=1e-3,
        gamma=0.3,
        clip_threshold=0.5,
        update_interval=3,
        weight_decay=0.2,
        hessian_diagonal_fn=optax.GradientTransformationExtraArgs(
            lambda params: jax.random.key(2), signs
        ),
    )
    state, current, path = theirs.init(params), params, []
    with jax.disable_jit():
        for _ in range(8):
            updates, state = theirs.update(jax.grad(loss)(current), state, current, obj_fn=loss)
            path.append(updates)
            current = optax.apply_updates(current, updates)
    assert len(seen) == 3

    def ours(draw):
        return cx.sophia_h(
            0.1, 0.8, 0.7, eps=1e-3, gamma=0.3, threshold=0.5, every=3, weight_decay=0.2,
            sampler=lambda key, tree: cx.rademacher(draw, tree),
        )  # fmt: skip

    state, current = ours(seen[0]).init(params), params
    for t, expected in enumerate(path):
        tx = ours(seen[t // 3])
        updates, state = tx.update(jax.grad(loss)(current), state, current, value_fn=loss)
        assert_trees_close(updates, expected, 1e-11)
        current = optax.apply_updates(current, updates)
    clipped = float(cx.diagnostics(state)["clipped"])
    assert 0 < clipped < 1
    assert np.isfinite(clipped)
