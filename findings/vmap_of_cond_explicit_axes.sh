#!/usr/bin/env bash
# jax and jaxlib 0.12.0.1 and 0.10.2, Python 3.12 or later, eight CPU devices, a mesh of explicit axes
# (the default of `jax.make_mesh`): `jax.vmap` of a function that branches by `lax.cond` on the
# entries of its argument is refused with a ShardingTypeError when the argument is sharded along
# another axis than the mapped one. Without vmap, sharded along the mapped axis, or with automatic
# axes the same function works.
# Seen, for both versions: explicit axes, second axis sharded: ShardingTypeError "select `which` must
# be scalar or have the same sharding as cases"; the three others give the sum, 64.
# Fails where it is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=$(command -v python3.13 || command -v python3.12 || command -v python3)
for version in 0.10.2 0.12.0.1; do
    "$python" -m venv --clear "$work/venv"
    "$work/venv/bin/python" -m pip install --quiet --no-compile "jax==$version" "jaxlib==$version"
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 "$work/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec


def positive_sum(x):
    return jax.lax.cond(jnp.sum(x) > 0, jnp.sum, lambda x: -jnp.sum(x), x)


def result(f, kind, *spec):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        x = jax.device_put(-jnp.ones((8, 8)), jax.NamedSharding(mesh, PartitionSpec(*spec)))
        try:
            return f"{jnp.sum(jax.jit(f)(x)):.0f}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"


each = jax.vmap(positive_sum)
cases = {
    "explicit axes, second axis sharded": (each, AxisType.Explicit, None, "data"),
    "explicit axes, mapped axis sharded": (each, AxisType.Explicit, "data"),
    "explicit axes, without vmap": (positive_sum, AxisType.Explicit, None, "data"),
    "automatic axes, second axis sharded": (each, AxisType.Auto, None, "data"),
}
found = {name: result(*case) for name, case in cases.items()}
print(f"jax {jax.__version__}")
for name, text in found.items():
    print(f"  {name}: {text[:90]}")
first, *others = found.values()
assert first.startswith("ShardingTypeError: select `which`"), "the behaviour has changed"
assert others == ["64"] * 3, "the behaviour has changed"
PYTHON
done
