"""The recorded curvature of a problem: dense matrices at its initial parameters."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from small_problems import flat, matrix_of
from trajectories import load_problem

import curvax as cx
from curvax.likelihoods import categorical


class Recorded:
    """The curvature of a recorded problem at its initial parameters."""

    def __init__(self, path: Any):
        self.arrays = np.load(path)
        self.problem = load_problem(json.loads(str(self.arrays["meta_json"]))["problem"])
        self.params = self.problem.params
        # ravel_pytree sorts the parameters by name, the recording does not.
        place = self.problem.unflatten(jnp.arange(len(self.arrays["theta"])))
        self.order = np.argsort(flat(place))

    def objective(self, **options: Any) -> cx.Objective:
        def model(params: Any, batch: Any) -> jax.Array:
            with jax.numpy_rank_promotion("allow"):
                return self.problem.logits(params, batch)

        return cx.Objective(categorical("Y"), self.problem.batch(), model=model, **options)

    def matrix(self, make: Any) -> np.ndarray:
        return matrix_of(make, self.params)[np.ix_(self.order, self.order)]

    def expected(self, name: str) -> np.ndarray:
        if name in self.arrays:
            return self.arrays[name]
        size = len(self.arrays["theta"])
        upper = np.zeros((size, size))
        upper[np.triu_indices(size)] = self.arrays[f"triu/{name}"]
        return upper + np.triu(upper, 1).T


@functools.cache
def read(path: Any) -> Recorded:
    return Recorded(path)
