"""AdaHessian against the runs of its authors' three codes and of a JAX port, probe by probe.

The probes drawn are recorded; they go in through `sampler`, the three averaging rules through
`spatial_average`.
"""

import jax
import optax
import pytest
from trajectories import Run, assert_same, follow, recorded, tap, tapped

from curvax import adahessian, ema_rms, hutchinson_diag, pipe, scale_by_power, spatial_average


def image_block(path, leaf):
    """Windows of two-dimensional convolutions, here in the order OIHW."""
    return (2, 3) if leaf.ndim == 4 else None


def last_axes(path, leaf):
    """Rows of a matrix, windows of convolutions; nothing in a vector."""
    return {2: (1,), 3: (2,), 4: (2, 3)}.get(leaf.ndim)


def instruction_block(sizes):
    """One block size for each rank, where -1 is `last_axes`."""

    def block(path, leaf):
        size = sizes[leaf.ndim - 1]
        return last_axes(path, leaf) if size == -1 else size

    return block


def block_of(run):
    if run.meta["variant"] == "image":
        return image_block
    if run.meta["variant"] == "instruction":
        return instruction_block(run.hyper["spatial_average_block_size"])
    return run.hyper["block_length"]


def options(run):
    """The hyperparameters under the names of `curvax.adahessian`."""
    b1, b2 = run.hyper["betas"]
    return {
        "learning_rate": run.hyper["lr"],
        "b1": b1,
        "b2": b2,
        "eps": run.hyper["eps"],
        "power": run.hyper["hessian_power"],
        "weight_decay": run.hyper["weight_decay"],
    }


def drawn_by(sampler, block, *, learning_rate, b1, b2, eps, power, weight_decay):
    """AdaHessian's pipe with a given sampler and a tap on what is squared."""
    return pipe(
        hutchinson_diag(sampler=sampler),
        spatial_average(block),
        tap("D", "diagonal"),
        ema_rms(b2),
        optax.ema(b1),
        scale_by_power(power, eps=eps),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


@pytest.mark.parametrize("path", recorded("adahessian_*"))
def test_adahessian_pipe_follows_the_authors_code(path):
    run = Run(path)
    method = lambda z: drawn_by(lambda key, tree: z, block_of(run), **options(run))
    params, states = follow(run, method, run.tree("z"))
    trajectory, step = run.tolerances
    assert_same(params, run.params, trajectory)
    assert_same(tapped(states, "D"), run.tree("D"), step)


@pytest.mark.parametrize("path", recorded("adahessian_*_quad_*", "adahessian_*_sin_*"))
def test_adahessian_follows_the_record_without_its_probes_where_the_hessian_is_diagonal(path):
    run = Run(path)
    params, _ = follow(run, lambda _: adahessian(**options(run), block=block_of(run)))
    assert_same(params, run.params, run.tolerances[0])


def one_key_for_all(key):
    """The sampler of the port: leaves of equal shape get equal probes."""
    draw = lambda x: jax.random.rademacher(key, x.shape, x.dtype)
    return lambda _, tree: jax.tree.map(draw, tree)


@pytest.mark.parametrize("path", recorded("adahessianjax_*"))
def test_adahessian_pipe_follows_the_jax_port(path):
    run = Run(path)
    hyper = {
        "learning_rate": run.hyper["step_size"],
        "b1": run.hyper.get("b1", 0.9),
        "b2": run.hyper.get("b2", 0.999),
        "eps": run.hyper["eps"],
        "power": run.hyper.get("hessian_power", 1),
        "weight_decay": run.hyper.get("weight_decay", 0.0),
    }
    method = lambda key: drawn_by(one_key_for_all(key), last_axes, **hyper)
    params, states = follow(run, method, run["key"])
    trajectory, step = run.tolerances
    assert_same(params, run.params, trajectory)
    assert_same(tapped(states, "D"), run.tree("D"), step)
