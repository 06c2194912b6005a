#!/usr/bin/env bash
# The gradient of a convolution is some fifty times slower inside `lax.cond` than outside of it, on
# a CPU: jax 0.10.2.
#
# Channels last (NHWC, HWIO), as Flax has them; the forward pass alone takes the same time in both
# places, so that timing it shows nothing. The derivative in the kernel is a convolution of another
# layout, which seems to be brought into the layout of XLA's fast code outside of control flow only.
# In `lax.fori_loop` it is as slow. What is concerned: steps that take a second gradient only now and
# then, gradients accumulated over micro-batches, attacks of several steps.
# Fails where it is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat > "$folder/clock.py" <<'PYTHON'
import time
import jax, jax.numpy as jnp
from jax import lax

jax.config.update("jax_platforms", "cpu")

def loss(kernel, x):
    for _ in range(3):
        layout = ("NHWC", "HWIO", "NHWC")
        x = jax.nn.relu(lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout))
    return jnp.mean(x**2)

def in_cond(f, otherwise):
    return lambda flag, *args: lax.cond(flag, f, otherwise, *args)

def milliseconds(f, *args):
    jax.block_until_ready(f(*args))
    times = []
    for _ in range(9):
        began = time.perf_counter()
        jax.block_until_ready(f(*args))
        times.append(time.perf_counter() - began)
    return 1e3 * sorted(times)[4]

kernel = 0.1 * jax.random.normal(jax.random.key(0), (3, 3, 16, 16))
x = jax.random.normal(jax.random.key(1), (64, 8, 8, 16))
gradient = jax.grad(loss)
outside = milliseconds(jax.jit(gradient), kernel, x)
inside = milliseconds(jax.jit(in_cond(gradient, lambda kernel, x: kernel)), True, kernel, x)
forward = milliseconds(jax.jit(loss), kernel, x)
forward_inside = milliseconds(jax.jit(in_cond(loss, lambda kernel, x: 0.0)), True, kernel, x)
print(f"jax {jax.__version__}: gradient {outside:.1f} ms, in lax.cond {inside:.1f} ms; "
      f"forward pass {forward:.1f} ms, in lax.cond {forward_inside:.1f} ms")
assert inside > 10 * outside
assert forward_inside < 3 * forward
PYTHON
"$folder/venv/bin/python" "$folder/clock.py"
# Seen: jax 0.10.2: gradient 1.8 ms, in lax.cond 103.6 ms; forward pass 0.7 ms, in lax.cond 0.7 ms
