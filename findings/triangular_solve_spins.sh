#!/usr/bin/env bash
# jax and jaxlib 0.10.2, scipy 1.17.1, Python 3.11 or later, a CPU with two cores or more: one solution
# of a 64 × 64 triangular system by `jax.scipy.linalg.solve_triangular` takes less than a
# millisecond, and afterwards a thread of SciPy's OpenBLAS, which jaxlib calls, keeps a core busy for
# about 100 milliseconds, while Python sleeps. XLA's own threads then share that core: training steps
# with a Cholesky solution in them take up to 1.7 times as long. With OPENBLAS_NUM_THREADS=1 nothing
# is left running. `jnp.linalg.cholesky` of the same size leaves nothing running.
# Seen: CPU milliseconds while sleeping 300 ms after one call: cholesky 0, solve_triangular 104;
# with OPENBLAS_NUM_THREADS=1: 0 and 0.
# Fails where it is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --no-compile \
    "jax==0.10.2" "jaxlib==0.10.2" "scipy==1.17.1"
cat > "$work/spin.py" <<'PYTHON'
import os
import time

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

matrix, right = jnp.eye(64) + 0.1, jnp.ones((64, 64))
calls = {
    "cholesky": lambda: jnp.linalg.cholesky(matrix),
    "solve_triangular": lambda: solve_triangular(jnp.tril(matrix), right, lower=True),
}


def left_running(call):
    jax.block_until_ready(call())  # compiles
    time.sleep(0.5)
    jax.block_until_ready(call())
    began = time.process_time()
    time.sleep(0.3)
    return 1000 * (time.process_time() - began)


found = {name: left_running(call) for name, call in calls.items()}
threads = os.environ.get("OPENBLAS_NUM_THREADS", "unset")
print(f"OPENBLAS_NUM_THREADS {threads}:", {name: f"{x:.0f} ms" for name, x in found.items()})
assert found["cholesky"] < 20, "the behaviour has changed"
spins = found["solve_triangular"] > 40
assert spins == (threads == "unset"), "the behaviour has changed"
PYTHON
[ "$(nproc)" -ge 2 ] || { echo "not checked: it takes two cores"; exit 0; }
export JAX_PLATFORMS=cpu
env -u OPENBLAS_NUM_THREADS "$work/venv/bin/python" "$work/spin.py"
OPENBLAS_NUM_THREADS=1 "$work/venv/bin/python" "$work/spin.py"
