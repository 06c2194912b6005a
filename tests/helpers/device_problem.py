"""A regression over eight devices, and its methods as float64 loops over the shards."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import curvax as cx

DEVICES, PER_DEVICE, FEATURES, HIDDEN = 8, 4, 5, 3
MAPPINGS = ("pmap", "shard_map", "shard_map unchecked")
# 1e-12 relative to numbers of order one: what a sum over shards in another order may change.
TOLERANCE = dict(rtol=1e-12, atol=1e-12)


def make_params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "w1": jax.random.normal(keys[0], (FEATURES, HIDDEN)),
        "b1": jnp.full((HIDDEN,), 0.1),
        "w2": jax.random.normal(keys[1], (HIDDEN,)),
    }


def make_batch():
    x = jax.random.normal(jax.random.key(1), (DEVICES * PER_DEVICE, FEATURES))
    return {"x": x, "y": jnp.sin(3 * x[:, 0]) + x[:, 1] ** 2}


def loss(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w1"] + params["b1"][None])
    return jnp.mean((hidden @ params["w2"] - batch["y"]) ** 2)


def predict(params, batch):
    return jnp.tanh(batch["x"] @ params["w1"] + params["b1"][None]) @ params["w2"]


def one_step(tx, params, state, batch, of=loss, **options):
    objective = cx.Objective(of, batch, **options)
    value, grads = objective.value_and_grad(params)
    value = value[0] if objective.has_aux else value
    updates, state = tx.update(grads, state, params, value_fn=objective, value=value)
    return optax.apply_updates(params, updates), state


@cache
def _compiled_step(tx, **options):
    return jax.jit(partial(one_step, tx, **options))


def step_alone(tx, params, state, batch, **options):
    """`one_step` on one device, compiled once for a transformation."""
    return _compiled_step(tx, **options)(params, state, batch)


def mesh():
    return jax.make_mesh((DEVICES,), ("batch",), axis_types=(AxisType.Auto,))


def shards(batch, n=DEVICES):
    return jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), batch)


def run(mapping, tx, params, batch, steps=2, **options):
    """Parameters and state after some steps under pmap or shard_map, from replicated parameters."""
    step = partial(one_step, tx, **options)
    state = tx.init(params)
    if mapping == "pmap":
        mapped = jax.pmap(step, axis_name="batch", in_axes=(None, None, 0), out_axes=None)
        batch = shards(batch)
    else:
        checked = mapping == "shard_map"
        mapped = jax.jit(
            jax.shard_map(
                step, mesh=mesh(), in_specs=(P(), P(), P("batch")), out_specs=P(), check_vma=checked
            )
        )
    for _ in range(steps):
        params, state = mapped(params, state, batch)
    return params, state


def sgd_over(gradient, params, steps=2, lr=0.1):
    for _ in range(steps):
        params = jax.tree.map(lambda p, g: p - lr * g, params, gradient(params))
    return params


def mean(trees):
    return jax.tree.map(lambda *x: sum(x) / len(x), *trees)


def ravel(tree):
    return ravel_pytree(tree)[0]


def perturbed(params, g, rho):
    scale = rho / jnp.linalg.norm(ravel(g))
    return jax.tree.map(lambda p, x: p + scale * x, params, g)


def pieces(batch, n=DEVICES):
    cut = shards(batch, n)
    return [jax.tree.map(lambda x, i=i: x[i], cut) for i in range(n)]


def sam_of(params, piece, rho=0.3, g=None):
    g = jax.grad(loss)(params, piece) if g is None else g
    return jax.grad(loss)(perturbed(params, g, rho), piece)


def gsam_of(params, piece, rho=0.3, alpha=0.4):
    g, g_p = jax.grad(loss)(params, piece), sam_of(params, piece, rho)
    flat, flat_p = ravel(g), ravel(g_p)
    along = (flat @ flat_p) / (flat_p @ flat_p)
    return jax.tree.map(lambda a, b: b - alpha * (a - along * b), g, g_p)


def local(f, n=DEVICES):
    return lambda params, batch: mean([f(params, piece) for piece in pieces(batch, n)])


def synced(params, batch):
    g = jax.grad(loss)(params, batch)
    return mean([sam_of(params, piece, g=g) for piece in pieces(batch)])


def adahessian_loop(params, batch, key, *, shared, steps=2, lr=0.1, b1=0.9, b2=0.99, eps=1e-4):
    """AdaHessian written out: the mean over shards of g and of z ⊙ Hz."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    m, v = zeros, zeros
    for t in range(1, steps + 1):
        step_key = jax.random.fold_in(key, t - 1)
        gs, ds = [], []
        for i, piece in enumerate(pieces(batch)):
            z = cx.rademacher(step_key if shared else jax.random.fold_in(step_key, i), params)
            g, hz = jax.jvp(lambda p, piece=piece: jax.grad(loss)(p, piece), (params,), (z,))
            gs.append(g)
            ds.append(jax.tree.map(jnp.multiply, z, hz))
        g, d = mean(gs), mean(ds)
        m = jax.tree.map(lambda a, b: b1 * a + (1 - b1) * b, m, g)
        v = jax.tree.map(lambda a, b: b2 * a + (1 - b2) * b * b, v, d)
        params = jax.tree.map(
            lambda p, a, b, t=t: (
                p - lr * (a / (1 - b1**t)) / (jnp.sqrt(b / (1 - b2**t)) + eps)
            ),
            params, m, v,
        )  # fmt: skip
    return params


def by_shard(key, shards=DEVICES):
    return (
        cx.hutchinson_diag(key, shards=shards, mean_over="batch")
        | cx.ema_rms(0.99)
        | cx.pmean_updates("batch")
        | optax.ema(0.9)
        | cx.scale_by_power(1.0, eps=1e-4)
        | optax.scale_by_learning_rate(0.1)
    )
