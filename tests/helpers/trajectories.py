"""Recorded runs of the reference implementations, and the replay that follows them.

A run is a file of arrays with time first: `params/*` one row longer than the rest, `batch_idx` the
rows of the problem's data seen at each step, and `meta_json` with problem and hyperparameters. The
folder is `$CURVAX_FIXTURES`, or `shared/fixtures` next to the project; without it, replays skip.
"""

import functools
import json
import os
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from repository import ROOT

from curvax import Objective, stage

BESIDE = ROOT.parent / "shared" / "fixtures"
FOLDER = Path(os.environ.get("CURVAX_FIXTURES", BESIDE))

TRAJECTORY = 1e-9
"""Absolute, of all parameters over all steps: rounding grows from step to step."""
STEP = 1e-12
"""Absolute, of what one step computes from recorded parameters."""
SINGLE, SINGLE_STEP = 1e-6, 1e-5
"""The same two for a run recorded in float32, where diagonals may be of order ten."""


def recorded(*patterns):
    """The runs whose file names match, as test parameters; one that skips where there are none."""
    paths = sorted({path for pattern in patterns for path in FOLDER.glob(f"{pattern}.npz")})
    if paths:
        return [pytest.param(path, id=path.stem) for path in paths]
    reason = f"no recorded run {patterns} in {FOLDER}: set `CURVAX_FIXTURES` to their folder"
    return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="none")]


class Run:
    """A recorded run; `prefix` picks one of several in a file."""

    def __init__(self, path, prefix=""):
        self.arrays, self.prefix = np.load(path), prefix
        self.meta = json.loads(str(self.arrays["meta_json"]))
        self.hyper = self.meta["hyper"]
        self.problem = load_problem(self.meta["problem"])
        self.params = self.tree("params")
        self.dtype = np.result_type(*self.params.values(), np.float32)

    @property
    def tolerances(self):
        """(of the trajectory, of one step)"""
        return (TRAJECTORY, STEP) if self.dtype == np.float64 else (SINGLE, SINGLE_STEP)

    def __getitem__(self, name):
        return self.arrays[self.prefix + name]

    def tree(self, family):
        """`family/<parameter>` as {parameter: array}, time first."""
        start = f"{self.prefix}{family}/"
        return {k.removeprefix(start): self.arrays[k] for k in self.arrays if k.startswith(start)}

    def loss(self, params, batch):
        """The mean over the batch, with the broadcasting of its author."""
        with jax.numpy_rank_promotion("allow"):
            return self.problem.loss(params, batch)

    def batches(self):
        """The batch of every step, stacked, in the dtype of the run."""
        rows = self.arrays["batch_idx"]
        picked = jax.tree.map(lambda x: x[rows], self.problem.data)
        return jax.tree.map(lambda x: x.astype(self.dtype) if x.dtype.kind == "f" else x, picked)

    def precision(self):
        """The context in which JAX computes in the precision of the run."""
        return jax.enable_x64(self.dtype == np.float64)


@functools.cache
def load_problem(name):
    """A problem that runs were recorded on: its parameters, data, model and loss."""
    load = runpy.run_path(str(FOLDER / "problems.py"))["load_problem"]
    return load(FOLDER / f"problem_{name}.npz")


def tap(name, field="updates"):
    """A stage that keeps a tree of the signal in its state under `name`, and changes nothing."""

    def init(params):
        return {name: jax.tree.map(jnp.zeros_like, params)}

    return stage(init, lambda signal, state, params, **_: (signal, {name: getattr(signal, field)}))


def stepper(loss, method):
    """One step of training, `step(params, state, batch, given) -> (params, state)`.

    Args:
        loss: `loss(params, batch) -> scalar`.
        method: `method(given) -> transformation`, where `given` is what the recording hands to
            this step: probes, a learning rate.
    """

    def step(params, state, batch, given):
        objective = Objective(loss, batch)
        _, grads = objective.value_and_grad(params)
        updates, state = method(given).update(grads, state, params, value_fn=objective)
        return optax.apply_updates(params, updates), state

    return step


def replay(step, state, params, *inputs):
    """Follows a run, and takes each single step from the recorded parameters as well.

    Args:
        step: as `stepper` returns it, compiled.
        state: of the optimiser at the start.
        params: recorded ones, [T+1, ...].
        inputs: batch and whatever is given, of every step, [T, ...].

    Returns:
        The trajectory, [T+1, ...], and the state after each of the T single steps.
    """
    own, beside = [row(params, 0)], []
    for t in range(len(jax.tree.leaves(params)[0]) - 1):
        beside.append(step(row(params, t), state, *row(inputs, t))[1])
        new, state = step(own[-1], state, *row(inputs, t))
        own.append(new)
    return _stacked(own), beside


def follow(run, method, given=None):
    """`replay` of a whole run from its recorded start by `method(given) -> transformation`."""
    with run.precision():
        step = jax.jit(stepper(run.loss, method))
        state = method(row(given, 0)).init(row(run.params, 0))
        return replay(step, state, run.params, run.batches(), given)


def tapped(states, name):
    """`tap(name)`, or the field or diagnostic of that name, in each state: [T, ...]."""
    return _stacked([optax.tree.get(state, name) for state in states])


def row(tree: Any, t: int | slice) -> Any:
    """The arrays of a tree at one step, or at several."""
    return jax.tree.map(lambda x: x[t], tree)


def _stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *x: np.stack(x), *trees)


def assert_same(found, expected, tolerance):
    """Equality of {parameter: array} up to an absolute tolerance."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=tolerance, err_msg=name)
