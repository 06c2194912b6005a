"""Slices of a loss, and the directions along which they are taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from small_problems import dense_hessian, flat, net_batch, net_loss, net_params

import curvax as cx
from curvax.analysis import (
    block_masks,
    filter_normalised,
    landscape,
    of_block,
    random_directions,
    top_eigenpairs,
    trajectory_directions,
)
from curvax.flax_bridge import layout, nnx_loss
from curvax.models import build

MATRIX = np.diag([4.0, 1.0, 0.5]) + 0.3
POINT = {"w": jnp.array([1.0, -2.0, 0.5])}
FIRST, SECOND = {"w": jnp.array([1.0, 0.0, 2.0])}, {"w": jnp.array([0.0, -1.0, 1.0])}


def quadratic(params):
    return 0.5 * params["w"] @ MATRIX @ params["w"]


def at(*places):
    """The quadratic at θ + Σ α d, where `places` are pairs (α, d)."""
    w = np.asarray(POINT["w"]) + sum(a * np.asarray(d["w"]) for a, d in places)
    return 0.5 * w @ MATRIX @ w


# Slices.


def test_landscape_of_a_line_and_a_plane_has_the_losses_there():
    line = landscape(quadratic, POINT, FIRST, span=(-0.5, 1.0), points=4)
    np.testing.assert_allclose(line.coordinates[0], [-0.5, 0.0, 0.5, 1.0], atol=1e-15)
    np.testing.assert_allclose(line.losses, [at((a, FIRST)) for a in line.coordinates[0]])
    plane = landscape(
        quadratic, POINT, [FIRST, SECOND], span=(0.5, (0.0, 3.0)), points=(3, 2), chunk=4
    )
    a, b = plane.coordinates
    np.testing.assert_allclose(a, [-0.5, 0.0, 0.5])
    np.testing.assert_allclose(b, [0.0, 3.0])
    expected = [[at((x, FIRST), (y, SECOND)) for y in b] for x in a]
    np.testing.assert_allclose(plane.losses, expected, rtol=1e-12)


def test_landscape_takes_directions_alone_in_a_list_or_stacked():
    stacked = jax.tree.map(lambda *x: jnp.stack(x), FIRST, SECOND)
    given = [landscape(quadratic, POINT, d, points=3) for d in ([FIRST, SECOND], stacked)]
    np.testing.assert_array_equal(given[0].losses, given[1].losses)
    given = [landscape(quadratic, POINT, d, points=3) for d in (FIRST, [FIRST])]
    np.testing.assert_array_equal(given[0].losses, given[1].losses)


def test_landscape_along_eigenvectors_curves_by_the_eigenvalue():
    pairs = top_eigenpairs(quadratic, POINT, 2)
    found = landscape(quadratic, POINT, pairs.vectors, span=0.5, points=3)
    second = lambda x: (x[0] - 2 * x[1] + x[2]) / 0.25
    np.testing.assert_allclose(second(found.losses[:, 1]), pairs.values[0], rtol=1e-9)
    np.testing.assert_allclose(second(found.losses[1]), pairs.values[1], rtol=1e-9)


def test_landscape_is_the_same_over_microbatches_and_devices():
    params, batch = net_params(), net_batch(16)
    ways = random_directions(params, key=3)
    expected = landscape(cx.Objective(net_loss, batch), params, ways, points=3).losses
    parts = landscape(cx.Objective(net_loss, batch, microbatch=4), params, ways, points=3)
    np.testing.assert_allclose(parts.losses, expected, rtol=1e-6)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def run(params, batch, **over):
        return landscape(cx.Objective(net_loss, batch), params, ways, points=3, **over).losses

    mapped = lambda run: jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    )
    found = mapped(lambda p, b: run(p, b, mean_over="data"))(params, batch)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    with pytest.raises(ValueError, match="mean_over='data'"):
        mapped(run)(params, batch)


def test_half_precision_parameters_move_in_float32():
    half = {"w": POINT["w"].astype(jnp.bfloat16)}
    found = landscape(lambda p: jnp.sum(p["w"]), half, FIRST, span=1e-3, points=3)
    np.testing.assert_allclose(found.losses, -0.5 + 3e-3 * np.array([-1, 0, 1]), rtol=1e-6)


@pytest.mark.parametrize(
    ("directions", "options", "message"),
    [
        ({"w": jnp.ones(4)}, {}, "shaped like the parameters"),
        ({"w": jnp.ones((3, 3))}, {}, "one or two directions, and got 3"),
        ([], {}, "shaped like the parameters"),
        (FIRST, {"span": 0}, "low < high"),
        (FIRST, {"span": (1.0, -1.0)}, "low < high"),
        (FIRST, {"points": (3, 3)}, "for each of them"),
        (FIRST, {"points": 0}, "positive integer"),
    ],
)
def test_landscape_errors_name_the_option(directions, options, message):
    with pytest.raises(ValueError, match=message):
        landscape(quadratic, POINT, directions, **options)


# Of one block.


def test_of_block_gives_eigenvectors_and_a_landscape_of_the_block():
    params = net_params()
    objective = cx.Objective(net_loss, net_batch())
    masks = block_masks(params, ["hidden", "out"])
    inside = flat(jax.tree.map(jnp.broadcast_to, masks["out"], jax.tree.map(jnp.shape, params)))
    block = dense_hessian(objective, params)[np.ix_(inside > 0, inside > 0)]
    pairs = top_eigenpairs(objective, params, 2, curvature=of_block(masks["out"]), tol=1e-10)
    expected = np.linalg.eigvalsh(block)
    expected = expected[np.argsort(-np.abs(expected))][:2]
    np.testing.assert_allclose(pairs.values, expected, rtol=1e-9)
    for leaf in jax.tree.leaves(pairs.vectors["hidden"]):
        np.testing.assert_allclose(leaf, 0, atol=1e-9)
    found = landscape(objective, params, pairs.vectors, span=1e-3, points=3)
    second = (found.losses[0, 1] - 2 * found.losses[1, 1] + found.losses[2, 1]) / 1e-6
    assert float(second) == pytest.approx(float(expected[0]), rel=1e-4)


# Filters.


def lengths(x, outputs):
    """The norm of each filter, one entry for each output."""
    inside = tuple(axis for axis in range(x.ndim) if axis not in outputs)
    return np.linalg.norm(np.asarray(x, float).transpose(*inside, *outputs).reshape(
        -1, *[x.shape[axis] for axis in outputs]), axis=0)  # fmt: skip


def with_parameters(name, **options):
    model = build(name, 3, **options)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), shapes)


@pytest.mark.parametrize("known", [True, False], ids=["layout", "by-names"])
def test_filter_normalised_gives_every_filter_the_length_of_its_weights(known):
    model, params = with_parameters("vit_tiny", depth=2, width=8, mlp_width=12, scan=False)
    facts = layout(model, params, jnp.zeros((1, 8, 8, 1))) if known else None
    direction = jax.tree.map(lambda x: x[0], random_directions(params, 1))
    found = filter_normalised(direction, params, facts)
    block, weights = found["block_0"], params["block_0"]
    for path, outputs in {
        ("attention", "query"): (1, 2),
        ("attention", "out"): (2,),
        ("mlp", "Dense_0"): (1,),
    }.items():
        d, w = (tree[path[0]][path[1]] for tree in (block, weights))
        np.testing.assert_allclose(
            lengths(d["kernel"], outputs), lengths(w["kernel"], outputs), rtol=1e-9
        )
        assert not np.any(d["bias"])
    kernel = found["embedding"]["kernel"]
    np.testing.assert_allclose(
        lengths(kernel, (3,)), lengths(params["embedding"]["kernel"], (3,)), rtol=1e-9
    )
    turned = direction["embedding"]["kernel"] / kernel
    np.testing.assert_allclose(
        turned, jnp.broadcast_to(turned[:1, :1, :1], turned.shape), rtol=1e-4
    )
    assert not np.any(found["norm"]["scale"])


def test_filter_normalised_treats_each_bias_as_one_vector():
    params = {"layer": {"kernel": jnp.ones((2, 3)), "bias": jnp.array([3.0, 4.0, 0.0])}}
    direction = {"layer": {"kernel": jnp.ones((2, 3)), "bias": jnp.array([0.0, 0.0, -2.0])}}
    found = filter_normalised(direction, params, biases=True)
    np.testing.assert_allclose(found["layer"]["bias"], [0.0, 0.0, -5.0])


@pytest.mark.parametrize("biases", [False, True])
def test_filter_normalised_treats_scanned_and_unrolled_layers_alike(biases):
    options = dict(depth=2, width=8, mlp_width=12)
    model, params = with_parameters("vit_tiny", **options)
    unrolled, _ = with_parameters("vit_tiny", **options, scan=False)
    direction = jax.tree.map(lambda x: x[0], random_directions(params, 1))

    def apart(tree):
        layers = {f"block_{n}": jax.tree.map(lambda x, n=n: x[n], tree["block"]) for n in (0, 1)}
        return {name: x for name, x in tree.items() if name != "block"} | layers

    image = jnp.zeros((1, 8, 8, 1))
    whole = filter_normalised(direction, params, layout(model, params, image), biases=biases)
    facts = layout(unrolled, apart(params), image)
    layers = filter_normalised(apart(direction), apart(params), facts, biases=biases)
    for x, y in zip(jax.tree.leaves(apart(whole)), jax.tree.leaves(layers), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9)


def test_filter_normalised_takes_stacked_directions_and_zero_filters():
    params = {"dense": {"kernel": jnp.array([[3.0, 0.0], [4.0, 0.0]])}}
    found = filter_normalised(random_directions(params, 3), params)["dense"]["kernel"]
    assert found.shape == (3, 2, 2)
    for one in found:
        np.testing.assert_allclose(lengths(one, (1,)), [5.0, 0.0], rtol=1e-6)
    stuck = filter_normalised(jax.tree.map(jnp.zeros_like, params), params)
    assert not np.any(stuck["dense"]["kernel"])


def test_filter_normalised_takes_an_nnx_state_with_or_without_layout():
    model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.relu)
    _, params = nnx_loss(model, lambda model, batch: model(batch))
    direction = jax.tree.map(lambda x: x[0], random_directions(params, 1))
    by_names, by_layout = (filter_normalised(direction, params, x) for x in (None, layout(model)))
    for found in (by_names, by_layout):
        kernel = found["layers"][0]["kernel"]
        expected = lengths(params["layers"][0]["kernel"], (1,))
        np.testing.assert_allclose(lengths(jnp.asarray(kernel), (1,)), expected, rtol=1e-6)


# Trajectories.


def walk(seed=0, points=6):
    """A random path of some steps in the parameters of the net."""
    rng = np.random.default_rng(seed)
    draw = lambda x: np.cumsum(rng.normal(size=(points, *x.shape)), axis=0)
    stack = jax.tree.map(draw, net_params())
    return [jax.tree.map(lambda x, n=n: jnp.asarray(x[n]), stack) for n in range(points)]


def test_trajectory_directions_are_principal_components():
    path = walk()
    rows = np.stack([flat(p) for p in path])
    _, sizes, axes = np.linalg.svd(rows - rows.mean(0))
    found = trajectory_directions(path, 2)
    ways = np.stack([flat(jax.tree.map(lambda x, n=n: x[n], found.directions)) for n in range(2)])
    np.testing.assert_allclose(np.abs(np.sum(ways * axes[:2], axis=1)), 1, rtol=1e-9)
    np.testing.assert_allclose(found.explained, sizes[:2] ** 2 / np.sum(sizes**2), rtol=1e-9)
    np.testing.assert_allclose(found.coordinates, (rows - rows[-1:]) @ ways.T, atol=1e-9)


def test_a_path_within_a_plane_lies_on_its_landscape():
    places = np.array([[3.0, 1.0], [1.0, -1.0], [0.5, 0.5], [0.0, 0.0]])
    path = [{"w": POINT["w"] + a * FIRST["w"] + b * SECOND["w"]} for a, b in places]
    found = trajectory_directions(path, 2)
    np.testing.assert_allclose(np.sum(found.explained), 1)
    for one, (a, b) in zip(path, np.asarray(found.coordinates)):
        corner = landscape(
            quadratic, path[-1], found.directions, span=((a, a + 1), (b, b + 1)), points=2
        )
        assert float(corner.losses[0, 0]) == pytest.approx(float(quadratic(one)))


def test_trajectory_with_too_few_points_is_refused():
    with pytest.raises(ValueError, match="spans 1 directions at most"):
        trajectory_directions([POINT, FIRST], 2)
