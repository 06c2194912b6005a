"""docs/coming_from.md, row by row: the other library's step or matrix, and ours as the row has it.

Names, options and factors are read off the page. The other side is the library where the tests have
it (Optax), a recorded run where there is one, and otherwise its convention written out, which
test_other_libraries.py compares with the library itself.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import kfac_jax_factors
import numpy as np
import optax
import pytest
from other_conventions import (
    BATCH,
    CLASSES,
    PARAMS,
    STATES,
    TOKENS,
    W0,
    WEIGHTS,
    N,
    T,
    by_adahessian,
    by_adaptive_sam,
    by_debiased_sophia,
    by_look_sam,
    coupled,
    cross_entropies,
    each_gradient,
    hessian_of,
    linear,
    mean_square,
    quartic,
    square,
)
from pages import DOCS, Row, rows, sections
from recorded_curvature import read
from recorded_sam import google_loss, momentum_sgd, scheduled_rho
from small_problems import flat, quick_jit
from trajectories import FOLDER, Run, assert_same, follow, replay, stepper
from trajectories import row as at

import curvax as cx
from curvax import analysis

PAGE = DOCS / "coming_from.md"
READ = re.compile("from its (documentation|code)")
NAMES = {**vars(analysis), **{name: getattr(cx, name) for name in cx.__all__}, "analysis": analysis}
CLAIMS: dict[tuple[str, str], Callable[[Row], None]] = {}

Check = Callable[[Row], None]


def claim(section: str, beginning: str) -> Callable[[Check], Check]:
    """Registers the check of the rows of a section that begin so; cells are joined by ` | `."""

    def register(check: Check) -> Check:
        CLAIMS[section, beginning] = check
        return check

    return register


def checks_of(row: Row) -> list[Check]:
    text = " | ".join(row.cells)
    return [
        f
        for (section, start), f in CLAIMS.items()
        if (section, text.startswith(start)) == (row.section, True)
    ]


def label(row: Row) -> str:
    return f"{row.section}: {' | '.join(row.cells[:2])}"


ROWS = [row for row in rows(PAGE) if not READ.search(" ".join(row.cells))]


@pytest.mark.parametrize("row", ROWS, ids=label)
def test_row(row):
    (check,) = checks_of(row)
    check(row)


def test_every_row_is_checked_or_says_where_it_was_read():
    assert [label(row) for row in ROWS if len(checks_of(row)) != 1] == []
    used = {check for row in ROWS for check in checks_of(row)}
    assert [key for key, check in CLAIMS.items() if check not in used] == []


# What a row says.


def ours(cell: str, **given: Any) -> Any:
    """The first code of a cell, evaluated with the names of curvax and with what is given."""
    found = re.search(r"`([^`]+)`", cell)
    assert found is not None, cell
    return eval(found[1], {**NAMES, **given})


def factor(cell: str, **sizes: int) -> float:
    """The factor that a cell begins with, such as 2N or 1/C, for these sizes."""
    found = re.match(r"[\d.]*[A-Z]?(/[A-Z])?", cell.replace("¼", "0.25"))
    assert found is not None
    assert found[0], cell
    return eval(re.sub(r"(\d)([A-Z])", r"\1*\2", found[0]), {}, sizes)


def agreement(row: Row) -> float:
    """The difference that the last cell states."""
    return float(row.cells[-1].split()[-1])


# Steps and matrices.


def path_of(
    tx: Any, loss: Any, steps: int, params: Any = PARAMS, extra: Any = None
) -> list[np.ndarray]:
    """The parameters after each step, flat; `extra` is given to `update` instead of the loss."""

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params)
        given = {"value_fn": loss, "value": value} if extra is None else extra
        updates, state = tx.update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state

    found, state = [], tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
        found.append(flat(params))
    return found


def assert_near(found: Any, expected: Any, tolerance: float) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1.5 * tolerance or 1e-14)


def objective_of(likelihood: Any, batch: Any = BATCH, model: Any = linear) -> cx.Objective:
    return cx.Objective(likelihood, batch, model=model)


def matrix_of(product: Any, objective: Any, params: Any = WEIGHTS) -> np.ndarray:
    return np.asarray(quick_jit(lambda p: cx.materialize(product(objective, p), p))(params))


def ratio(theirs: Any, mine: Any) -> float:
    """The factor between two matrices, which are equal but for it."""
    found = np.vdot(mine, theirs) / np.vdot(mine, mine)
    np.testing.assert_allclose(theirs, found * mine, rtol=0, atol=1e-12 * np.abs(theirs).max())
    return float(found)


def assert_factor(theirs: Any, mine: Any, cell: str, **sizes: int) -> None:
    assert ratio(theirs, mine) == pytest.approx(factor(cell, **sizes), rel=1e-12)


# optax.contrib


@claim("optax.contrib", "`contrib.sam(")
def sam_of_optax(row):
    rho, base = 0.2, optax.sgd(0.1, momentum=0.9)
    given = {
        "base": base,
        "rho": rho,
        "adv": optax.chain(optax.contrib.normalize(), optax.sgd(rho)),
    }
    found = path_of(ours(row.cells[1], **given), coupled, 4)
    theirs = ours(row.cells[0], contrib=optax.contrib, **given)
    assert_near(found, path_of(theirs, coupled, 8, extra={})[1::2], agreement(row))
    opaque = optax.contrib.sam(base, given["adv"], opaque_mode=True)
    takes = re.search(r"`opaque_mode=True` is one call and takes `(\w+)`", row.cells[2])
    assert takes is not None
    grad_fn = lambda params, _: jax.grad(coupled)(params)
    assert_near(found, path_of(opaque, coupled, 4, extra={takes[1]: grad_fn}), agreement(row))
    with pytest.raises(ValueError, match="would be lost"):
        optax.clip_by_global_norm(1.0) | cx.sam(base, rho)


@claim("optax.contrib", "`contrib.sophia`")
def sophia_of_optax(row):
    """Refreshes at the first and the eleventh of twelve steps."""
    found = path_of(ours(row.cells[1])(0.1), quartic, 12)
    theirs = ours(row.cells[0], contrib=optax.contrib)(0.1)
    assert_near(found, path_of(theirs, quartic, 12, extra={"obj_fn": quartic}), agreement(row))


@claim("optax.contrib", "`second_order.fisher_diag`")
def fisher_diag_of_optax(row):
    objective, w = objective_of(cx.gaussian("y")), WEIGHTS
    grads = jax.grad(objective)(w)
    signal, _ = ours(row.cells[1]).update(cx.Signal(grads), optax.EmptyState(), w)
    np.testing.assert_allclose(signal.diagonal, grads**2, rtol=1e-15)
    no_such = ours(row.cells[2][row.cells[2].index("no `") :])
    other, _ = no_such.update(cx.Signal(grads), no_such.init(w), w, value_fn=objective)
    assert np.abs(other.diagonal / signal.diagonal - 1).min() > 0.1


@claim("optax.contrib", "`obj_fn=`")
def names_of_the_loss(row):
    names = [re.findall(r"`(\w+)=?`", cell)[0] for cell in (row.cells[0], row.cells[1])]
    first, second = (
        path_of(cx.sam(optax.sgd(0.1), 0.2), coupled, 1, extra={name: coupled}) for name in names
    )
    assert_near(first, second, 0.0)


# kfac-jax


@claim("kfac-jax", "`ImplicitExactCurvature`")
def products_of_kfac(row):
    """Both products of ours are the same matrix for these likelihoods."""
    one, other = (NAMES[name] for name in re.findall(r"`(\w+)`", row.cells[1]))
    for objective in (
        objective_of(cx.gaussian("y")),
        objective_of(cx.categorical("label"), TOKENS),
    ):
        assert ratio(matrix_of(one, objective), matrix_of(other, objective)) == pytest.approx(1)


@claim("kfac-jax", "`BlockDiagonalCurvature` in mode `fisher_exact`")
@claim("kfac-jax", "the same in mode `fisher_empirical`")
def factors_of_kfac(row):
    """Beside those that kfac-jax computed."""
    params, batch = kfac_jax_factors.problem()
    objective = cx.Objective(cx.categorical("label"), batch, model=kfac_jax_factors.predict)
    mine = ours(row.cells[1], objective=objective, params=params)
    theirs = json.loads(Path(kfac_jax_factors.__file__).with_suffix(".json").read_text())
    fisher = "empirical" if "empirical" in row.cells[0] else "exact"
    stated = factor(row.cells[2], N=len(batch["label"]))
    for layer in params:
        expected = stated * np.kron(*theirs[f"{fisher} {layer}"])
        found = np.kron(*mine.factors_of(f"{layer}/w"))
        np.testing.assert_allclose(found, expected, rtol=agreement(row), atol=1e-15)


@claim("kfac-jax", "`register_squared_error_loss`")
def squared_error_of_kfac(row):
    theirs = hessian_of(lambda outputs, batch: jnp.sum(square(outputs, batch)) / N)
    mine = matrix_of(cx.ggnvp, objective_of(ours(row.cells[1])("y")))
    assert_factor(theirs, mine, row.cells[2])


@claim("kfac-jax", "`register_softmax_cross_entropy_loss`")
def cross_entropy_of_kfac(row):
    theirs = hessian_of(lambda outputs, batch: jnp.sum(cross_entropies(outputs, batch)) / N, TOKENS)
    mine = matrix_of(cx.ggnvp, objective_of(ours(row.cells[1])("label"), TOKENS))
    assert_factor(theirs, mine, row.cells[2], T=T)
    assert f"({float(T)} at T = {T})" in row.cells[2]


# somax


@claim("somax", "`sgn_ce`")
def matrices_of_somax(row):
    stated = factor(row.cells[2].removeprefix("factor "))
    theirs = hessian_of(lambda outputs, batch: jnp.mean(cross_entropies(outputs, batch)))
    assert ratio(
        theirs, matrix_of(cx.ggnvp, objective_of(cx.categorical("label")))
    ) == pytest.approx(stated)
    one = lambda w, batch: linear(w, batch)[:, :1]
    batch = {"x": BATCH["x"], "y": BATCH["y"][:, :1]}
    half = lambda w: jnp.mean(square(one(w, batch), batch)) / 2
    theirs = np.asarray(jax.hessian(half)(WEIGHTS)).reshape(WEIGHTS.size, WEIGHTS.size)
    mine = matrix_of(cx.ggnvp, objective_of(cx.gaussian("y"), batch, one))
    assert ratio(theirs, mine) == pytest.approx(stated)


@claim("somax", "`adahessian`")
def adahessian_of_somax(row):
    tx = ours(row.cells[1], adahessian=partial(cx.adahessian, 0.1))
    assert_near(path_of(tx, quartic, 5), by_adahessian(5, 0.1, eps=1e-8), agreement(row))


@claim("somax", "`sophia_h`")
def sophia_of_somax(row):
    names: dict[str, Any] = {}
    exec(sections(PAGE)["somax"], names)
    assert row.cells[1] == "the pipe below"
    found = path_of(names["somax_sophia_h"], quartic, 12)
    assert_near(found, by_debiased_sophia(12, 1e-3), agreement(row))


# PyTorch

TORCH = "davda54/sam and other PyTorch optimisers"


def recorded(name: str) -> Path:
    path = FOLDER / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"no {path}: set `CURVAX_FIXTURES` to the folder of recorded runs")
    return path


def follows(row: Row, cell: str, run: Run, **given: Any) -> None:
    assert "replayed" in row.cells[-1]
    base = momentum_sgd(run.hyper, run.hyper.get("lr"))
    known = {"base": base, "rho": run.hyper.get("rho"), "alpha": run.hyper.get("alpha"), **given}
    params, _ = follow(run, lambda _: ours(cell, **known))
    assert_same(params, run.params, run.tolerances[0])


@claim(TORCH, "davda54/sam `SAM(")
def sam_of_davda54(row):
    run = Run(recorded("sam_mlp_1"))
    assert ours(row.cells[0].replace("SAM(..., ", "dict(")) == {"rho": run.hyper["rho"]}
    follows(row, row.cells[1], run)


@claim(TORCH, "davda54/sam `adaptive=True`")
def adaptive_sam_of_davda54(row):
    follows(row, row.cells[1], Run(recorded("sam_mlp_2")))


@claim(TORCH, "SamsungLabs/ASAM")
def asam_of_samsung(row):
    follows(row, row.cells[1], Run(recorded("asam_mlp_1")))


@claim(TORCH, "juntang-zhuang/GSAM")
def gsam_of_its_author(row):
    run = Run(recorded("gsam_torch_mlp_1"))
    follows(row, row.cells[1], run, rho=run.hyper["rho_max"])


@claim(TORCH, "amirgholami/adahessian")
def adahessian_of_its_authors(row):
    """On a problem with a diagonal Hessian, where the recorded probes do not matter."""
    run = Run(recorded("adahessian_img_quad_1"))
    follows(row, row.cells[1], run)
    assert "block=" in row.cells[2]


@claim(TORCH, "pytorch_optimizer 4.1 `AdaHessian`")
def adahessian_of_pytorch_optimizer(row):
    tx = ours(row.cells[1], adahessian=partial(cx.adahessian, 0.1))
    assert_near(path_of(tx, quartic, 5), by_adahessian(5, 0.1, eps=1e-16), agreement(row))


@claim(TORCH, "pytorch_optimizer `SAM(adaptive=True)`")
def adaptive_sam_of_pytorch_optimizer(row):
    tx = ours(row.cells[1], base=optax.sgd(0.05), rho=0.3)
    assert_near(path_of(tx, coupled, 4), by_adaptive_sam(4, 0.05, 0.3), agreement(row))


@claim(TORCH, "pytorch_optimizer `LookSAM`")
def look_sam_of_pytorch_optimizer(row):
    unravel = jax.flatten_util.ravel_pytree(PARAMS)[1]
    tx = ours(row.cells[1])(optax.sgd(0.05), 0.3, every=3, alpha=0.6)
    found = path_of(tx, lambda w: coupled(unravel(w)), 5, W0)
    assert_near(found, by_look_sam(5, 0.05, 0.3, 3, 0.6), agreement(row))


@claim(TORCH, "torch-optimizer 0.3.0 `Adahessian`")
def adahessian_of_torch_optimizer(row):
    power = ours(row.cells[2].replace("hessian_power=", ""))
    tx = ours(row.cells[1], adahessian=partial(cx.adahessian, 0.1))
    assert_near(
        path_of(tx, quartic, 5), by_adahessian(5, 0.1, eps=1e-4, power=power), agreement(row)
    )


# big_vision and other JAX trainers

TRAINERS = "big_vision and other JAX trainers"


def big_vision(row: Row, adaptive: bool, make: Callable[[Any], Any]) -> None:
    """The first recorded setting of its kind, on one replica of the axis `batch`."""
    settings = Run(recorded("gsam_bv_mlp_o")).hyper["settings"]
    (i, hyper), *_ = [
        (i, x) for i, x in enumerate(settings)
        if x["adaptive_perturbation"] == adaptive and x["minimize_fp"] and x["alpha"]
    ]  # fmt: skip
    run = Run(recorded("gsam_bv_mlp_o"), f"s{i}/")
    given = {"lr": run["lr"], "rho": scheduled_rho(hyper, run["lr"], hyper["lr_max"])}

    def method(given: Any) -> Any:
        base = optax.sgd(given["lr"], hyper["momentum"])
        return make({"base": base, "rho": given["rho"], "alpha": hyper["alpha"]})

    on_one = lambda tree: jax.tree.map(lambda x: np.asarray(x)[:, None], tree)
    step = jax.jit(jax.vmap(stepper(run.loss, method), axis_name="batch"))
    params, inputs = on_one(run.params), (on_one(run.batches()), on_one(given))
    state = jax.vmap(lambda p, g: method(g).init(p))(at(params, 0), at(inputs[1], 0))
    found, _ = replay(step, state, params, *inputs)
    assert_same(found, params, run.tolerances[0])


@claim(TRAINERS, "google-research/big_vision `gsam_gradient`")
def gsam_of_big_vision(row):
    big_vision(row, False, lambda given: ours(row.cells[2], **given))


@claim(TRAINERS, "big_vision, adaptive")
def adaptive_ascent_of_big_vision(row):
    options = ours(row.cells[2].replace("`ascent=", "`dict(ascent=").replace(")`", "))`"))
    method = lambda given: cx.gsam(given["base"], given["rho"], given["alpha"], **options)
    big_vision(row, True, method)


@claim(TRAINERS, "google-research/sam")
def sam_of_google_research(row):
    run = Run(recorded("googlesam_mlp_4_clip"))
    hyper, replicas = run.hyper, run.hyper["replicas"]
    base = optax.sgd(hyper["lr"], hyper["beta"], nesterov=hyper["nesterov"])
    clip = optax.clip_by_global_norm(hyper["gradient_clipping"])
    sam = partial(cx.sam, rho=hyper["rho"])
    method = ours(row.cells[2], sam=sam, optax=optax, clip=clip, base=base)
    on_each = lambda tree: jax.tree.map(lambda x: np.repeat(x[:, None], replicas, 1), tree)
    split = lambda x: x.reshape(len(x), replicas, -1, *x.shape[2:])
    params, batches = on_each(run.params), jax.tree.map(split, run.batches())
    step = jax.jit(jax.vmap(stepper(google_loss(run), lambda _: method), axis_name="batch"))
    found, _ = replay(step, jax.vmap(method.init)(at(params, 0)), params, batches, None)
    assert_same(found, params, run.tolerances[0])


@claim(TRAINERS, "Flax's ImageNet example")
def trainers_that_average(row):
    """Two devices: the trainer's mean is an error, and without it the step is that by hand."""
    tx = cx.sam(optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0)), 0.3, mean_over="batch")
    parts = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), BATCH)

    def step(averages: bool, batch: Any) -> Any:
        objective = objective_of(cx.categorical("label"), batch)
        grads = objective.value_and_grad(WEIGHTS)[1]
        grads = jax.lax.pmean(grads, "batch") if averages else grads
        return tx.update(grads, tx.init(WEIGHTS), WEIGHTS, value_fn=objective)[0]

    with pytest.raises(ValueError, match="mean over devices"):
        jax.vmap(partial(step, True), axis_name="batch")(parts)
    found = jax.vmap(partial(step, False), axis_name="batch")(parts)
    loss = lambda w, part: jnp.mean(cross_entropies(linear(w, part), part))
    ascent = lambda g: 0.3 * g / jnp.linalg.norm(g)
    sam = lambda part: jax.grad(loss)(WEIGHTS + ascent(jax.grad(loss)(WEIGHTS, part)), part)
    mean = jax.vmap(sam)(parts).mean(0)
    assert jnp.linalg.norm(mean) > 0.1
    assert_near(found[0], -0.1 * mean / jnp.linalg.norm(mean), agreement(row))


# PyHessian


def recorded_curvature() -> Any:
    return read(recorded("curvature_mlp_o"))


@claim("PyHessian", "`hessian(model, criterion, data).eigenvalues(top_n=k)`")
def eigenvalues_of_pyhessian(row):
    run, k = recorded_curvature(), 2
    search = partial(analysis.top_eigenpairs, tol=1e-6, max_products=20_000)
    given = {"objective": run.objective(), "params": run.params, "k": k, "top_eigenpairs": search}
    found = quick_jit(lambda: ours(row.cells[1], **given).values)()
    stated = re.search(r"eigenvalues come out (\S+) low", row.cells[2])
    assert stated is not None
    bias = run.arrays["pyhessian/top5_tight"][:k] / np.asarray(found) - 1
    np.testing.assert_allclose(bias, -float(stated[1]), rtol=0.05)


@claim("PyHessian", "`.trace()`")
def trace_of_pyhessian(row):
    run = recorded_curvature()
    probes = jax.vmap(run.problem.unflatten)(run.arrays["pyhessian/trace_z_200"].astype(float))
    found = ours(row.cells[1])(run.objective(), run.params, probes=probes)
    assert float(found.mean) == pytest.approx(
        run.arrays["pyhessian/trace_vHv_200"].mean(), rel=1e-10
    )
    assert found.standard_error > 0


@claim("PyHessian", "`.density()`")
def density_of_pyhessian(row):
    run = recorded_curvature()
    probes = jax.vmap(run.problem.unflatten)(run.arrays["pyhessian/density_z"].astype(float))
    spectrum = partial(ours(row.cells[1]), run.objective(), probes=probes, steps=20)
    found = quick_jit(spectrum)(run.params).density
    np.testing.assert_allclose(
        found.nodes, np.sort(run.arrays["pyhessian/density_nodes"], axis=1), rtol=0, atol=1e-5
    )


@claim("PyHessian", "`dataloader=`")
def loader_of_pyhessian(row):
    loader = [jax.tree.map(lambda x, i=i: x[i], BATCH) for i in (slice(4), slice(4, None))]
    loss = lambda w, batch: jnp.mean(square(linear(w, batch), batch))
    found = ours(row.cells[1], loss=loss, loader=loader)
    assert float(found(WEIGHTS)) == pytest.approx(float(loss(WEIGHTS, BATCH)), rel=1e-14)


# Factors

FACTORS = "Curvature matrices: factors"


def likelihood_in(cell: str) -> Any:
    """The objective of the likelihood that a cell names."""
    name = re.search(r"`(gaussian|categorical)`", cell)
    assert name is not None
    return objective_of(cx.gaussian("y") if name[1] == "gaussian" else cx.categorical("label"))


@claim(FACTORS, "curvlinops 3.0.1 | MSE(mean) over C outputs, GGN")
def squares_of_curvlinops(row):
    mine = matrix_of(cx.ggnvp, likelihood_in(row.cells[2]))
    assert_factor(hessian_of(mean_square), mine, row.cells[2], C=CLASSES)


@claim(FACTORS, "curvlinops 3.0.1 | MSE(mean), empirical Fisher")
def empirical_fisher_of_curvlinops(row):
    """The factor 1/NC of the mean stands outside of the product."""
    g = each_gradient(lambda output, example: jnp.sum(square(output, example)))
    mine = matrix_of(cx.empirical_fvp, likelihood_in(row.cells[2]))
    assert_factor(g.T @ g / (N * CLASSES), mine, row.cells[2], C=CLASSES)


@claim(FACTORS, "curvlinops 3.0.1 | cross-entropy")
def cross_entropy_of_curvlinops(row):
    run = recorded_curvature()
    mine = run.matrix(lambda: cx.ggnvp(run.objective(), run.params))
    assert ratio(run.expected("ggn"), mine) == pytest.approx(factor(row.cells[2]), rel=1e-9)


@claim(FACTORS, "BackPACK 1.7.1 | `SumGradSquared`")
def squares_of_gradients_in_backpack(row):
    """Every term of the mean has the factor 1/N, and is squared with it."""
    g = each_gradient(mean_square)
    theirs = np.sum((g / N) ** 2, axis=0)
    loss = lambda w, batch: mean_square(linear(w, batch), batch)
    stage, objective = ours(row.cells[2]), cx.Objective(loss, BATCH)
    signal, _ = stage.update(cx.Signal(WEIGHTS), stage.init(WEIGHTS), WEIGHTS, value_fn=objective)
    assert_factor(theirs, np.ravel(signal.diagonal), row.cells[2], N=N)


@claim(FACTORS, "BackPACK 1.7.1 | `DiagGGN`")
def diagonal_in_backpack(row):
    theirs = hessian_of(lambda outputs, batch: jnp.mean(cross_entropies(outputs, batch)))
    mine = matrix_of(cx.ggnvp, objective_of(cx.categorical("label")))
    assert_factor(np.diag(theirs), np.diag(mine), row.cells[2])


@claim(FACTORS, "laplax 0.0.2")
def sums_of_laplax(row):
    squares, entropies = row.cells[2].split(", ")
    theirs = hessian_of(lambda outputs, batch: jnp.sum(square(outputs, batch)))
    assert_factor(theirs, matrix_of(cx.ggnvp, likelihood_in(squares)), squares, N=N)
    theirs = hessian_of(lambda outputs, batch: jnp.sum(cross_entropies(outputs, batch)))
    assert_factor(theirs, matrix_of(cx.ggnvp, likelihood_in(entropies)), entropies, N=N)


@claim(FACTORS, "netket 3.23")
def geometric_tensor_of_netket(row):
    """The covariance of ∂ log ψ under p = |ψ|², for a real ψ over eight states."""
    log_psi = lambda w, x: jnp.tanh(x @ w) @ jnp.ones(CLASSES)
    p = np.asarray(jax.nn.softmax(2 * log_psi(WEIGHTS, STATES)))
    o = np.asarray(jax.jacobian(log_psi)(WEIGHTS, STATES)).reshape(len(STATES), -1)
    o = o - p @ o
    model = lambda w, batch: 2 * log_psi(w, batch["x"])
    batch = {"x": STATES[None], "label": jnp.zeros(1, int)}
    mine = matrix_of(cx.fvp, objective_of(cx.categorical("label"), batch, model))
    assert_factor((p[:, None] * o).T @ o, mine, row.cells[2])


@claim(FACTORS, "neural-tangents 0.6.5")
def kernel_of_neural_tangents(row):
    jacobian = np.asarray(jax.jacobian(linear)(WEIGHTS, BATCH)).reshape(N, CLASSES, -1)
    theirs = np.einsum("icp,jcp->ij", jacobian, jacobian) / CLASSES
    call = ours(row.cells[2], ntk=partial(analysis.ntk, likelihood_in("`gaussian`"), WEIGHTS))
    assert_factor(theirs, np.asarray(call), row.cells[2], C=CLASSES)
