"""Methods and measures on meshes of explicit axes give what they give on one device."""

import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax as cx
from curvax import analysis

DEVICES, N, WIDTH, CLASSES = 8, 32, 8, 4

pytestmark = pytest.mark.skipif(
    jax.device_count() < DEVICES,
    reason="needs XLA_FLAGS=--xla_force_host_platform_device_count=8 before jax is imported",
)

KEY = jax.random.key(3)


def make_params() -> Any:
    keys = jax.random.split(jax.random.key(0), 2)
    shapes = {"w": (4, WIDTH), "v": (WIDTH, CLASSES)}
    return {n: 0.3 * jax.random.normal(k, shapes[n]) for n, k in zip(shapes, keys)}


def make_batch() -> Any:
    keys = jax.random.split(jax.random.key(1), 3)
    return {
        "x": jax.random.normal(keys[0], (N, 4)),
        "label": jax.random.randint(keys[1], (N,), 0, CLASSES),
        "mask": jax.random.uniform(keys[2], (N,)) < 0.7,
    }


def predict(params: Any, batch: Any) -> jax.Array:
    return jnp.tanh(batch["x"] @ params["w"]) @ params["v"]


def gathering(params: Any, batch: Any) -> jax.Array:
    """The model with sharded weights (FSDP): each is gathered before it is used."""
    whole = lambda w: jax.sharding.reshard(w, P(*[None] * w.ndim))
    return predict(jax.tree.map(whole, params), batch)


def by_type(params: Any, batch: Any) -> jax.Array:
    """The model with its hidden units along `model`; the axis of the batch is the input's own."""
    w = jax.sharding.reshard(params["w"], P(None, "model"))
    v = jax.sharding.reshard(params["v"], P("model", None))
    own = P(jax.typeof(batch["x"]).sharding.spec[0], None)
    return jnp.einsum("bi,ij->bj", jnp.tanh(batch["x"] @ w), v, out_sharding=own)


def by_name(params: Any, batch: Any) -> jax.Array:
    """The same, which names the axis of the batch."""
    h = jnp.tanh(batch["x"] @ params["w"])
    return jnp.einsum("bi,ij->bj", h, params["v"], out_sharding=P("data", None))


# Shape, axes, sharding of the batch, sharding of the parameters, and the model.
MESHES: dict[str, Any] = {
    "data": ((8,), ("data",), P("data"), {"w": P(), "v": P()}, predict),
    "fsdp": ((8,), ("data",), P("data"), {"w": P(None, "data"), "v": P("data")}, gathering),
    "three": (
        (2, 2, 2), ("data", "fsdp", "model"), P(("data", "fsdp")),
        {"w": P("fsdp", "model"), "v": P("model", "fsdp")}, by_type,
    ),
}  # fmt: skip


def mesh_of(name: str) -> Any:
    shape, axes, *_ = MESHES[name]
    return jax.make_mesh(shape, axes, axis_types=(AxisType.Explicit,) * len(axes))


def laid_out(name: str) -> tuple[Any, Any, Any]:
    """(parameters, batch, model) on the mesh that is set."""
    _, _, along, specs, model = MESHES[name]
    params = jax.tree.map(jax.device_put, make_params(), specs)
    return params, jax.tree.map(lambda x: jax.device_put(x, along), make_batch()), model


LOSS = cx.categorical("label")
MASKED = cx.categorical("label", mask="mask")


def with_dropout(model: Any) -> Any:
    def dropped(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        z = model(params, batch)
        return z * jax.random.bernoulli(key, 0.8, z.shape)

    return dropped


def stepped(tx: Any, loss: Any = LOSS, *, dropout: bool = False, **options: Any) -> Any:
    """The parameters after a step."""
    tx = tx | optax.sgd(0.1) if isinstance(tx, cx.Stage) else tx

    def step(params: Any, batch: Any, model: Any) -> Any:
        model = with_dropout(model) if dropout else model
        objective = cx.Objective(loss, batch, model=model, **options)
        _, grads = objective.value_and_grad(params)
        updates, _ = tx.update(grads, tx.init(params), params, value_fn=objective)
        return optax.apply_updates(params, updates)

    return step


def measured(f: Any, **options: Any) -> Any:
    return lambda params, batch, model: f(cx.Objective(LOSS, batch, model=model, **options), params)


sam = cx.sam_perturb(0.05)
CASES: dict[str, Any] = {
    # Groups fewer than the devices, as many, more, of one example, and of sizes that fit no shard.
    "groups of 16": stepped(cx.per_group(16, sam)),
    "groups of 4": stepped(cx.per_group(4, sam | cx.gsam_project(0.3)), MASKED),
    "groups of 2": stepped(cx.per_group(2, sam), dropout=True, key=KEY),
    "groups one by one": stepped(cx.per_group(4, sam, sequential=True)),
    "groups of micro-batches": stepped(cx.per_group(8, sam), microbatch=2),
    "groups with momentum": stepped(cx.per_group(4, sam | optax.trace(0.9))),
    "micro-batches": stepped(cx.sam(optax.sgd(0.1), 0.05), dropout=True, key=KEY, microbatch=8),
    "micro-batches of 2": stepped(cx.sam(optax.sgd(0.1), 0.05), MASKED, microbatch=2),
    "shards": stepped(cx.hutchinson_diag(shards=4, probes=2) | cx.scale_by_power(1.0)),
    "a fraction": stepped(cx.hutchinson_diag(fraction=0.3) | cx.scale_by_power(1.0)),
    "Fisher": stepped(cx.fisher_diag(fraction=0.5, shards=2) | cx.scale_by_power(0.5), MASKED),
    "empirical Fisher": stepped(cx.empirical_fisher_diag() | cx.scale_by_power(0.5), MASKED),
    "by rows": stepped(
        cx.empirical_fisher_matvec() | cx.damp(1.0) | cx.solve(cx.row_space()), MASKED
    ),
    "Kronecker factors": stepped(
        cx.fisher_kronecker() | cx.damp(0.3) | cx.solve(cx.kronecker()), MASKED
    ),
    "Kronecker factors, inverted": stepped(
        cx.gauss_newton_kronecker() | cx.damp(0.3) | cx.solve(cx.kronecker(style="heuristic"))
    ),
    "eigenvalues of Kronecker factors": stepped(
        cx.fisher_kronecker()
        | cx.in_eigenbasis(cx.fisher_eigenvalues())
        | cx.damp(0.3)
        | cx.solve(cx.kronecker()),
        MASKED,
    ),
    "in the eigenbasis of gradients": stepped(cx.soap(0.1, eps=0.1, every=2)),
    "divided inverses": stepped(
        cx.fisher_kronecker()
        | cx.damp(0.3)
        | cx.solve(cx.kronecker(style="heuristic", divided_over="data"))
    ),
    "example keys": measured(lambda o, p: jax.random.key_data(o.example_keys(KEY))),
    "kernel": measured(lambda o, p: analysis.ntk(o, p)),
    "kernel in chunks": measured(lambda o, p: analysis.ntk(o, p, form="trace", chunk=4)),
    "condition": measured(lambda o, p: analysis.ntk_condition_number(o, p, form="trace").largest),
    "condition by products": measured(
        lambda o, p: (
            analysis.ntk_condition_number(
                o, p, form="trace", method="lanczos", chunk=8, max_products=20
            ).largest
        )
    ),
    "m-sharpness": measured(lambda o, p: analysis.m_sharpness(o, p, 0.05, 4)),
    "m-sharpness at once": measured(lambda o, p: analysis.m_sharpness(o, p, 0.05, 4, chunk=8)),
    "random sharpness": measured(
        lambda o, p: analysis.random_sharpness(o, p, 0.05, draws=2).differences
    ),
    "spectrum": measured(
        lambda o, p: analysis.hessian_spectrum(o, p, probes=2, steps=5).density.nodes
    ),
    "blocks": measured(
        lambda o, p: {n: b.value for n, b in analysis.block_eigenvalues(o, p).items()}
    ),
    "a sweep": lambda params, batch, model: analysis.surrogate_gap(
        analysis.DatasetLoss(LOSS, [batch, batch], model=model, microbatch=8), params, 0.05
    ),
}


@functools.cache
def on_one_device(name: str) -> Any:
    return jax.tree.map(np.asarray, run(name, make_params(), make_batch(), predict))


def run(name: str, params: Any, batch: Any, model: Any) -> Any:
    case = partial(CASES[name], model=model)
    return (case if name == "a sweep" else jax.jit(case))(params, batch)


def assert_same(found: Any, expected: Any) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), found, expected)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", MESHES)
def test_explicit_mesh_gives_the_numbers_of_one_device(kind, name):
    expected = on_one_device(name)
    with jax.set_mesh(mesh_of(kind)):
        params, batch, model = laid_out(kind)
        assert_same(jax.tree.map(np.asarray, run(name, params, batch, model)), expected)


@pytest.mark.parametrize("name", ["groups of 4", "micro-batches", "shards", "kernel"])
def test_eager_calls_on_an_explicit_mesh_give_the_numbers_of_one_device(name):
    expected = on_one_device(name)
    with jax.set_mesh(mesh_of("fsdp")):
        params, batch, model = laid_out("fsdp")
        found = CASES[name](params, batch, model)
    assert_same(jax.tree.map(np.asarray, found), expected)


def test_parameters_keep_their_sharding():
    with jax.set_mesh(mesh_of("fsdp")):
        params, batch, model = laid_out("fsdp")
        found = run("groups of 4", params, batch, model)
        assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, params)


def grid() -> Any:
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


def named() -> tuple[Any, Any]:
    """Parameters and batch of a mesh whose model names the axis of the batch."""
    specs = {"w": P(None, "model"), "v": P("model")}
    batch = jax.tree.map(lambda x: jax.device_put(x, P("data")), make_batch())
    return jax.tree.map(jax.device_put, make_params(), specs), batch


@pytest.mark.parametrize("name", ["groups of 4", "groups of 16", "micro-batches"])
def test_model_that_names_the_batch_axis_is_split_by_groups_and_microbatches(name):
    expected = on_one_device(name)
    with jax.set_mesh(grid()):
        assert_same(jax.tree.map(np.asarray, run(name, *named(), by_name)), expected)


@pytest.mark.parametrize("name", ["groups of 2", "micro-batches of 2", "kernel", "by rows"])
def test_pieces_too_small_for_the_named_batch_axis_are_refused(name):
    told = r"(?s)lies along \['data'\].*names an axis.*typeof"
    with jax.set_mesh(grid()), pytest.raises(ValueError, match=told):
        run(name, *named(), by_name)


def test_errors_of_jax_pass_unchanged():
    broken = lambda params, batch: predict(params, batch) @ jnp.ones((3, 3))
    with jax.set_mesh(mesh_of("data")):
        params, batch, _ = laid_out("data")
        with pytest.raises(TypeError, match="dot_general"):
            run("groups of 4", params, batch, broken)


def test_groups_under_shard_map_with_an_explicit_mesh_equal_one_device():
    tx = cx.per_group(2, sam) | cx.pmean_updates("batch") | optax.sgd(0.1)

    def step(params: Any, batch: Any) -> Any:
        return stepped(tx)(params, batch, predict)

    mesh = jax.make_mesh((DEVICES,), ("batch",), axis_types=(AxisType.Explicit,))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P())
    batch = jax.device_put(make_batch(), NamedSharding(mesh, P("batch")))
    found = jax.tree.map(np.asarray, jax.jit(mapped)(make_params(), batch))
    assert_same(found, jax.tree.map(np.asarray, step(make_params(), make_batch())))
