"""The README's snippets run as they stand, and Equinox as it says."""

import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import curvax

README = pathlib.Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(
    r"^#+ ([^\n]*)\n(?:(?!^#).)*?^```python\n(.*?)^```", README.read_text(), re.M | re.S
)


@pytest.mark.parametrize(("title", "code"), SNIPPETS, ids=[title for title, _ in SNIPPETS])
def test_snippet(title, code, recwarn):
    names: dict[str, Any] = {}
    # A newcomer's settings, not those of the tests.
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        exec(compile(code, f"README: {title}", "exec"), names)
    assert not recwarn.list
    for name in ("params", "updates"):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(names.get(name, ())))


def test_there_is_a_snippet_for_each_way_of_writing_models():
    assert {"Plain JAX", "Flax linen", "Flax nnx", "Under pmap and shard_map"} <= dict(
        SNIPPETS
    ).keys()


def test_equinox_models_are_trees():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0), activation=jnp.tanh)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, batch):
        predict = jax.vmap(eqx.combine(params, static))
        return jnp.mean((predict(batch[0])[:, 0] - batch[1]) ** 2)

    batch = jnp.arange(24.0).reshape(8, 3) / 24, jnp.ones(8)
    objective = curvax.Objective(loss, batch)
    _, grads = objective.value_and_grad(params)
    for tx in (curvax.sam(optax.identity(), 0.1), curvax.adahessian(0.1)):
        updates, _ = tx.update(grads, tx.init(params), params, value_fn=objective)
        moved = eqx.combine(eqx.apply_updates(params, updates), static)
        assert jnp.isfinite(jax.vmap(moved)(batch[0])).all()
    flat, unravel = ravel_pytree(params)
    g = jax.grad(lambda w: loss(unravel(w), batch))(flat)
    by_hand = jax.grad(lambda w: loss(unravel(w), batch))(flat + 0.1 * g / jnp.linalg.norm(g))
    updates, _ = curvax.sam_perturb(0.1).update(
        grads, curvax.sam_perturb(0.1).init(params), params, value_fn=objective
    )
    np.testing.assert_allclose(ravel_pytree(updates)[0], by_hand, rtol=1e-12)
