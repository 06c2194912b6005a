"""Steps of two models by curvax, by other libraries and by hand, and clocks of programs in turn."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from step_costs import VIT, Perceptron

import curvax as cx
from curvax.models import build

MODELS = {
    "MLP 784-512×3-10, batch 256": (Perceptron, (256, 784)),
    "ViT 4×192, batch 16": (lambda: build("vit_tiny", scan=False, **VIT), (16, 32, 32, 3)),
}


class Problem:
    def __init__(self, name):
        make, shape = MODELS[name]
        model, keys = make(), jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], shape)
        self.batch = {"x": x, "y": jax.random.randint(keys[1], shape[:1], 0, 10)}
        self.params = model.init(keys[2], x)["params"]
        self.apply = lambda params, x: model.apply({"params": params}, x)

    def loss(self, params, batch):
        logits = self.apply(params, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    def curvax_step(self, tx):
        def step(params, state):
            objective = cx.Objective(self.loss, self.batch)
            _, grads = objective.value_and_grad(params)
            updates, state = tx.update(grads, state, params, value_fn=objective)
            return optax.apply_updates(params, updates), state

        return step, tx.init(self.params)

    def optax_sam(self):
        tx = optax.contrib.sam(
            optax.sgd(0.1),
            optax.chain(optax.contrib.normalize(), optax.sgd(0.05)),
            opaque_mode=True,
        )

        def step(params, state):
            gradient = jax.grad(lambda p: self.loss(p, self.batch))
            updates, state = tx.update(
                gradient(params), state, params, grad_fn=lambda p, _: gradient(p)
            )
            return optax.apply_updates(params, updates), state

        return step, tx.init(self.params)

    def sam_by_hand(self, *, measuring=False):
        """Two gradients and nothing else, or also the norm and the cosine that curvax records."""
        tx = optax.sgd(0.1)

        def step(params, state):
            gradient = jax.grad(lambda p: self.loss(p, self.batch))
            g = gradient(params)
            length = optax.tree.norm(g)
            worst = jax.tree.map(lambda p, x: p + 0.05 * x / length, params, g)
            g_p = gradient(worst)
            measured = (optax.tree.norm(g_p), optax.tree.vdot(g, g_p)) if measuring else ()
            updates, inner = tx.update(g_p, state[0], params)
            return optax.apply_updates(params, updates), (inner, measured)

        return step, (tx.init(self.params), (jnp.zeros(()), jnp.zeros(())) if measuring else ())

    def adahessian_by_hand(self):
        """jvp of value_and_grad, JAX's own signs, moments and step written out."""

        def step(params, state):
            t, m, v, key = state
            key, draw = jax.random.split(key)
            leaves, treedef = jax.tree.flatten(params)
            keys = jax.random.split(draw, len(leaves))
            signs = [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves)]
            z = jax.tree.unflatten(treedef, signs)
            both = jax.value_and_grad(lambda p: self.loss(p, self.batch))
            (_, g), (_, hz) = jax.jvp(both, (params,), (z,))
            m = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, m, g)
            v = jax.tree.map(lambda a, b, c: 0.999 * a + 0.001 * (b * c) ** 2, v, z, hz)
            scale = lambda p, a, b: (
                p - 1e-3 * (a / (1 - 0.9**t)) / (jnp.sqrt(b / (1 - 0.999**t)) + 1e-4)
            )
            return jax.tree.map(scale, params, m, v), (t + 1, m, v, key)

        zeros = jax.tree.map(jnp.zeros_like, self.params)
        return step, (jnp.ones(()), zeros, zeros, jax.random.key(0))

    def optax_sophia(self):
        tx = optax.contrib.sophia(1e-3, update_interval=1)

        def step(params, state):
            loss = lambda p: self.loss(p, self.batch)
            updates, state = tx.update(jax.grad(loss)(params), state, params, obj_fn=loss)
            return optax.apply_updates(params, updates), state

        return step, tx.init(self.params)

    def somax(self):
        somax = pytest.importorskip("somax", reason="pip install python-somax")
        method = somax.adahessian(loss_fn=self.loss, learning_rate=1e-3)
        return (
            lambda params, state: (
                method.step(params, self.batch, state[0], state[1])[:1] + (state,)
            ),
            (method.init(self.params), jax.random.key(0)),
        )


def against(clocks, name, base):
    return float(np.median(clocks[name] / clocks[base]))


def in_turn(programs, *args, rounds):
    """Seconds of each program, [rounds], all in turn; and what they return."""
    results = {name: jax.block_until_ready(f(*args)) for name, f in programs.items()}
    clocks = {name: np.empty(rounds) for name in programs}
    for turn in range(rounds):
        for name, f in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(f(*args))
            clocks[name][turn] = time.perf_counter() - began
    return clocks, results
