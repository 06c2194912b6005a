"""What leaves Kronecker factors unchanged: the way a model is written, run and divided."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from kronecker_problems import N, assert_same, normal, regression
from small_problems import quick_jit

import curvax as cx
from curvax.curvature import fvp
from curvax.curvature.fisher import draw
from curvax.curvature.kronecker import kronecker_factors


def both(one: Any, other: Any) -> Any:
    """Factors of two (objective, params, options), from one compilation."""
    make = lambda case, params: kronecker_factors(case[0], params, **case[2])
    return quick_jit(lambda p, q: (make(one, p), make(other, q)))(one[1], other[1])


# The way a model is written.


def scanned(p: Any, batch: Any) -> jax.Array:
    def step(h: jax.Array, layer: Any) -> Any:
        return jnp.tanh(h @ layer["w"] + layer["b"][None]), None

    h, _ = lax.scan(jax.checkpoint(step), batch["x"], p["layers"])
    return h @ p["out"]


def unrolled(p: Any, batch: Any) -> jax.Array:
    h = batch["x"]
    for n in range(2):
        h = jnp.tanh(h @ p[f"w{n}"] + p[f"b{n}"][None])
    return h @ p["out"]


@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_scanned_layers_have_the_factors_of_unrolled_ones(bias):
    batch, options = {"x": normal(0, N, 3)}, {"bias": bias}
    stacked = {"w": normal(1, 2, 3, 3), "b": normal(2, 2, 3)}
    params = {"layers": stacked, "out": normal(3, 3, 2)}
    apart = {f"{k}{n}": stacked[k][n] for k in stacked for n in range(2)} | {"out": params["out"]}
    one, other = both(
        (regression(scanned, params, batch), params, options),
        (regression(unrolled, apart, batch), apart, options),
    )
    for n in range(2):
        found = jax.tree.map(lambda x, n=n: x[n], one.factors_of("layers/w"))
        assert_same(found, other.factors_of(f"w{n}"))
    apply = quick_jit(lambda f, p: (f(p), f.solve(p, 0.1), f.solve(p, 0.1, "heuristic")))
    for found, expected in zip(apply(one, params), apply(other, apart)):
        for name in ("w", "b"):
            both_layers = [expected[f"{name}{n}"] for n in range(2)]
            assert_same(found["layers"][name], np.stack(both_layers))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.tanh(nn.Dense(3, param_dtype=float, name="first")(x))
        return nn.Dense(2, param_dtype=float, name="second")(h)


class Nnx(nnx.Module):
    def __init__(self, weights: Any):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(4, 3, param_dtype=float, rngs=rngs)
        self.second = nnx.Linear(3, 2, param_dtype=float, rngs=rngs)
        for layer, (w, b) in zip((self.first, self.second), weights):
            layer.kernel[...], layer.bias[...] = w, b  # type: ignore[index]

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(jnp.tanh(self.first(x)))


def test_a_network_has_the_same_factors_in_every_library():
    weights = [(normal(0, 4, 3), normal(1, 3)), (normal(2, 3, 2), normal(3, 2))]
    batch = {"x": normal(4, N, 4)}
    plain = lambda p, batch: (
        jnp.tanh(batch["x"] @ p[0][0] + p[0][1][None]) @ p[1][0] + p[1][1][None]
    )
    names = ("first", "second")
    linen = {name: {"kernel": w, "bias": b} for name, (w, b) in zip(names, weights)}
    graph, state = nnx.split(Nnx(weights))
    layers = [eqx.nn.Linear(w.shape[0], w.shape[1], key=jax.random.key(0)) for w, _ in weights]
    where = lambda layer: (layer.weight, layer.bias)
    layers = [eqx.tree_at(where, x, (w.T, b)) for x, (w, b) in zip(layers, weights)]
    module = eqx.nn.Sequential([layers[0], eqx.nn.Lambda(jnp.tanh), layers[1]])
    arrays, static = eqx.partition(module, eqx.is_inexact_array)
    cases = [
        (plain, weights),
        (lambda p, batch: Linen().apply({"params": p}, batch["x"]), linen),
        (lambda p, batch: nnx.merge(graph, p)(batch["x"]), state),
        (lambda p, batch: jax.vmap(eqx.combine(p, static))(batch["x"]), arrays),
    ]
    make = lambda ps: [
        kronecker_factors(regression(model, params, batch), p)
        for (model, params), p in zip(cases, ps)
    ]
    first, *others = quick_jit(make)([params for _, params in cases])
    for other in others:
        for factors in ("inputs", "outputs"):
            assert_same(getattr(other, factors), getattr(first, factors))


# Parameters that are used several times.


def test_calls_in_a_scan_are_positions_as_those_of_a_loop():
    params = {"w": normal(0, 2, 2), "u": normal(1, 3, 2), "b": normal(2, 2)}
    batch = {"x": normal(3, N, 3, 3)}
    step = lambda p, h, x: jnp.tanh(h @ p["w"] + x @ p["u"] + p["b"][None])

    def recurrent(p: Any, batch: Any) -> jax.Array:
        xs = jnp.swapaxes(batch["x"], 0, 1)
        return lax.scan(lambda h, x: (step(p, h, x), None), jnp.zeros((N, 2)), xs)[0]

    def loop(p: Any, batch: Any) -> jax.Array:
        h = jnp.zeros((N, 2))
        for t in range(3):
            h = step(p, h, batch["x"][:, t])
        return h

    for sharing in ("expand", "reduce"):
        one, other = both(
            (regression(recurrent, params, batch), params, {"sharing": sharing}),
            (regression(loop, params, batch), params, {"sharing": sharing}),
        )
        assert {r.treatment for r in one.report().values()} <= {"kronecker", "bias", "diagonal"}
        assert_same(one.inputs, other.inputs)
        assert_same(one.outputs, other.outputs)
        assert_same(one.diagonals, other.diagonals)


def test_a_tied_embedding_has_the_trace_of_both_uses():
    batch = {"t": jax.random.randint(jax.random.key(0), (N, 2), 0, 4)}
    tied = lambda p, batch: jnp.tanh(p["e"][batch["t"]]).sum(1) @ p["e"].T
    untied = lambda p, batch: jnp.tanh(p["e"][batch["t"]]).sum(1) @ p["h"]
    params = {"e": normal(1, 4, 3)}
    apart = params | {"h": params["e"].T}
    one, other = both(
        (regression(tied, params, batch), params, {}), (regression(untied, apart, batch), apart, {})
    )
    assert one.report()["e"].treatment == "kronecker"
    assert "exchanged" in one.report()["e"].reason
    assert_same(one.trace(), other.trace())


# The way a batch is divided.


def token_model(p: Any, batch: Any) -> jax.Array:
    return jnp.tanh(batch["x"] @ p["w"] + p["b"]) @ p["out"]


def token_params() -> dict[str, jax.Array]:
    return {"w": normal(0, 3, 2), "b": normal(1, 2), "out": normal(2, 2, 3)}


def test_masked_tokens_do_not_count():
    params, x = token_params(), normal(3, 4, 3, 3)
    mask = jnp.arange(3)[None] < jnp.array([3, 1, 2, 0])[:, None]
    kept = np.asarray(mask).ravel()
    whole = {"x": x, "y": jnp.zeros((4, 3), int), "mask": mask}
    picked = {"x": x.reshape(-1, 3)[kept], "y": jnp.zeros(int(kept.sum()), int)}
    model = jax.numpy_rank_promotion("allow")(token_model)
    one, other = both(
        (cx.Objective(cx.categorical("y", mask="mask"), whole, model=model), params, {}),
        (cx.Objective(cx.categorical("y"), picked, model=model), params, {}),
    )
    assert_same(one.inputs, other.inputs)
    assert_same(one.outputs, other.outputs)


def test_microbatches_and_aux_change_nothing():
    params = token_params()
    batch = {"x": normal(3, 4, 3), "y": jnp.arange(4) % 3, "w": jnp.arange(1.0, 5.0)}
    loss = cx.categorical("y", weights="w")
    model = jax.numpy_rank_promotion("allow")(token_model)
    aux = lambda p, batch: (model(p, batch), {"mean": jnp.mean(batch["x"])})
    options: Any = dict(fisher="sampled", key=jax.random.key(1))
    objective = cx.Objective(loss, batch, model=model)
    pieces = cx.Objective(loss, batch, model=aux, has_aux=True, microbatch=2)

    def compute(params: Any) -> Any:
        found = []
        for one in (objective, pieces):
            factors = kronecker_factors(one, params, **options)
            found.append((factors, factors.corrected(one, params, key=options["key"])(params)))
        keys = objective.example_keys(options["key"])[:, None]
        labels = draw(loss, keys, model(params, batch), batch)[:, 0]
        return *found, kronecker_factors(objective, params, fisher="sampled", labels=labels)

    (whole, corrected), (parts, again), given = quick_jit(compute)(params)
    assert_same((parts, again), (whole, corrected))
    assert_same(given, whole)


@pytest.mark.parametrize("way", ["pmap", "shard_map"])
def test_devices_have_the_factors_of_one(way):
    params = token_params() | {"gain": normal(5, 3)}
    batch = {"x": normal(3, 8, 3), "y": jnp.arange(8) % 3, "w": jnp.arange(1.0, 9.0)}
    model = jax.numpy_rank_promotion("allow")(lambda p, b: token_model(p, b) * p["gain"])
    objective = lambda batch: cx.Objective(cx.categorical("y", weights="w"), batch, model=model)
    options: Any = dict(mean_over="batch")
    whole = quick_jit(lambda p: kronecker_factors(objective(batch), p))(params)
    own = lambda p, batch: kronecker_factors(objective(batch), p, **options)
    if way == "pmap":
        split = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), batch)
        devices = jax.devices()[:4]
        found = jax.pmap(own, "batch", in_axes=(None, 0), devices=devices)(params, split)
        found = jax.tree.map(lambda x: x[0], found)
    else:
        mesh = jax.make_mesh(
            (4,), ("batch",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
        )
        run = jax.shard_map(own, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P())
        found = jax.jit(run)(params, batch)
    assert_same(found, whole)


# Parameters without factors.


def unit(params: dict[str, jax.Array], name: str, i: Any) -> dict[str, jax.Array]:
    one = jnp.zeros(params[name].shape).at[i].set(1.0)
    return jax.tree.map(jnp.zeros_like, params) | {name: one}


def test_other_parameters_have_the_diagonal_of_the_fisher_matrix():
    params = {
        "scale": normal(0, 3),
        "shift": normal(1, 3),
        "w": normal(2, 3, 2),
        "t": jnp.array(0.3),
        "gain": normal(4, 2),
    }

    def model(p: Any, batch: Any) -> jax.Array:
        h = jnp.tanh(batch["x"] * p["scale"][None] + p["shift"][None])
        gain = jnp.array([0.5, 2.0]) * p["gain"]  # as the scale of a norm times 1/σ
        return (h @ p["w"]) * gain[None] * jnp.exp(p["t"])

    def compute(params: Any) -> Any:
        found = []
        for n in (1, N):
            objective = regression(model, params, {"x": normal(3, n, 3)})
            factors, product = kronecker_factors(objective, params), fvp(objective, params)
            entry = lambda name, i, f=product: f(unit(params, name, i))[name][i]
            sizes = {"scale": 3, "shift": 3, "gain": 2}
            exact = [jnp.stack([entry(k, i) for i in range(size)]) for k, size in sizes.items()]
            found.append((factors.diagonals, exact, entry("t", ())))
        return factors, found

    factors, cases = quick_jit(compute)(params)
    report = factors.report()
    treatments = {name: line.treatment for name, line in report.items()}
    assert treatments.pop("w") == "kronecker"
    assert treatments.pop("t") == "estimated diagonal"
    assert set(treatments.values()) == {"diagonal"}
    assert "exp" in report["t"].reason
    names = list(report)
    for diagonals, exact, _ in cases:
        for name, expected in zip(("scale", "shift", "gain"), exact):
            assert_same(diagonals[names.index(name)], expected)
    diagonals, _, t = cases[0]  # random signs of examples cancel if there is one example
    assert_same(diagonals[names.index("t")], t)
