"""Differences between versions of JAX and Flax are hidden by `curvax.compat`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from curvax import compat

DEVICES = 8
pytestmark = pytest.mark.skipif(
    jax.device_count() < DEVICES,
    reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=8 before jax is imported",
)
X = jnp.arange(16.0).reshape(8, 2)
AXIS_TYPES = [AxisType.Auto, AxisType.Explicit]


def pmapped(f):
    return jax.pmap(f, axis_name="batch", in_axes=(None, 0))


def sharded(f, checked=True, kind=AxisType.Auto):
    mesh = jax.make_mesh((DEVICES,), ("batch",), axis_types=(kind,))
    specs = (P(), P("batch"))
    mapped = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P("batch"), check_vma=checked)
    return lambda w, x: jax.jit(mapped)(w, jax.device_put(x, jax.NamedSharding(mesh, P("batch"))))


def vmapped(f):
    return jax.vmap(f, axis_name="batch", in_axes=(None, 0))


DEVICE_MAPPINGS: dict[str, Any] = {
    "pmap": pmapped,
    "pmap in eval_shape": lambda f: partial(jax.eval_shape, pmapped(f)),
    "shard_map": sharded,
    "shard_map unchecked": partial(sharded, checked=False),
    "shard_map, explicit": partial(sharded, kind=AxisType.Explicit),
    "shard_map, explicit unchecked": partial(sharded, checked=False, kind=AxisType.Explicit),
}
INNER: dict[str, Any] = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda w, x: lax.scan(lambda c, y: (c, f(w, x)), 0, jnp.arange(2))[1][0],
    "vmap": lambda f: lambda w, x: jax.vmap(f, (0, None))(w, x)[0],
    "named vmap of jit": lambda f: (
        lambda w, x: jax.vmap(jax.jit(f), (0, None), axis_name="seeds")(w, x)[0]
    ),
}


def seen_axes(mapping, inner):
    seen = []

    def f(w, x):
        seen.append(compat.manual_axes())
        return x * jnp.sum(w)

    mapping(INNER[inner](f))(jnp.ones(3), X)
    return set(seen)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("mapping", DEVICE_MAPPINGS)
def test_manual_axes_finds_the_device_axis(mapping, inner):
    assert seen_axes(DEVICE_MAPPINGS[mapping], inner) == {("batch",)}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("outer", [vmapped, jax.jit, lambda f: f])
def test_manual_axes_ignores_axes_of_vmap(outer, inner):
    assert seen_axes(outer, inner) == {()}


def test_manual_axes_ignores_mesh_axes_left_to_the_compiler():
    seen = []

    def f(x):
        seen.append(compat.manual_axes())
        return x

    mesh = jax.make_mesh((4, 2), ("batch", "model"), axis_types=(AxisType.Auto,) * 2)
    split = jax.shard_map(
        f, mesh=mesh, in_specs=P("batch"), out_specs=P("batch"), axis_names={"batch"}
    )
    jax.jit(split)(X)
    assert set(seen) == {("batch",)}


def square(w, x):
    return jnp.sum(x @ w) ** 2


LOCAL = [name for name in DEVICE_MAPPINGS if "eval_shape" not in name]


@pytest.mark.parametrize("mapping", LOCAL)
def test_gradient_at_a_cast_value_is_that_of_the_device(mapping):
    """Also through the cast's own transpose, which sums where types track it, and only there."""

    def local(w, x):
        cast = w if varies(w) else compat.cast_to_varying(w, ("batch",))
        return jax.grad(square)(cast, x)[None]

    w = jnp.array([0.3, -0.7])
    x = X.reshape(DEVICES, 1, 2) if mapping == "pmap" else X
    found = DEVICE_MAPPINGS[mapping](local)(w, x)
    expected = [jax.grad(square)(w, row) for row in X]
    np.testing.assert_allclose(found.reshape(DEVICES, 2), expected, rtol=1e-12)

    def through(w, x):
        cast = lambda w: compat.cast_to_varying(w, ("batch",))
        return jax.grad(lambda w: square(cast(w), x))(w)[None]

    found = DEVICE_MAPPINGS[mapping](through)(w, x).reshape(DEVICES, 2)
    tracked = mapping.startswith("shard_map") and "unchecked" not in mapping
    sums = np.tile(np.sum(expected, axis=0), (DEVICES, 1))
    np.testing.assert_allclose(found, sums if tracked else expected, rtol=1e-12)


def varies(x):
    return bool(compat.varying_axes(jax.typeof(x)))


@pytest.mark.parametrize("kind", AXIS_TYPES)
def test_varying_axes_are_known_where_shard_map_checks_them(kind):
    seen = {}

    def f(checked, w, x):
        shapes = jax.eval_shape(lambda: (w, x))
        seen[checked] = [*map(varies, (w, x)), *map(bool, map(compat.varying_axes, shapes))]
        return x

    for checked in True, False:
        sharded(partial(f, checked), checked, kind)(jnp.ones(2), X)
    assert seen == {True: [False, True] * 2, False: [False] * 4}


def test_sub_jaxprs_of_every_kind_of_equation_are_found():
    def f(x):
        y = lax.cond(x[0] > 0, jnp.sin, jnp.cos, x)
        y = lax.scan(lambda c, a: (c + jnp.exp(a), a), y, y)[0]
        y = lax.while_loop(lambda y: y[0] < 0, jnp.tanh, y)
        return jax.checkpoint(jnp.arctan)(jax.jit(jnp.log1p)(y))

    def names(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn.primitive.name
            for body in compat.bodies(eqn.params):
                yield from names(body)

    found = set(names(jax.make_jaxpr(f)(jnp.ones(2)).jaxpr))
    assert {"sin", "cos", "exp", "lt", "tanh", "log1p"} <= found
    assert {"atan", "atan2"} & found


@pytest.mark.parametrize("consts", [0, 2])
@pytest.mark.parametrize("carries", [0, 1, 3])
@pytest.mark.parametrize("sequences", [0, 2])
@pytest.mark.parametrize("stacked", [0, 2])
def test_scan_parts_are_counted(consts, carries, sequences, stacked):
    """Carries as long as the sequences and keys, whose shape hides an axis, among them."""
    fixed = [jax.random.split(jax.random.key(0), 3), jnp.arange(3.0)][:consts]
    start = [jnp.ones(3), jax.random.key(1), jnp.ones((3, 3))][:carries]
    rows = [jnp.ones((3, 2)), jax.random.split(jax.random.key(2), 3)][:sequences]

    def f(fixed, start, rows):
        def step(carry, xs):
            used: Any = sum(jnp.sum(jax.random.key_data(k)) for k in [*fixed, *xs] if is_key(k))
            used += sum(jnp.sum(x) for x in [*fixed, *xs] if not is_key(x))
            changed = [c if is_key(c) else c + used for c in carry]
            # One alike for all steps: a result that JAX may take out of the loop.
            return changed, [jnp.sin(used), jnp.ones(3) * used][:stacked]

        return lax.scan(step, start, rows, length=3)

    jaxpr = jax.make_jaxpr(f)(fixed, start, rows).jaxpr
    found = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    for eqn in found:
        n, carried = compat.scan_arguments(eqn)
        body = eqn.params["jaxpr"]
        shapes = lambda xs: [x.shape for x in xs]
        inside, outside = shapes(body.in_avals), shapes(x.aval for x in eqn.invars)
        assert inside[: n + carried] == outside[: n + carried]
        assert [(3, *shape) for shape in inside[n + carried :]] == outside[n + carried :]
        assert shapes(body.out_avals[:carried]) == inside[n : n + carried]
        if "num_carry" in eqn.params:
            assert (n, carried) == (eqn.params["num_consts"], eqn.params["num_carry"])
    assert found or not (carries or stacked)


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


@pytest.mark.parametrize("f", [jnp.sin, jax.nn.relu, jax.jit(jnp.cos), lambda x: lax.sort(x)])
def test_bind_repeats_the_result_of_an_equation(f):
    jaxpr = jax.make_jaxpr(f)(X)
    env: dict[Any, Any] = dict(zip(jaxpr.jaxpr.invars, [X]))
    for eqn in jaxpr.eqns:
        values = [getattr(x, "val", None) if hasattr(x, "val") else env[x] for x in eqn.invars]
        env |= dict(zip(eqn.outvars, compat.bind(eqn, values)))
    np.testing.assert_array_equal(env[jaxpr.jaxpr.outvars[0]], f(X))


def test_nnx_state_becomes_arrays_and_modules_have_paths():
    class Net(nnx.Module):
        def __init__(self):
            self.inner = nnx.Linear(2, 3, rngs=nnx.Rngs(0))

    model = Net()
    state = compat.as_pure(nnx.state(model))
    assert all(type(leaf) is type(jnp.ones(2)) for leaf in jax.tree.leaves(state))
    np.testing.assert_array_equal(state["inner"]["kernel"], model.inner.kernel[...])
    assert dict(compat.iter_modules(model)) == {("inner",): model.inner, (): model}
