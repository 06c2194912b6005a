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
from curvax.curvature.kronecker import kronecker_factors
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
    def computed(self, fisher: str, sharing: str) -> dict[str, Any]:
        """Everything that is recorded for these options, by the name of the recording."""
        options = self.options(fisher, sharing)

        def compute(params: Any, v: Any, gradient: Any) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for bias, name in (("joint", "joint"), ("separate", "sep")):
                factors = kronecker_factors(self.objective(), params, bias=bias, **options)
                corrected = factors.corrected(self.objective(), params, labels=options["labels"])
                found[name] = {
                    "factors": {k: factors.factors_of(f"{k}.weight") for k in self.meta["layers"]},
                    "Kv": factors(v),
                    "trace": factors.trace(),
                    "inv_exact": [factors.solve(gradient, x) for x in self.meta["damping"]],
                    "inv_heuristic": [
                        factors.solve(gradient, x, "heuristic") for x in self.meta["damping"]
                    ],
                    "ekfac_Kv": corrected(v),
                    "ekfac_trace": corrected.trace(),
                    "ekfac_inv": [corrected.solve(gradient, x) for x in self.meta["damping"]],
                }
            return found

        vectors = self.tree(self.arrays["v"]), self.tree(self.arrays["grad"])
        return quick_jit(compute)(self.params, *vectors)

    def tree(self, vector: Any) -> dict[str, jax.Array]:
        parts = np.split(vector, self.arrays["offsets"][1:-1])
        return {k: jnp.asarray(x.reshape(self.params[k].shape)) for k, x in zip(self.order, parts)}

    def like(self, value: Any) -> np.ndarray:
        """A number, a tree or a list of trees as the recording has it."""
        if isinstance(value, list):
            return np.stack([self.like(x) for x in value])
        if not isinstance(value, dict):
            return np.asarray(value)
        return np.concatenate([np.ravel(value[name]) for name in self.order])

    def expected(self, name: str) -> np.ndarray | None:
        return self.arrays.get(name)


read = functools.cache(Recorded)


def is_faulty(run: Recorded, fisher: str, sharing: str) -> bool:
    """Whether the recording has cross terms between the tokens of an example (its note 19)."""
    return run.meta["problem"].startswith("kfactok") and (fisher, sharing) == ("type2", "reduce")


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


every_kind = pytest.mark.parametrize(("fisher", "sharing"), KINDS)
every_run = pytest.mark.parametrize("path", recorded("kfac_*"))


@every_kind
@every_run
def test_factors_are_the_recorded_ones(path, fisher, sharing):
    run = read(path)
    for bias, side in (("joint", "A1"), ("sep", "A")):
        factors = run.computed(fisher, sharing)[bias]["factors"]
        for layer, (inputs, outputs) in factors.items():
            assert_close(inputs, run.arrays[f"{side}/{sharing}/{layer}"], FACTOR)
            # The exact G of `reduce` has one token in every column, as that of `expand`.
            source = "expand" if is_faulty(run, fisher, sharing) else sharing
            assert_close(outputs, run.arrays[f"G/{fisher}/{source}/{layer}"], FACTOR)


@every_kind
@every_run
def test_products_and_solutions_are_the_recorded_ones(path, fisher, sharing):
    run = read(path)
    if is_faulty(run, fisher, sharing):
        return
    for bias, found in run.computed(fisher, sharing).items():
        for name, value in found.items():
            expected = run.expected(f"{fisher}/{sharing}/{bias}/{name}")
            if expected is None:
                continue
            exact = name in ("Kv", "trace")
            assert_close(run.like(value), expected, FACTOR if exact else INVERSE)
