"""Wall time and memory of Lanczos on a network's Hessian and of matfree's, in turn in one process.

    python -m pytest tests/evidence/test_wall_time_of_lanczos.py -m evidence

writes tests/evidence/clocks_spectra.md. It needs matfree: pip install matfree.
"""

import os

import evidence_tables
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from wall_time import against, in_turn

import curvax as cx
from curvax.linalg import lanczos, rademacher
from curvax.models import build

pytestmark = [pytest.mark.evidence, pytest.mark.usefixtures("single_precision")]
COMMAND = "python -m pytest tests/evidence/test_wall_time_of_lanczos.py -m evidence"
STEPS, BATCH, SIDE = 50, 256, 8
ROUNDS = int(os.environ.get("CURVAX_ROUNDS", "3"))


@pytest.fixture
def problem():
    """The Hessian of ResNet-20's loss on a batch, with batch norm as in evaluation."""
    model, keys = build("resnet20", classes=10), jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (BATCH, SIDE, SIDE, 3))
    variables = model.init(keys[1], x)
    params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    batch = {"x": x, "y": jax.random.randint(keys[2], (BATCH,), 0, 10)}
    predict = lambda params, batch: model.apply({"params": params, **rest}, batch["x"])
    objective = cx.Objective(cx.categorical("y"), batch, model=predict)
    once = jax.jit(lambda params, v: cx.hvp(objective, params)(v))

    def product(params):
        def compiled(v):
            with jax.disable_jit(False):
                return once(params, v)

        return compiled

    return product, params, rademacher(keys[3], params)


def stepped(f):
    """f with its loop run by Python: XLA's own runs convolutions slowly on CPUs."""

    def run(*args):
        with jax.disable_jit():
            return f(*args)

    return run


def bytes_beyond(f, *args):
    """What a program needs beyond arguments and results."""
    memory = jax.jit(f).lower(*args).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def test_lanczos_is_as_fast_as_that_of_matfree(problem):
    decomp = pytest.importorskip("matfree.decomp", reason="pip install matfree")
    product, params, v0 = problem
    _, unravel = ravel_pytree(params)

    def matfree(params, v0):
        flat = lambda v: ravel_pytree(product(params)(unravel(v)))[0]
        run = decomp.tridiag_sym(STEPS, reortho="full", custom_vjp=False)
        return run(flat, ravel_pytree(v0)[0]).J_small

    def curvax(keep_basis):
        return lambda params, v0: lanczos(product(params), v0, STEPS, keep_basis=keep_basis).matrix

    programs = {
        "curvax": curvax(True),
        "matfree, full re-orthogonalisation": matfree,
        "curvax, keep_basis=False": curvax(False),
    }
    in_python = {name: stepped(f) for name, f in programs.items()}
    clocks, results = in_turn(in_python, params, v0, rounds=ROUNDS)
    ours, theirs = (
        np.linalg.eigvalsh(np.asarray(results[name], float)) for name in [*programs][:2]
    )
    np.testing.assert_allclose(ours[[0, -1]], theirs[[0, -1]], rtol=1e-3)
    size = 4 * sum(x.size for x in jax.tree.leaves(params))
    alone = bytes_beyond(lambda params, v: product(params)(v), params, v0)
    rows = [
        (
            name,
            f"{against(clocks, name, 'curvax'):.2f}",
            f"{np.median(found) / STEPS:.2f}",
            f"{(bytes_beyond(programs[name], params, v0) - alone) / size:.1f}",
        )
        for name, found in clocks.items()
    ]
    evidence_tables.write(
        "clocks_spectra",
        "Lanczos on the Hessian of ResNet-20, compared with matfree's",
        f"Made by `{COMMAND}`: {STEPS} steps, a batch of {BATCH} images of {SIDE}×{SIDE}×3, "
        f"{jnp.size(ravel_pytree(params)[0])} parameters; the median of "
        f"{len(clocks['curvax'])} rounds, all in turn in one process on {os.cpu_count()} CPU "
        "cores, every program calling one compiled product from Python. Memory is what the "
        "program compiled whole needs beyond its arguments, its results and what one "
        "product needs, in copies of the parameters.",
        ["program", "× curvax", "seconds a step", "copies of the parameters"],
        rows,
    )
    assert against(clocks, "curvax", "matfree, full re-orthogonalisation") <= 1.05
