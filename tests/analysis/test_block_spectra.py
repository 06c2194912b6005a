"""Eigenvalues of diagonal blocks against recorded and dense ones, by pattern and by layout."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device_problem import DEVICES, mesh
from families import net_objective
from flax import linen as nn
from framework_problems import nnx_problem
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P
from recorded_curvature import read
from small_problems import (
    dense_hessian,
    flat,
    loader_of,
    matrix_of,
    net,
    net_batch,
    net_loss,
    net_params,
    quick_jit,
)
from trajectories import recorded

import curvax as cx
from curvax.analysis import DatasetLoss, block_eigenvalues, block_masks


def rows_of(params: Any, mask: Any) -> np.ndarray:
    """Which entries of the flat parameters a mask takes."""
    spread = jax.tree.map(lambda m, x: np.broadcast_to(m, x.shape), mask, params)
    return np.flatnonzero(flat(spread))


def ends_of_blocks(matrix: np.ndarray, params: Any, blocks: Any) -> dict[str, np.ndarray]:
    """[λ_min, λ_max] of each diagonal block."""
    ends = {}
    for name, mask in block_masks(params, blocks).items():
        rows = rows_of(params, mask)
        ends[name] = np.linalg.eigvalsh(matrix[np.ix_(rows, rows)])[[0, -1]]
    return ends


def values(found: Any) -> dict[str, float]:
    return {name: float(block.value) for name, block in found.items()}


def assert_blocks(found: Any, expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    scale = max(map(abs, expected.values()))
    for name, (value, residual, _) in found.items():
        assert float(value) == pytest.approx(float(expected[name]), rel=0, abs=1e-8 * scale), name
        assert residual <= 1e-5 * scale


def searched(objective: Any, params: Any, blocks: Any = "*", **options: Any) -> Any:
    """`block_eigenvalues`, compiled in half the time."""
    return quick_jit(lambda p: block_eigenvalues(objective, p, blocks, **options))(params)


def recorded_blocks(run: Any, family: str) -> tuple[dict[str, str], dict[str, Any]]:
    """({block: pattern}, {block: its ends}), of single tensors and of whole layers."""
    tensors, layers = (
        {name.split("/")[-1]: run.arrays[name] for name in run.arrays if name.startswith(start)}
        for start in (f"block_tensor/{family}/", f"block_layer/{family}/")
    )
    patterns = {name: name for name in tensors} | {name: f"{name}.*" for name in layers}
    return patterns, tensors | layers


@pytest.mark.parametrize("place", [0, 1], ids=["largest", "smallest"])
@pytest.mark.parametrize("path", recorded("curvature_*"))
def test_eigenvalues_of_tensors_and_layers_are_the_recorded_ones(path, place):
    run, end = read(path), ["largest", "smallest"][place]
    blocks, ends = recorded_blocks(run, "hessian_max_min")
    found = searched(run.objective(), run.params, blocks, end=end, chunk=8)
    assert_blocks(found, {name: both[place] for name, both in ends.items()})


@pytest.mark.parametrize("path", recorded("curvature_*"))
def test_gauss_newton_blocks_are_the_recorded_ones(path):
    run = read(path)
    blocks, expected = recorded_blocks(run, "ggn_max")
    found = searched(run.objective(), run.params, blocks, curvature="gauss_newton", chunk=8)
    assert_blocks(found, expected)
    assert all(block.converged for block in found.values())


def hessian() -> np.ndarray:
    return dense_hessian(lambda p: net_loss(p, net_batch()), net_params())


@pytest.mark.parametrize("chunk", [2, 8])
def test_block_eigenvalues_are_the_same_for_any_chunk(chunk):
    """Overlapping blocks too, and blocks smaller than the subspace."""
    patterns = ["*", "*/kernel", "hidden/bias", "h*n"]
    found = searched(cx.Objective(net_loss, net_batch()), net_params(), patterns, chunk=chunk)
    ends = ends_of_blocks(hessian(), net_params(), patterns)
    assert sorted(found) == ["hidden", "hidden/bias", "hidden/kernel", "out", "out/kernel"]
    assert_blocks(found, {name: e[1] for name, e in ends.items()})


@pytest.mark.parametrize("end", ["largest", "smallest", "magnitude"])
def test_block_eigenvalues_ignore_the_rest_of_the_matrix(end):
    """Blocks of one sign only, of one entry, of nothing but zeros."""
    loss = lambda p: 0.5 * (3 * p["up"] ** 2).sum() - 2 * (p["down"] ** 2).sum() + p["flat"].sum()
    params = {"up": jnp.ones(3), "down": jnp.ones(1), "flat": jnp.ones((2, 2))}
    found = values(searched(loss, params, end=end))
    assert found == pytest.approx({"down": -4.0, "flat": 0.0, "up": 3.0}, abs=1e-12)


def test_named_block_joins_the_matches_of_several_patterns():
    blocks = {"all but one": ["hidden/kernel", "*/kernel"], "one": "hidden/bias"}
    found = searched(cx.Objective(net_loss, net_batch()), net_params(), blocks)
    ends = ends_of_blocks(hessian(), net_params(), blocks)
    assert_blocks(found, {name: e[1] for name, e in ends.items()})
    assert [len(rows_of(net_params(), m)) for m in block_masks(net_params(), blocks).values()] == [
        18,
        3,
    ]


# A depth that is scanned, and one that is not.


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        dense = partial(nn.Dense, param_dtype=jnp.float64)
        return x + dense(3, name="down")(nn.gelu(dense(2, name="up")(x))), None


class Deep(nn.Module):
    scan: bool
    depth: int = 2

    @nn.compact
    def __call__(self, x):
        if self.scan:
            layers = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth
            )
            x, _ = layers(name="block")(x, None)
        else:
            for n in range(self.depth):
                x, _ = Block(name=f"block_{n}")(x, None)
        return nn.Dense(2, name="head", param_dtype=jnp.float64)(x)


def deep(scan: bool) -> tuple[cx.Objective, Any, Any]:
    """(objective, parameters, layout); the same function and numbers either way."""
    batch = net_batch() | {"x": net_batch()["x"][:, :3]}
    variables = Deep(True).init(jax.random.key(2), batch["x"])
    if not scan:
        stacked = variables["params"]
        slices = {
            f"block_{n}": jax.tree.map(lambda x, n=n: x[n], stacked["block"]) for n in range(2)
        }
        variables = {"params": slices | {"head": stacked["head"]}}
    model = Deep(scan)

    def loss(params, batch):
        with jax.numpy_rank_promotion("allow"):
            return jnp.mean((model.apply({"params": params}, batch["x"]) - batch["y"]) ** 2)

    return cx.Objective(loss, batch), variables["params"], cx.layout(model, variables, batch["x"])


def test_scanned_model_has_the_blocks_of_the_unrolled_one():
    scanned, unrolled = (searched(*deep(scan), tol=1e-9) for scan in (True, False))
    assert sorted(scanned) == ["block_0", "block_1", "head"]
    assert values(scanned) == pytest.approx(values(unrolled), rel=1e-9)
    objective, params, layout = deep(scan=False)
    ends = ends_of_blocks(dense_hessian(objective, params), params, layout)
    assert_blocks(unrolled, {name: e[1] for name, e in ends.items()})


def test_masks_of_a_scanned_model_broadcast():
    _, params, layout = deep(scan=True)
    masks = block_masks(params, layout)
    kernel = masks["block_1"]["block"]["up"]["kernel"]
    np.testing.assert_array_equal(kernel, np.array([0.0, 1.0]).reshape(2, 1, 1))
    assert masks["block_1"]["head"]["kernel"].tolist() == [[0.0]]
    whole = sum(len(rows_of(params, masks[name])) for name in masks)
    assert whole == ravel_pytree(params)[0].size


def test_blocks_of_an_nnx_model_are_named_by_its_attributes():
    objective, params = nnx_problem()
    found = searched(objective, params)
    ends = ends_of_blocks(dense_hessian(objective, params), params, "*")
    assert list(found) == ["first", "last", "norm"]
    assert_blocks(found, {name: e[1] for name, e in ends.items()})


def test_block_eigenvalues_of_the_empirical_fisher_are_the_dense_ones():
    objective, params = net_objective("categorical"), net_params()
    found = searched(objective, params, curvature="empirical_fisher")
    dense = matrix_of(lambda: cx.empirical_fvp(objective, params), params)
    assert_blocks(found, {name: e[1] for name, e in ends_of_blocks(dense, params, "*").items()})


def test_block_eigenvalues_over_a_loader_are_the_dense_ones():
    found = block_eigenvalues(DatasetLoss(net_loss, loader_of(4, 4)), net_params(), subspace=8)
    ends = ends_of_blocks(hessian(), net_params(), "*")
    assert_blocks(found, {name: e[1] for name, e in ends.items()})


@pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs eight devices")
def test_block_eigenvalues_on_eight_devices_equal_those_on_one():
    def found(params, batch, mean_over=None):
        objective = cx.Objective(cx.gaussian("y"), batch, model=net)
        return block_eigenvalues(objective, params, "hidden", mean_over=mean_over)

    batch = net_batch(2 * DEVICES)
    specs: Any = dict(in_specs=(P(), P("batch")), out_specs=P())
    mapped = jax.shard_map(partial(found, mean_over="batch"), mesh=mesh(), **specs)
    expected = quick_jit(found)(net_params(), batch)
    parted = quick_jit(mapped)(net_params(), batch)
    assert values(parted) == pytest.approx(values(expected), rel=1e-10)


def test_errors_list_the_available_names():
    objective, params = cx.Objective(net_loss, net_batch()), net_params()
    with pytest.raises(ValueError, match=r"`hiden/\*`; near it are \['hidden"):
        block_eigenvalues(objective, params, ["hiden/*"])
    with pytest.raises(ValueError, match="layout has a parameter `block/down/bias`"):
        block_eigenvalues(objective, params, deep(scan=True)[2])
    with pytest.raises(ValueError, match="positive integer"):
        block_eigenvalues(objective, params, chunk=0)
