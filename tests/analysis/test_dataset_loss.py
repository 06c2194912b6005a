"""`DatasetLoss` equals the loss of the whole set, one pass for each product."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_problems import flat, loader_of, net, net_batch, net_loss, net_params, quick_jit

import curvax as cx
from curvax.analysis import DatasetLoss, curvature_trace, hessian_spectrum, top_eigenpairs
from curvax.linalg import Eigenpairs


class Counting:
    """A loader that counts its passes."""

    def __init__(self, batches: list[Any]):
        self.batches, self.passes = batches, 0

    def __iter__(self) -> Any:
        self.passes += 1
        return iter(self.batches)


def test_a_dataset_loss_over_unequal_batches_is_the_loss_of_the_whole_set():
    dataset_loss, objective = (
        DatasetLoss(net_loss, loader_of(3, 3, 2)),
        cx.Objective(net_loss, net_batch()),
    )
    assert float(dataset_loss(net_params())) == pytest.approx(
        float(objective(net_params())), rel=1e-14
    )
    value, grads = dataset_loss.value_and_grad(net_params())
    expected = objective.value_and_grad(net_params())
    np.testing.assert_allclose(flat((value, grads)), flat(expected), rtol=1e-13)


def test_dataset_loss_weights_its_batches():
    batch = net_batch() | {"w": jnp.arange(8.0)}
    loss = cx.gaussian("y", weights="w")
    pieces = [jax.tree.map(lambda x, i=i: x[i : i + 2], batch) for i in (0, 2, 4, 6)]
    found = DatasetLoss(loss, pieces, model=net)(net_params())
    expected = cx.Objective(loss, batch, model=net)(net_params())
    assert float(found) == pytest.approx(float(expected), rel=1e-14)


@pytest.mark.parametrize(
    ("measure", "products"),
    [
        (partial(top_eigenpairs, subspace=8), None),
        (partial(top_eigenpairs, method="power", max_products=9), 9 + 1),
        (partial(hessian_spectrum, probes=2, steps=3), 2 * 3),
        (partial(curvature_trace, probes=3), 3),
    ],
    ids=["eigenpairs", "power", "spectrum", "trace"],
)
def test_dataset_loss_takes_one_pass_for_each_product(measure, products):
    loader = Counting(loader_of(4, 4))
    found = measure(DatasetLoss(net_loss, loader), net_params())
    expected = quick_jit(lambda p: measure(cx.Objective(net_loss, net_batch()), p))(net_params())
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-8)
    if isinstance(found, Eigenpairs):
        products = products or int(found.products)
        assert int(found.products) == products
    assert loader.passes == products


def test_dataset_loss_wraps_its_loader_by_progress(capsys):
    wrapped = []

    def watch(loader: Any) -> Any:
        wrapped.append(len(loader))
        return loader

    DatasetLoss(net_loss, loader_of(4, 4), progress=watch)(net_params())
    assert wrapped == [2]
    DatasetLoss(net_loss, loader_of(4, 4), progress=True)(net_params())
    assert capsys.readouterr().out == ""


def test_dataset_loss_folds_its_key_by_batch_at_every_pass():
    noisy = lambda params, batch, key: net_loss(params, batch) * (1 + jax.random.uniform(key))
    dataset_loss = DatasetLoss(noisy, loader_of(4, 4), key=jax.random.key(3))
    keys = [jax.random.fold_in(jax.random.key(3), i) for i in range(2)]
    expected = np.mean([noisy(net_params(), b, k) for b, k in zip(dataset_loss.loader, keys)])
    assert float(dataset_loss(net_params())) == pytest.approx(float(expected), rel=1e-12)
    assert float(dataset_loss(net_params())) == float(dataset_loss(net_params()))


def test_dataset_loss_refuses_iterators_empty_loaders_raw_keys_and_jit():
    with pytest.raises(ValueError, match="list_iterator"):
        DatasetLoss(net_loss, iter(loader_of(4, 4)))
    with pytest.raises(ValueError, match="gave none"):
        DatasetLoss(net_loss, [])(net_params())
    with pytest.raises(TypeError, match="typed key"):
        DatasetLoss(net_loss, loader_of(4, 4), key=jnp.zeros(2, jnp.uint32))
    with pytest.raises(TypeError, match="on the host"):
        jax.jit(DatasetLoss(net_loss, loader_of(4, 4)))(net_params())
