"""SAM, GSAM and LookSAM against their pipes, their special cases and a loop written out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sam_problem import PARAMS, WEIGHTS, step, unravel
from small_problems import assert_trees_close, flat, net_batch, net_loss, quick_jit

import curvax as cx


def test_look_sam_is_its_loop():
    def batch_at(t: Any) -> Any:
        return jax.tree.map(lambda x: x * (1 + 0.1 * t), net_batch())

    def run(params: Any, state: Any, t: Any) -> Any:
        value_fn = cx.Objective(net_loss, batch_at(t))
        _, grads = value_fn.value_and_grad(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    tx = cx.look_sam(optax.sgd(0.05), 0.3, every=3, alpha=0.6)
    gradient = quick_jit(jax.grad(lambda w, t: net_loss(unravel(w), batch_at(t))))
    params, state, w, kept = PARAMS, tx.init(PARAMS), WEIGHTS, np.zeros(WEIGHTS.size)
    run = quick_jit(run)
    for t in range(7):
        params, state = run(params, state, float(t))
        g = gradient(w, float(t))
        if t % 3 == 0:
            u = gradient(w + 0.3 * g / jnp.linalg.norm(g), float(t))
            kept = u - (u @ g) / (g @ g) * g
        else:
            u = g + 0.6 * jnp.linalg.norm(g) * kept / jnp.linalg.norm(kept)
        w = w - 0.05 * u
        np.testing.assert_allclose(flat(params), w, rtol=1e-10, atol=1e-12)


def test_gsam_at_alpha_zero_is_sam():
    for make in (lambda: cx.gsam(optax.adamw(0.1), 0.3, 0.0), lambda: (
        cx.sam_perturb(0.3) | cx.penalize_gap(0.0) | optax.adamw(0.1)
    )):  # fmt: skip
        assert_trees_close(step(make())[0], step(cx.sam(optax.adamw(0.1), 0.3))[0])


BASES = {
    "sgd": lambda: optax.sgd(0.1, 0.9),
    "adamw": lambda: optax.adamw(0.1),
    "adabelief": lambda: optax.adabelief(0.1),
    "adahessian": lambda: cx.adahessian(0.1),
}


@pytest.mark.parametrize("base", BASES)
def test_methods_at_radius_zero_are_their_base(base):
    expected, _ = step(BASES[base]())
    for method in (cx.sam(BASES[base](), 0.0), cx.gsam(BASES[base](), 0.0, 0.4)):
        updates, state = step(method)
        assert_trees_close(updates, expected, tol=1e-10)
        found = cx.diagnostics(state)
        assert found["sigma_max"] == 0
        np.testing.assert_allclose(found["cosine"], 1.0, rtol=1e-6)


def test_methods_are_their_pipes():
    base = lambda: optax.sgd(0.1)
    options: Any = dict(p=3, steps=2, ascent=cx.asam(0.01))
    spelled = {
        "sam": cx.sam_perturb(0.3, **options) | base(),
        "gsam": cx.sam_perturb(0.3, **options) | cx.gsam_project(0.4, onto="clean") | base(),
        "look_sam": (
            cx.sam_perturb(0.3, every=5, **options) | cx.keep_orthogonal(0.7) | base()
        ),
    }  # fmt: skip
    made = {
        "sam": cx.sam(base(), 0.3, **options),
        "gsam": cx.gsam(base(), 0.3, 0.4, onto="clean", **options),
        "look_sam": cx.look_sam(base(), 0.3, **options),
    }
    for name, tx in made.items():
        assert_trees_close(step(tx)[0], step(spelled[name])[0])
