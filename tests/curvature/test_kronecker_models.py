"""Which parameters of real models have Kronecker factors, by tracing alone."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import curvax as cx
from curvax import models
from curvax.arithmetic import trees
from curvax.curvature.kronecker import LeafReport
from curvax.curvature.kronecker.tapped import traced

IMAGES = {"x": jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)}
TOKENS = {"x": jax.ShapeDtypeStruct((2, 8), jnp.int32)}


def reports_of(model: Any, params: Any, batch: Any) -> dict[str, LeafReport]:
    """The report of `kronecker_factors`, from shapes alone."""
    found: list[tuple[LeafReport, ...]] = []

    def trace(params: Any, batch: Any) -> None:
        logits = jax.eval_shape(model, params, batch)
        batch = dict(batch, y=jnp.zeros(logits.shape[:-1], int))
        objective = cx.Objective(cx.categorical("y"), batch, model=model)
        found.append(traced(objective, params).plan.reports)

    jax.eval_shape(trace, params, batch)
    paths = [trees.label(trees.names(path)) for path, _ in jax.tree.leaves_with_path(params)]
    return dict(zip(paths, found[0], strict=True))


def share(reports: dict[str, LeafReport]) -> float:
    """The share of the numbers that are in a Kronecker block."""
    inside = sum(r.size for r in reports.values() if r.treatment in ("kronecker", "bias"))
    return inside / sum(r.size for r in reports.values())


def of_linen(name: str, batch: Any, **options: Any) -> dict[str, LeafReport]:
    module = models.build(name, classes=10, **options)
    variables = jax.eval_shape(module.init, jax.random.key(0), batch["x"])
    rest = {k: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), v) for k, v in variables.items()}
    kept = [k for k in rest if k != "params"]

    def model(params: Any, batch: Any) -> Any:
        out = module.apply({**rest, "params": params}, batch["x"], train=True, mutable=kept)
        return out[0]

    return reports_of(model, variables["params"], batch)


ALLOWED = ("scale", "bias", "pos_embedding", "cls")
"""Last names of parameters that multiply no features: norms, their biases, positions."""


@pytest.mark.parametrize(
    ("name", "batch", "options"),
    [
        ("resnet20", IMAGES, {}),
        ("wrn16_4", IMAGES, {}),
        ("vit_s16", IMAGES, {"dropout": 0.0, "pool": "token"}),
        ("mixer_s16", IMAGES, {"dropout": 0.0}),
        ("lm_tiny", TOKENS, {}),
    ],
)
def test_every_kernel_of_a_model_of_the_papers_is_factored(name, batch, options):
    reports = of_linen(name, batch, **options)
    left = {path: r for path, r in reports.items() if r.treatment not in ("kronecker", "bias")}
    assert {path.split("/")[-1] for path in left} <= set(ALLOWED), left
    assert share(reports) > 0.985


def test_scanned_layers_have_factors_of_their_own():
    reports = of_linen("vit_s16", IMAGES, dropout=0.0)
    kernels = {
        path: r for path, r in reports.items() if "block" in path and path.endswith("kernel")
    }
    assert kernels
    assert {r.stack for r in kernels.values()} == {(12,)}


class Attention(nnx.Module):
    """Attention by `einsum` over heads, and an MLP."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        key = rngs.params()
        draw = lambda *shape: nnx.Param(jax.random.normal(key, shape, jnp.float32))
        self.qkv = draw(3, width, heads, width // heads)
        self.out = draw(heads, width // heads, width)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.mlp = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = jnp.einsum("btd,cdhk->cbthk", self.norm(x), self.qkv[...])
        weights = jax.nn.softmax(jnp.einsum("bqhk,bthk->bhqt", q, k))
        x = x + jnp.einsum("bhqt,bthk,hkd->bqd", weights, v, self.out[...])
        return x + self.mlp(jax.nn.gelu(x))


def test_an_nnx_transformer_by_einsum_is_factored():
    module = Attention(8, 2, nnx.Rngs(0))
    graph, params = nnx.split(module)
    model = lambda params, batch: nnx.merge(graph, params)(batch["x"])
    reports = reports_of(model, params, {"x": jnp.ones((2, 5, 8), jnp.float32)})
    treatments = {path.split("/")[0]: r.treatment for path, r in reports.items()}
    assert treatments["qkv"] == treatments["out"] == "kronecker"
    assert (
        reports["mlp/kernel/value" if "mlp/kernel/value" in reports else "mlp/kernel"].inputs == 8
    )


def test_an_equinox_network_is_factored():
    keys = jax.random.split(jax.random.key(0), 2)
    module = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 4, 3, key=keys[0]),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(16, 2, key=keys[1]),
        ]
    )
    params, static = eqx.partition(module, eqx.is_inexact_array)
    model = lambda params, batch: jax.vmap(eqx.combine(params, static))(batch["x"])
    reports = reports_of(model, params, {"x": jnp.ones((2, 3, 4, 4))})
    assert share(reports) == 1.0
