"""Every method on two processes of four devices equals a float64 loop over the shards."""

from typing import Any

import device_problem as problem
import jax
import numpy as np
import pytest
from device_problem import DEVICES, PER_DEVICE
from jax.flatten_util import ravel_pytree
from processes import ended, start
from repository import ROOT
from shard_methods import DAMPING, KEY, LR, MAPPINGS, METHODS

WORKER = ROOT / "tests" / "helpers" / "shards_run.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The parameters of two processes, by method and mapping."""
    file = tmp_path_factory.mktemp("found") / "found.npz"
    for status, said in ended(start(2, file, worker=WORKER)):
        assert status == 0, said
    return np.load(file)


def natural(params, batch):
    """(F + λ)⁻¹ g from the Jacobian of each shard, F = 1/N Σ JᵀJ of a Gaussian of variance 1."""
    flat, unravel = ravel_pytree(params)
    parts = problem.pieces(batch)
    of = lambda piece: lambda x: problem.predict(unravel(x), piece)
    jacobians = [jax.jacfwd(of(piece))(flat) for piece in parts]
    fisher = sum(J.T @ J / PER_DEVICE for J in jacobians) / DEVICES
    residuals = [of(piece)(flat) - piece["y"] for piece in parts]
    gradient = sum(J.T @ r / PER_DEVICE for J, r in zip(jacobians, residuals)) / DEVICES
    return unravel(jax.numpy.linalg.solve(fisher + DAMPING * np.eye(len(flat)), gradient))


GRADIENTS = {
    "SAM": problem.local(problem.sam_of),
    "SAM, synced": problem.synced,
    "GSAM": problem.local(problem.gsam_of),
    "groups of half a device": problem.local(problem.gsam_of, 2 * DEVICES),
    "groups of two devices": problem.local(problem.sam_of, DEVICES // 2),
    "groups of eight devices": problem.gsam_of,
    "natural gradient": natural,
}


def expected(name):
    params, batch = problem.make_params(), problem.make_batch()
    if name in GRADIENTS:
        return problem.sgd_over(lambda p: GRADIENTS[name](p, batch), params, lr=LR)
    shared = name == "AdaHessian"
    return problem.adahessian_loop(params, batch, jax.random.key(KEY), shared=shared, lr=LR)


@pytest.mark.parametrize("name", METHODS)
def test_methods_on_two_processes_equal_the_loop_over_shards(name, found):
    reference = problem.ravel(expected(name))
    assert np.abs(reference - problem.ravel(problem.make_params())).max() > 1e-2
    for mapping in MAPPINGS:
        # g / |d| amplifies the rounding of a small d
        close: Any = dict(rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found[f"{name}, {mapping}"], reference, err_msg=mapping, **close)
