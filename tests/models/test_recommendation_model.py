"""The recommendation model: its layers counted, its outputs written out, its roles and tables."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.models import build

COUNTS = (5, 2, 9)
OPTIONS = {"categories": COUNTS, "width": 4, "bottom": (6, 3), "top": (8,)}


def inputs(n: int = 7) -> jax.Array:
    rng = np.random.default_rng(0)
    categories = [rng.integers(0, count, n) for count in COUNTS]
    return jnp.asarray(np.stack([*rng.standard_normal((2, n)), *categories], 1))


def shapes_of(name: str, x, **options):
    return jax.eval_shape(build(name, 1, **options).init, jax.random.key(0), x)


def parameters(widths) -> int:
    return sum(a * b + b for a, b in itertools.pairwise(widths))


@pytest.mark.parametrize(
    ("options", "bottom", "top"),
    [({}, (512, 256, 64, 16), (512, 256, 1)), (OPTIONS, (6, 3, 4), (8, 1))],
)
def test_number_of_parameters_is_that_of_the_layers(options, bottom, top):
    options = {"categories": COUNTS} | options
    variables = shapes_of("dlrm", inputs(), **options)
    width, pairs = bottom[-1], math.comb(len(COUNTS) + 1, 2)
    expected = sum(COUNTS) * width + parameters([2, *bottom]) + parameters([width + pairs, *top])
    assert sum(math.prod(p.shape) for p in jax.tree.leaves(variables)) == expected


def test_networks_for_criteo_have_the_authors_widths():
    """13 numbers and 26 categories: 13-512-256-64-16, then 367-512-256-1 with 351 products."""
    x, categories = jax.ShapeDtypeStruct((1, 39), jnp.float32), (10,) * 26
    variables = shapes_of("dlrm", x, categories=categories)
    total = sum(math.prod(p.shape) for p in jax.tree.leaves(variables))
    assert total - 26 * 10 * 16 == 475_985


def test_outputs_are_the_equations():
    x, model = inputs(), build("dlrm", 2, **OPTIONS)
    rng = np.random.default_rng(1)
    draw = lambda leaf: 0.5 * rng.standard_normal(leaf.shape)
    p = jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0), x)["params"])
    layer = lambda h, name: h @ p[name]["kernel"] + p[name]["bias"]
    found = []
    for row in np.asarray(x):
        h = row[:2]
        for n in range(3):
            h = np.maximum(layer(h, f"bottom{n}"), 0)
        vectors = [h] + [p[f"table{i}"]["embedding"][int(row[2 + i])] for i in range(3)]
        products = [vectors[i] @ vectors[j] for i in range(4) for j in range(i)]
        h = np.maximum(layer(np.concatenate([h, products]), "top0"), 0)
        found.append(layer(h, "head"))
    outputs = jax.jit(model.apply)({"params": p}, x)
    assert np.std(found) > 0.1
    np.testing.assert_allclose(outputs, found, rtol=1e-10)


def test_roles_of_tables_and_layers_are_recognised():
    x, model = inputs(), build("dlrm", 1, **OPTIONS)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    for found in (curvax.layout(model, variables, x), curvax.layout(variables["params"])):
        kinds = {"/".join(path): leaf.kind for path, leaf in found.items()}
        for path, kind in kinds.items():
            expected = {"embedding": "embedding", "kernel": "dense", "bias": "bias"}
            assert kind == expected[path.split("/")[-1]], path
        table = found["table2", "embedding"]
        assert (table.shape, table.inputs, table.outputs) == ((9, 4), (0,), (1,))


def test_parameters_start_as_in_the_authors_code():
    options = {"categories": (400, 25), "width": 300, "bottom": (), "top": (200,)}
    x = jnp.zeros((1, 500))
    p = jax.jit(build("dlrm", 1, **options).init)(jax.random.key(0), x)["params"]
    for name, rows in (("table0", 400), ("table1", 25)):
        table = np.asarray(p[name]["embedding"])
        assert 0.99 < np.abs(table).max() * rows**0.5 <= 1
        assert table.std() == pytest.approx((3 * rows) ** -0.5, rel=0.03)  # uniform in ±1/√rows
    assert p["bottom0"]["kernel"].std() == pytest.approx((2 / 798) ** 0.5, rel=0.03)
    assert p["bottom0"]["bias"].std() == pytest.approx(300**-0.5, rel=0.2)
    assert float(p["head"]["bias"][0]) == 0


def test_category_out_of_range_makes_the_logit_nan():
    x, model = inputs(), build("dlrm", 1, **OPTIONS)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    logits: Any = jax.jit(model.apply)(variables, x.at[3, 2].set(5.0))
    assert np.isnan(logits[:, 0]).tolist() == [n == 3 for n in range(7)]


@pytest.mark.parametrize(
    ("categories", "columns", "words"),
    [
        ((), 5, "`categories` has the number.*got \\(\\)"),
        ((3, 0), 5, "from 1.*got \\(3, 0\\)"),
        ((3, 2), 2, "at least one number and then the categories of the 2 tables.*\\(4, 2\\)"),
    ],
)
def test_tables_that_do_not_fit_are_refused(categories, columns, words):
    with pytest.raises(ValueError, match=words):
        shapes_of("dlrm", jnp.zeros((4, columns)), categories=categories)
