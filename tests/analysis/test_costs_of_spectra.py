"""Cost of a step of Lanczos relative to its product, in FLOPs and memory as XLA counts them.

The perceptron is counted in every run, the ResNet takes minutes to compile:

    python -m pytest tests/analysis/test_costs_of_spectra.py -m "evidence or not evidence"
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from step_costs import LARGE, MODELS, SMALL, Problem

import curvax as cx
from curvax.analysis import block_eigenvalues, hessian_spectrum, top_eigenpairs

EVERY_MODEL = pytest.mark.parametrize(
    "name", [SMALL[0], pytest.param(LARGE[-1], marks=pytest.mark.evidence)]
)
pytestmark = pytest.mark.usefixtures("single_precision")
STEPS = {SMALL[0]: 20, LARGE[-1]: 50}
"""Orthogonalisation against k vectors takes 8 k FLOPs for each weight, a product of a dense layer
about 12 for each weight and example: a batch of 256 hides the first behind the second up to k = 40.
"""


class Curved(Problem):
    """A model's loss over a batch of 256, as shapes only."""

    def __init__(self, name: str):
        super().__init__(name)
        x, y = self.batch
        resized = lambda a: jax.ShapeDtypeStruct((256, *a.shape[1:]), a.dtype)
        self.batch = (resized(x), resized(y))

    @functools.cache  # noqa: B019
    def products(self, times: int) -> tuple[float, int]:
        """(FLOPs, temporary bytes) of a linearisation and so many products in a row."""

        def f(params: Any, v: Any, batch: Any) -> Any:
            product = cx.hvp(cx.Objective(self.loss, batch), params)
            for _ in range(times):
                v = product(v)
            return v

        return self.count(f, self.params, self.params, self.batch)

    @property
    def product(self) -> float:
        """FLOPs of one more product."""
        return self.products(2)[0] - self.products(1)[0]

    def analysis(self, measure: Any, **options: Any) -> tuple[float, int]:
        """The same of an analysis, with the body of every loop counted once."""
        f = lambda params, batch: measure(cx.Objective(self.loss, batch), params, **options)
        return self.count(f, self.params, self.batch)


@functools.cache
def problem(name: str) -> Curved:
    assert name in MODELS
    with jax.enable_x64(False):
        return Curved(name)


@EVERY_MODEL
def test_lanczos_step_costs_one_product(name):
    p = problem(name)
    flops, memory = p.analysis(hessian_spectrum, probes=1, steps=STEPS[name])
    assert flops - p.products(1)[0] <= 0.1 * p.product
    bare, small = p.analysis(hessian_spectrum, probes=1, steps=STEPS[name], keep_basis=False)
    assert bare - p.products(1)[0] <= 0.02 * p.product
    # A few vectors come and go with every step; the basis is what stays.
    assert memory >= small + 0.9 * (STEPS[name] - 5) * p.bytes
    # A loop keeps the residuals of the linearisation in addition to what each product needs.
    assert small <= 1.6 * p.products(1)[1] + 8 * p.bytes


@EVERY_MODEL
def test_restarted_search_step_costs_one_product(name):
    """Its program has three: in the first subspace, in the loop of those after, and at the end.

    Each of the first two comes with a change of basis, once for thirteen products, and a fresh
    vector, a branch taken where nothing else is left: together the third product that is allowed.
    """
    p = problem(name)
    flops, _ = p.analysis(top_eigenpairs, k=1, subspace=20)
    assert flops - p.products(1)[0] <= (2 * 1.1 + 1.1) * p.product


def test_block_eigenvalues_share_one_linearisation():
    """Three products and one more for each of four blocks, and the gradient once."""
    p = problem(SMALL[0])
    flops, _ = p.analysis(block_eigenvalues, subspace=4)
    gradient = p.products(1)[0] - p.product
    assert len(p.params) == 4
    assert flops - gradient <= 1.1 * 4 * 4 * p.product


def test_eigenvectors_of_a_half_precision_model_are_float32():
    """Half-precision parameters: twenty vectors of four bytes an entry."""
    p = problem(SMALL[0])
    half = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
    params = jax.tree.map(half, p.params)
    f = lambda params, batch: top_eigenpairs(cx.Objective(p.loss, batch), params).vectors
    out = jax.eval_shape(f, params, p.batch)
    assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype("float32")}
