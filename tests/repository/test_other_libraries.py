"""What other_conventions.py writes out, beside the libraries, where they are installed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from other_conventions import (
    BATCH,
    CLASSES,
    PARAMS,
    SLOPES,
    WEIGHTS,
    by_adahessian,
    by_adaptive_sam,
    by_debiased_sophia,
    cross_entropies,
    quartic,
    square,
)
from small_problems import flat

import curvax as cx


def assert_near(found: Any, expected: Any, tolerance: float) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1.5 * tolerance)


def by_somax(method: str, steps: int, **options: Any) -> list[np.ndarray]:
    somax = pytest.importorskip("somax", reason="pip install python-somax")
    rule = getattr(somax, method)(loss_fn=lambda params, batch: quartic(params), **options)
    params, state, found = PARAMS, rule.init(PARAMS), []
    step = jax.jit(rule.step)
    for _ in range(steps):
        params, state, _ = step(params, {}, state, jax.random.key(0))
        found.append(flat(params))
    return found


def test_adahessian_is_written_out_as_somax_has_it():
    theirs = by_somax("adahessian", 5, learning_rate=0.1, spatial_averaging=False)
    assert_near(by_adahessian(5, 0.1, eps=1e-8), theirs, 3.5e-6)


def test_sophia_is_written_out_as_somax_has_it():
    theirs = by_somax("sophia_h", 12, learning_rate=1e-3, weight_decay=0.0)
    assert_near(by_debiased_sophia(12, 1e-3), theirs, 1.6e-8)


def means_of_cross_entropies(outputs: Any, batch: Any) -> jax.Array:
    return jnp.mean(cross_entropies(outputs, batch))


def half_means_of_squares(outputs: Any, batch: Any) -> jax.Array:
    return jnp.mean(square(outputs, batch)) / 2


@pytest.mark.parametrize(
    ("module", "name", "loss", "outputs"),
    [
        ("ggn_ce", "GGNCE", means_of_cross_entropies, CLASSES),
        ("ggn_mse", "GGNMSE", half_means_of_squares, 1),
    ],
)
def test_matrices_of_somax_are_hessians_of_means(module, name, loss, outputs):
    found = pytest.importorskip(f"somax.curvature.{module}", reason="pip install python-somax")
    batch = {"x": BATCH["x"], "label": BATCH["label"], "y": BATCH["y"][:, :outputs]}
    predict = lambda w, x: (x @ w)[:, :outputs]
    operator = getattr(found, name)(predict_fn=predict, y_key="y" if outputs == 1 else "label")
    state, _ = operator.init(WEIGHTS, batch)
    theirs = cx.materialize(lambda v: operator.matvec(WEIGHTS, state, v), WEIGHTS)
    expected = jax.hessian(lambda w: loss(predict(w, batch["x"]), batch))(WEIGHTS)
    np.testing.assert_allclose(theirs, expected.reshape(theirs.shape), rtol=0, atol=1e-15)


def by_torch(optimizer: Callable[..., Any], loss: str, steps: int) -> list[np.ndarray]:
    """The parameters, as one tensor of PyTorch or as two, after each step of an optimiser."""
    torch = pytest.importorskip("torch")
    tensor = lambda x: torch.tensor(np.asarray(x), dtype=torch.float64)
    p = [tensor(x).requires_grad_() for x in (PARAMS["bias"], PARAMS["kernel"])]
    c = [tensor(x) for x in (SLOPES["bias"], SLOPES["kernel"])]
    rule = optimizer(p)

    def closure() -> Any:
        rule.zero_grad()
        value = sum((c * w**2 / 2 + w**4 / 4).sum() for c, w in zip(c, p))
        if loss == "coupled":
            value = value + torch.tanh(p[1].T @ p[0]).sum()
        value.backward(create_graph=loss == "quartic")
        return value

    found = []
    for _ in range(steps):
        closure()
        rule.step(closure if loss == "coupled" else None)
        found.append(np.concatenate([x.detach().numpy().ravel() for x in p]))
    return found


@pytest.mark.filterwarnings("ignore:Using backward")
def test_pytorch_optimizer_is_as_written_out():
    theirs = pytest.importorskip("pytorch_optimizer", reason="pip install pytorch_optimizer")
    from torch.optim import SGD

    adahessian = lambda p: theirs.AdaHessian(p, lr=0.1)
    assert_near(by_torch(adahessian, "quartic", 5), by_adahessian(5, 0.1, eps=1e-16), 6e-15)
    sam = lambda p: theirs.SAM(p, SGD, lr=0.05, rho=0.3, adaptive=True)
    assert_near(by_torch(sam, "coupled", 4), by_adaptive_sam(4, 0.05, 0.3), 3e-9)


@pytest.mark.filterwarnings("ignore")
def test_torch_optimizer_is_as_written_out():
    theirs = pytest.importorskip("torch_optimizer", reason="pip install torch_optimizer")
    adahessian = lambda p: theirs.Adahessian(p, lr=0.1)
    expected = by_adahessian(5, 0.1, eps=1e-4, power=0.5)
    assert_near(by_torch(adahessian, "quartic", 5), expected, 5e-15)
