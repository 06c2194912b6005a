"""Kronecker factors against the recorded numbers of another implementation."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_problems import quick_jit
from trajectories import load_problem, recorded

import curvax as cx
from curvax.curvature.kronecker import KroneckerFactors, kronecker_factors
from curvax.likelihoods import categorical

FISHERS = {"type2": "exact", "empirical": "empirical", "mc": "sampled"}
KINDS = [(f, s) for f in FISHERS for s in ("expand", "reduce")]
FACTOR, INVERSE = 1e-12, 1e-10
"""Relative to the largest entry: of factors and products, and of what needs eigenvectors."""


class Recorded:
    """The recorded factors of a problem at its initial parameters, and the same problem here."""

    def __init__(self, path: Any):
        self.arrays = np.load(path)
        self.meta = json.loads(str(self.arrays["meta_json"]))
        self.problem = load_problem(self.meta["problem"])
        self.order = [name for name in self.problem.cfg["param_order"] if name not in self.excluded]

    @property
    def excluded(self) -> list[str]:
        return self.meta["excluded"]

    def objective(self) -> cx.Objective:
        def model(params: Any, batch: Any) -> jax.Array:
            with jax.numpy_rank_promotion("allow"):
                return self.problem.logits({**self.problem.params, **params}, batch)

        return cx.Objective(categorical("Y"), self.problem.batch(), model=model)

    @property
    def params(self) -> dict[str, jax.Array]:
        return {name: self.problem.params[name] for name in self.order}

    def options(self, fisher: str, sharing: str) -> dict[str, Any]:
        labels = self.arrays["mc_labels"] if fisher == "mc" else None
        return dict(fisher=FISHERS[fisher], sharing=sharing, labels=labels)

    @functools.cache  # noqa: B019 recordings live as long as the tests
    def factors(self, fisher: str, sharing: str, bias: str) -> KroneckerFactors:
        options = self.options(fisher, sharing)
        return quick_jit(
            lambda params: kronecker_factors(self.objective(), params, bias=bias, **options)
        )(self.params)

    def tree(self, vector: Any) -> dict[str, jax.Array]:
        parts = np.split(vector, self.arrays["offsets"][1:-1])
        return {k: jnp.asarray(x.reshape(self.params[k].shape)) for k, x in zip(self.order, parts)}

    def flat(self, tree: dict[str, jax.Array]) -> np.ndarray:
        return np.concatenate([np.ravel(tree[name]) for name in self.order])

    def has(self, name: str) -> bool:
        return name in self.arrays


read = functools.cache(Recorded)


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def is_faulty(run: Recorded, fisher: str, sharing: str) -> bool:
    """Whether the recording has cross terms between the tokens of an example (its note 19)."""
    return run.meta["problem"].startswith("kfactok") and (fisher, sharing) == ("type2", "reduce")


def name_of(bias: str) -> str:
    return {"joint": "joint", "separate": "sep"}[bias]


every_kind = pytest.mark.parametrize(("fisher", "sharing"), KINDS)
every_bias = pytest.mark.parametrize("bias", ["joint", "separate"])
every_run = pytest.mark.parametrize("path", recorded("kfac_*"))


@every_kind
@every_bias
@every_run
def test_factors_are_the_recorded_ones(path, bias, fisher, sharing):
    run = read(path)
    factors = run.factors(fisher, sharing, bias)
    side = "A1" if bias == "joint" else "A"
    for layer in run.meta["layers"]:
        inputs, outputs = factors.factors_of(f"{layer}.weight")
        assert_close(inputs, run.arrays[f"{side}/{sharing}/{layer}"], FACTOR)
        source = "expand" if is_faulty(run, fisher, sharing) else sharing
        assert_close(outputs, run.arrays[f"G/{fisher}/{source}/{layer}"], FACTOR)


@every_kind
@every_bias
@every_run
def test_products_and_solutions_are_the_recorded_ones(path, bias, fisher, sharing):
    run = read(path)
    if is_faulty(run, fisher, sharing):
        return
    factors, prefix = run.factors(fisher, sharing, bias), f"{fisher}/{sharing}/{name_of(bias)}"
    v, gradient = run.tree(run.arrays["v"]), run.tree(run.arrays["grad"])
    assert_close(run.flat(factors(v)), run.arrays[f"{prefix}/Kv"], FACTOR)
    assert_close(factors.trace(), run.arrays[f"{prefix}/trace"], FACTOR)
    for n, damping in enumerate(run.meta["damping"]):
        for style in ("exact", "heuristic"):
            found = run.flat(factors.solve(gradient, damping, style))
            assert_close(found, run.arrays[f"{prefix}/inv_{style}"][n], INVERSE)


@every_kind
@every_bias
@every_run
def test_corrected_factors_are_the_recorded_ones(path, bias, fisher, sharing):
    run, prefix = read(path), f"{fisher}/{sharing}/{name_of(bias)}"
    if not run.has(f"{prefix}/ekfac_Kv"):
        return
    options = run.options(fisher, sharing)
    corrected = quick_jit(
        lambda factors, params: factors.corrected(run.objective(), params, labels=options["labels"])
    )(run.factors(fisher, sharing, bias), run.params)
    v, gradient = run.tree(run.arrays["v"]), run.tree(run.arrays["grad"])
    assert_close(run.flat(corrected(v)), run.arrays[f"{prefix}/ekfac_Kv"], INVERSE)
    assert_close(corrected.trace(), run.arrays[f"{prefix}/ekfac_trace"], INVERSE)
    for n, damping in enumerate(run.meta["damping"]):
        found = run.flat(corrected.solve(gradient, damping))
        assert_close(found, run.arrays[f"{prefix}/ekfac_inv"][n], INVERSE)
