#!/usr/bin/env bash
# kfac-jax 0.0.8 (the latest on PyPI), which asks for jax>=0.4.27 without an upper bound, with jax and jaxlib
# 0.9.2: the first `Optimizer.init` on a model of one dense layer raises "ValueError: too many
# values to unpack (expected 2)" from its graph matcher. With jax and jaxlib 0.9.0 the same program
# takes its step.
# Seen: jax 0.9.0: a step; jax 0.9.2: ValueError: too many values to unpack (expected 2).
# Fails where it is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/step.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import kfac_jax


def loss(params, batch):
    outputs = batch["x"] @ params["w"]
    kfac_jax.register_squared_error_loss(outputs, batch["y"])
    return jnp.mean(jnp.sum((outputs - batch["y"]) ** 2, axis=-1))


def result():
    params = {"w": jnp.ones((3, 2))}
    batch = {"x": jnp.arange(12.0).reshape(4, 3), "y": jnp.ones((4, 2))}
    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(loss),
        l2_reg=0.0,
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=True,
        initial_damping=1.0,
        multi_device=False,
        num_burnin_steps=0,
    )
    key = jax.random.PRNGKey(0)
    try:
        state = optimizer.init(params, key, batch)
        optimizer.step(params, state, key, batch=batch, global_step_int=0)
    except ValueError as error:
        return f"ValueError: {str(error).splitlines()[0]}"
    return "a step"


found = result()
print(f"jax {jax.__version__}: {found}")
assert found == sys.argv[1], "the behaviour has changed"
PYTHON
for case in "0.9.0 a step" "0.9.2 ValueError: too many values to unpack (expected 2)"; do
    version=${case%% *}
    python3 -m venv --clear "$work/venv"
    "$work/venv/bin/python" -m pip install --quiet --no-compile \
        "kfac-jax==0.0.8" "jax==$version" "jaxlib==$version"
    JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/step.py" "${case#* }"
done
