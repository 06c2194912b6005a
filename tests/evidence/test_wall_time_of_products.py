"""Wall time of curvature products and CG, in turn with those of kfac-jax, JAX and somax.

    python -m pytest tests/evidence/test_wall_time_of_products.py -m evidence

writes tests/evidence/clocks_natural.md. kfac-jax and somax are measured where they are installed:
pip install kfac-jax python-somax.
"""

import os

import evidence_tables
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wall_time import MODELS, Problem, against, in_turn

import curvax as cx

pytestmark = [pytest.mark.evidence, pytest.mark.usefixtures("single_precision")]
COMMAND = "python -m pytest tests/evidence/test_wall_time_of_products.py -m evidence"
ROUNDS = int(os.environ.get("CURVAX_ROUNDS", "30"))
ITERATIONS = 20
DAMPING = 1.0
"""Large enough for b - A x to fall through all the iterations without reaching zero."""


class Solving(Problem):
    """A model and its likelihood at a point, and a right-hand side."""

    def __init__(self, name):
        super().__init__(name)
        self.gradient = jax.grad(self.loss)(self.params, self.batch)

    def product(self, params):
        predict = lambda params, batch: self.apply(params, batch["x"])
        return cx.ggnvp(cx.Objective(cx.categorical("y"), self.batch, model=predict), params)

    def curvax_products(self, times):
        """Linearised once, applied in a loop."""

        def run(params, v):
            return in_a_loop(self.product(params), v, times)

        return run

    def kfac_products(self, kfac, times):
        def func(params, batch):
            logits = self.apply(params, batch["x"])
            kfac.register_softmax_cross_entropy_loss(logits, batch["y"])
            return self.loss(params, batch)

        exact = kfac.ImplicitExactCurvature(func, batch_size_extractor=lambda b: b["x"].shape[0])

        def run(params, v):
            return in_a_loop(lambda v: exact.multiply_ggn((params, self.batch), v), v, times)

        return run

    def curvax_cg(self, params, b):
        return cx.cg(ITERATIONS, tol=0.0)(self.product(params).damped(DAMPING), b).x

    def jax_cg(self, params, b):
        product = self.product(params).damped(DAMPING)
        return jax.scipy.sparse.linalg.cg(product, b, tol=0.0, maxiter=ITERATIONS)[0]

    def somax_cg(self, *, stabilise_every):
        somax = pytest.importorskip("somax", reason="pip install python-somax")
        from somax.curvature.ggn_ce import GGNCE
        from somax.solvers.cg import ConjugateGradient

        assert somax
        curvature = GGNCE(predict_fn=self.apply)
        solver = ConjugateGradient(
            maxiter=ITERATIONS, tol=0.0, warm_start=False, stabilise_every=stabilise_every
        )

        def run(params, b):
            state, _ = curvature.init(params, self.batch)
            damped = lambda v: jax.tree.map(
                lambda c, x: c + DAMPING * x, curvature.matvec(params, state, v), v
            )
            return solver.solve(damped, b, state=solver.init(params))[0]

        return run


def in_a_loop(product, v, times):
    return jax.lax.fori_loop(0, times, lambda _, v: product(v), v)


def seconds(programs, *args):
    """Seconds of each program, [rounds], all in turn; and what they return."""
    compiled = {name: jax.jit(f).lower(*args).compile() for name, f in programs.items()}
    return in_turn(compiled, *args, rounds=ROUNDS)


def assert_agree(results, rtol):
    """All the programs found the same vector."""
    first, *others = (jax.flatten_util.ravel_pytree(x)[0] for x in results.values())
    for other in others:
        assert jnp.linalg.norm(other - first) <= rtol * jnp.linalg.norm(first)


@pytest.fixture(scope="module")
def record():
    rows = []

    def add(model, clocks, base, each):
        for name, found in clocks.items():
            milliseconds = f"{1e3 * np.median(found) / each:.1f}"
            rows.append((model, name, f"{against(clocks, name, base):.2f}", milliseconds))

    yield add
    evidence_tables.write(
        "clocks_natural",
        "Wall time of curvature products and of conjugate gradients, compared with other libraries",
        f"Made by `{COMMAND}`: the median of {ROUNDS} rounds, all in turn in one process on "
        f"{os.cpu_count()} CPU cores. Milliseconds of one product or iteration.",
        ["model", "program", "× curvax", "milliseconds"],
        rows,
    )


@pytest.fixture
def kfac(monkeypatch):
    """kfac-jax, whose release 0.0.8 evaluates primitives as JAX did before 0.10."""
    kfac = pytest.importorskip("kfac_jax", reason="pip install kfac-jax")

    def evaluate(eqn, values):
        found = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
        return found if isinstance(found, list) else [found]

    monkeypatch.setattr(kfac.tag_graph_matcher, "eval_jaxpr_eqn", evaluate)
    return kfac


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # kfac-jax's own
@pytest.mark.parametrize("model", MODELS)
def test_gauss_newton_products_are_as_fast_as_those_of_kfac_jax(model, kfac, record):
    """kfac-jax linearises in each product; in a loop the compiler hoists the linearisation."""
    p = Solving(model)
    for times in 1, 10:
        programs = {
            f"curvax.ggnvp, {times} in a loop": p.curvax_products(times),
            f"kfac_jax.ImplicitExactCurvature, {times} in a loop": p.kfac_products(kfac, times),
        }
        clocks, results = seconds(programs, p.params, p.gradient)
        assert_agree(results, 1e-3)
        mine, theirs = programs
        record(model, clocks, mine, times)
        assert against(clocks, mine, theirs) <= 1.05


@pytest.mark.parametrize("model", MODELS)
def test_cg_is_as_fast_as_jax_scipy_and_faster_than_somax(model, record):
    p = Solving(model)
    programs = {
        "curvax.cg": p.curvax_cg,
        "jax.scipy.sparse.linalg.cg, on the same product": p.jax_cg,
        "somax CG, as its sgn_ce has it": p.somax_cg(stabilise_every=10),
        "somax CG, without its restarts": p.somax_cg(stabilise_every=0),
    }
    clocks, results = seconds(programs, p.params, p.gradient)
    del results["somax CG, as its sgn_ce has it"]
    assert_agree(results, 1e-3)
    record(model, clocks, "curvax.cg", ITERATIONS)
    mine, jaxs, somax, somax_bare = programs
    assert against(clocks, mine, jaxs) <= 1.05
    assert against(clocks, mine, somax) < 1
    assert against(clocks, mine, somax_bare) <= 1.05
