#!/usr/bin/env bash
# Orbax 0.12.8 loses a leaf without a word where two paths of a tree are the same once joined by dots.
#
# orbax-checkpoint names the file entries of a leaf by its path joined with ".", so {"a.b": x} and
# {"a": {"b": y}} in one tree are both "a.b". Where shapes and dtypes agree, saving raises nothing
# and both leaves are restored as one of the two arrays (with other shapes it is an error on saving).
# Flat names with dots, as from PyTorch state dicts, beside nested ones are such trees.
#
# Expected: what was saved, or an error at `save` that names the two leaves.
# Seen with orbax-checkpoint 0.12.8, jax 0.10.2, Python 3.11:
#   saved    {'a': {'b': [0.0, 0.0]}, 'a.b': [1.0, 1.0]}
#   restored {'a': {'b': [0.0, 0.0]}, 'a.b': [0.0, 0.0]}
#
# Exits 0 while that is so, 1 once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - "$folder/state" <<'PY'
import sys

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

saved = {"a": {"b": jnp.zeros(2)}, "a.b": jnp.ones(2)}
with ocp.StandardCheckpointer() as checkpointer:
    try:
        checkpointer.save(sys.argv[1], saved)
        checkpointer.wait_until_finished()
    except Exception as error:
        sys.exit(f"changed: saving raises {error!r}")
    restored = checkpointer.restore(sys.argv[1], saved)
plain = lambda tree: jax.tree.map(lambda x: x.tolist(), tree)
print("orbax", ocp.__version__, "jax", jax.__version__)
print("saved   ", plain(saved))
print("restored", plain(restored))
if plain(saved) == plain(restored):
    sys.exit("changed: both leaves are restored as they were saved")
PY
