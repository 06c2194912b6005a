"""Runs kfac-jax's optimiser in a process of its own, since it needs an older JAX than curvax.

    python kfac_jax_run.py < jobs.json

reads a list of jobs {"task", "widths", "damping", "seed", "target", "steps"} and prints, for each,
the JSON [steps to the target, seconds of them]. Compilation is apart.
"""

import functools
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import kfac_jax
import mnist_networks


def loss(network: Any, task: str, params: Any, batch: Any) -> jax.Array:
    z = network.apply({"params": params}, batch["x"])
    if task == "autoencoder":
        kfac_jax.register_multi_bernoulli_predictive_distribution(z, batch["x"])
        cross = jnp.maximum(z, 0) - z * batch["x"] + jnp.log1p(jnp.exp(-jnp.abs(z)))
        return jnp.mean(jnp.sum(cross, axis=1))
    kfac_jax.register_softmax_cross_entropy_loss(z, batch["y"])
    return -jnp.mean(jax.nn.log_softmax(z)[jnp.arange(len(z)), batch["y"]])


def run(
    task: str, widths: Sequence[int], damping: float, seed: int, target: float, steps: int
) -> tuple[int, float]:
    """(steps until the loss is at the target, seconds of them)."""
    network, batch = mnist_networks.Network(widths), mnist_networks.images()
    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(functools.partial(loss, network, task)),
        l2_reg=0.0,
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=True,
        initial_damping=damping,
        multi_device=False,
        num_burnin_steps=0,
    )

    def descend(count: int) -> tuple[int, float]:
        params = network.init(jax.random.key(seed), batch["x"])["params"]
        state, began = optimizer.init(params, jax.random.PRNGKey(seed), batch), time.perf_counter()
        for step in range(count):
            key = jax.random.PRNGKey(1000 * seed + step)
            params, state, stats = optimizer.step(
                params, state, key, batch=batch, global_step_int=step
            )
            if float(stats["loss"]) <= target:
                return step, time.perf_counter() - began
        return count, time.perf_counter() - began

    descend(12)
    return descend(steps)


if __name__ == "__main__":
    for job in json.load(sys.stdin):
        print(json.dumps(run(**job)), flush=True)
