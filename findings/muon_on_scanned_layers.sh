#!/usr/bin/env bash
# optax 0.2.8 (optax.contrib.muon) with flax 0.12.8 (nn.scan), jax 0.10.2, Python 3.11 or later: in a
# model of two scanned Dense layers Muon orthogonalises the stacked biases, one matrix over layers
# and features, and takes Adam's step for the stacked kernel, since it selects arrays of exactly two
# axes. Unrolled layers have it the other way round. There is no warning; with
# `muon_weight_dimension_numbers` for the stacked axes the kernel's step is that of its layers.
# Seen, of the first update at rate 1: the kernel's entries all ±1.474, singular values of its first
# layer 6.61 to 0.41; with dimension numbers 1.13 to 0.72. Biases, divided by √(8/2): 1.13 and 0.68.
# Fails where it is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=$(command -v python3)
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --no-compile \
    "jax==0.10.2" "jaxlib==0.10.2" "flax==0.12.8" "optax==0.2.8"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PYTHON'
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from optax import contrib

WIDTH = 8


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(WIDTH)(x)), None


scanned = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()
x = jax.random.normal(jax.random.key(0), (4, WIDTH))
params = scanned.init(jax.random.key(1), x, None)["params"]["Dense_0"]
grads = {name: jax.random.normal(jax.random.key(2), p.shape) for name, p in params.items()}


def update(**options):
    tx = contrib.muon(1.0, **options)
    return tx.update(grads, tx.init(params), params)[0]


def singular_values(matrix):
    return np.linalg.svd(np.asarray(matrix), compute_uv=False)


plain = update()
numbers = {"kernel": contrib.MuonDimensionNumbers(1, 2), "bias": None}
told = update(muon_weight_dimension_numbers=numbers)
kernel, right = singular_values(plain["kernel"][0]), singular_values(told["kernel"][0])
bias = singular_values(plain["bias"]) / np.sqrt(WIDTH / 2)
entries = np.unique(np.abs(plain["kernel"]).round(3))
print("kernel of a scanned layer", kernel.round(2), "entries", entries)
print("with dimension numbers   ", right.round(2))
print("biases of both layers    ", bias.round(2))
assert len(entries) == 1, "the behaviour has changed"
assert kernel[0] / kernel[-1] > 10, "the behaviour has changed"
assert right.min() > 0.5 and right.max() < 1.5, "the behaviour has changed"
assert bias.min() > 0.5 and bias.max() < 1.5, "the behaviour has changed"
PYTHON
