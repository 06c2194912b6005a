"""Factors are those of kfac-jax, recorded with version 0.0.8 or computed where it is at hand."""

import json
import os
import subprocess
from pathlib import Path

import kfac_jax_factors
import numpy as np
import pytest

import curvax as cx

HELPER = Path(kfac_jax_factors.__file__)
RECORDED = json.loads(HELPER.with_suffix(".json").read_text())


def of_kfac_jax(name):
    return tuple(map(np.asarray, RECORDED[name]))


@pytest.mark.parametrize("layer", ["conv", "hidden", "out"])
@pytest.mark.parametrize("fisher", kfac_jax_factors.MODES)
def test_factors_are_those_of_kfac_jax(fisher, layer):
    """Its empirical Fisher matrix is divided by the number of examples once more."""
    params, batch = kfac_jax_factors.problem()
    objective = cx.Objective(cx.categorical("label"), batch, model=kfac_jax_factors.predict)
    factors = cx.kronecker_factors(objective, params, fisher=fisher)
    found = np.kron(*factors.factors_of(f"{layer}/w"))
    expected = np.kron(*of_kfac_jax(f"{fisher} {layer}"))
    divided = len(batch["x"]) if fisher == "empirical" else 1
    np.testing.assert_allclose(found, divided * expected, rtol=1e-12, atol=1e-15)


@pytest.mark.skipif(
    "CURVAX_KFAC_JAX" not in os.environ,
    reason="needs kfac-jax 0.0.8 with jax 0.9.0 in a Python of its own, CURVAX_KFAC_JAX=PATH",
)
def test_recorded_factors_are_those_of_kfac_jax_today():
    env = {"PATH": os.environ["PATH"], "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}
    python = os.environ["CURVAX_KFAC_JAX"]
    ran = subprocess.run([python, HELPER], env=env, capture_output=True, text=True, check=True)
    for name, factors in json.loads(ran.stdout.splitlines()[-1]).items():
        for found, expected in zip(factors, of_kfac_jax(name), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14)
