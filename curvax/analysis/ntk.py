"""A model and a point ↦ the neural tangent kernel of a batch, and its condition number."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from curvax import checks
from curvax.analysis.compiling import compiled_once
from curvax.analysis.jacobians import (
    fitting_chunk,
    jacobian,
    linear_maps,
    outputs_alone,
    outputs_of,
    outputs_shape,
)
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Key, ValueFn
from curvax.devices import meshes
from curvax.linalg import eigenpairs, gaussian_probe
from curvax.linalg.probes import as_key
from curvax.objective import Objective, as_objective, microbatching, require_batch, require_model

FORMS = ("full", "trace")
METHODS = ("auto", "dense", "lanczos")
DENSE = 2048
"""The largest kernel, in rows, whose eigenvalues `method="auto"` computes densely, in seconds."""
SUBSPACE = 512
"""Vectors that Lanczos keeps for larger kernels, one number for each row."""


class ConditionNumber(NamedTuple):
    """Result of `ntk_condition_number`: κ of a kernel, and its errors."""

    value: jax.Array
    """κ = λ_max/λ_min, scalar; infinite unless λ_min > 0."""
    largest: jax.Array
    """λ_max, scalar."""
    smallest: jax.Array
    """λ_min, scalar."""
    residuals: jax.Array
    """Bounds on the distance of λ_max and of λ_min to an eigenvalue, [2]."""
    converged: jax.Array
    """Each residual is at most `tol` times its eigenvalue, boolean scalar."""


def ntk(
    objective: Objective, params: Tree, *, form: str = "full", chunk: int | None = None
) -> jax.Array:
    """Computes the empirical neural tangent kernel of a batch, the Gram matrix of output gradients.

        Θ(xᵢ, xⱼ)_cd = <∂z_c(xᵢ)/∂θ, ∂z_d(xⱼ)/∂θ>

    Each example is evaluated as a batch of one. The kernel is undefined if outputs depend on other
    examples: freeze batch norm and dropout (`train=False`). Jacot et al., arXiv:1806.07572.

    Args:
        objective: an `Objective` with `model=`; its loss is not evaluated.
        params: the point θ.
        form: "full", or "trace" for Σ_c Θ_cc, the sum over outputs.
        chunk: examples whose Jacobians are in memory at once (twice), C·P numbers each for C
            outputs and P parameters; divides the batch. By default as many as fit 256 MB. With
            several chunks each Jacobian is computed once for every other chunk.

    Returns:
        Θ, [n, C, n, C] or [n, n], in float32 or wider; of the local examples inside pmap or
        shard_map.

    Raises:
        ValueError: no `model`, an unknown form, a `chunk` that does not divide the batch, or, in
            an eager call, outputs that depend on other examples.

    Examples:
        >>> import jax.numpy as jnp
        >>> import curvax
        >>> model = lambda w, batch: batch["x"] @ w
        >>> batch = {"x": jnp.array([[1.0, 2.0], [0.0, 3.0]]), "y": jnp.zeros((2, 1))}
        >>> objective = curvax.Objective(curvax.gaussian("y"), batch, model=model)
        >>> curvax.analysis.ntk(objective, jnp.ones((2, 1)), form="trace").tolist()
        [[5.0, 6.0], [6.0, 9.0]]
    """
    objective = _checked(objective, params, "ntk", form, chunk)
    gram, difference = _gram(objective, params, form=form, chunk=chunk)
    _refuse_dependent(difference, "ntk")
    return gram


def ntk_condition_number(
    objective: Objective,
    params: Tree,
    *,
    form: str = "full",
    method: str = "auto",
    chunk: int | None = None,
    tol: float = 1e-3,
    max_products: int = 5000,
    key: Key = 0,
) -> ConditionNumber:
    """Computes the condition number of the neural tangent kernel.

        κ = λ_max(Θ) / λ_min(Θ)

    The larger κ, the slower gradient descent learns the directions of small eigenvalues. Xiao et
    al., arXiv:1912.13053, section 3.1; Chen, Hsieh & Gong, arXiv:2106.01548, Table 1. Batch norm
    and dropout must be frozen, as in `ntk`.

    Args:
        objective: an `Objective` with `model=`; its loss is not evaluated.
        params: the point θ.
        form: "full" or "trace", as in `ntk`.
        method: "dense", all eigenvalues of `ntk`; "lanczos", both ends of the spectrum from
            products u ↦ J Jᵀ u, each a backward and a forward pass (C of each for the trace form);
            "auto", dense up to 2048 rows.
        chunk: examples at once, as in `ntk`; for Lanczos by default the whole batch.
        tol: bound on each residual relative to its eigenvalue, for `converged`.
        max_products: approximate limit on the number of products at each end.
        key: typed key or seed of the start vector.

    Returns:
        A `ConditionNumber`.

    Raises:
        ValueError: as in `ntk`, or an unknown method.

    Examples:
        >>> import jax.numpy as jnp
        >>> import curvax
        >>> model = lambda w, batch: batch["x"] @ w
        >>> batch = {"x": jnp.array([[1.0, 0.0], [0.0, 3.0]]), "y": jnp.zeros((2, 1))}
        >>> objective = curvax.Objective(curvax.gaussian("y"), batch, model=model)
        >>> found = curvax.analysis.ntk_condition_number(objective, jnp.ones((2, 1)))
        >>> round(float(found.value), 3)
        9.0
    """
    objective = _checked(objective, params, "ntk_condition_number", form, chunk)
    if method not in METHODS:
        raise ValueError(
            f"`ntk_condition_number` takes `method` as one of {METHODS}, and got {method!r}."
        )
    checks.check_count("ntk_condition_number", max_products=max_products)
    outputs = outputs_shape(objective, params)[1] if form == "full" else 1
    if method == "dense" or (method == "auto" and objective.size * outputs <= DENSE):
        found, difference = _dense(objective, params, form=form, chunk=chunk, tol=tol)
    else:
        chunk = chunk or objective.microbatch
        options = dict(form=form, chunk=chunk, tol=tol, max_products=max_products)
        found, difference = _matrix_free(objective, params, as_key(key), **options)
    _refuse_dependent(difference, "ntk_condition_number")
    return found


@compiled_once
def _gram(
    objective: Objective, params: Tree, *, form: str, chunk: int | None
) -> tuple[jax.Array, jax.Array]:
    chunk = chunk or fitting_chunk(objective, params)
    with jax.default_matmul_precision("highest"):
        if chunk == objective.size:
            whole = jacobian(objective, params)
            gram = _products(whole, whole, form)
        else:
            gram = _by_chunks(objective, params, form, chunk)
        return gram, _dependence(objective, params, chunk)


def _by_chunks(objective: Objective, params: Tree, form: str, chunk: int) -> jax.Array:
    n = objective.size
    groups, count = objective.groups(chunk), n // chunk
    of = lambda i, batch, params: jacobian(objective.piece(batch, i, count), params)

    def row(i: jax.Array, batch: Tree, params: Tree) -> jax.Array:
        left = of(i, batch, params)
        product = lambda *other: _products(left, of(*other), form)
        return microbatching.map_over(product, groups, count, 1, params)

    blocks = microbatching.map_over(row, groups, count, 1, params)
    # [chunks, chunks, chunk(, C), chunk(, C)]
    own = blocks.ndim // 2 - 1
    order = (0, *range(2, 2 + own), 1, *range(2 + own, 2 + 2 * own))
    outputs = blocks.shape[3 : 2 + own]
    return blocks.transpose(order).reshape(n, *outputs, n, *outputs)


def _products(left: Tree, right: Tree, form: str) -> jax.Array:
    """<J_ic, J_jd> of two Jacobians, [n, C, m, C], or [n, m] summed over c = d, on every device.

    On an explicit mesh each device multiplies its rows of `left` by all rows of `right`.
    """
    start = 2 if form == "full" else 1

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        inside = tuple(range(start, a.ndim))
        dims = ((inside, inside), ((), ()))
        return lax.dot_general(a, b, dims, preferred_element_type=trees.wide_dtype(a.dtype))

    left, right = jax.tree.map(meshes.by_rows, left), meshes.gathered(right)
    return meshes.gathered(jax.tree.reduce(jnp.add, jax.tree.map(one, left, right)))


@compiled_once
def _dense(
    objective: Objective, params: Tree, *, form: str, chunk: int | None, tol: float
) -> tuple[ConditionNumber, jax.Array]:
    gram, difference = _gram(objective, params, form=form, chunk=chunk)
    rows = math.isqrt(gram.size)
    values = jnp.linalg.eigvalsh(gram.reshape(rows, rows))
    # Backward error of a symmetric eigensolver, ε‖Θ‖.
    rounding = jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))
    return _condition(values[-1], values[0], jnp.full(2, rounding), tol), difference


@compiled_once
def _matrix_free(
    objective: Objective,
    params: Tree,
    key: jax.Array,
    *,
    form: str,
    chunk: int | None,
    tol: float,
    max_products: int,
) -> tuple[ConditionNumber, jax.Array]:
    with jax.default_matmul_precision("highest"):
        maps = linear_maps(objective, params, chunk)
        kernel = lambda u: maps.push(maps.pull(u))
        n, outputs = outputs_shape(objective, params)

        def summed(u: jax.Array) -> jax.Array:
            column = lambda e: kernel(u[:, None] * e[None]) @ e
            return jnp.sum(lax.map(column, jnp.eye(outputs, dtype=u.dtype)), axis=0)

        wide = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
        like = jax.ShapeDtypeStruct((n, outputs) if form == "full" else (n,), wide)
        start = gaussian_probe(key, like)
        product = kernel if form == "full" else summed
        search = dict(max_products=max_products, subspace=min(start.size, SUBSPACE))
        # `eigenpairs` takes `tol` relative to λ_max, and λ_min may be far smaller: use the finest.
        finest = 32 * float(jnp.finfo(wide).eps)
        largest = eigenpairs(product, start, end="largest", tol=max(tol**2, finest), **search)
        smallest = eigenpairs(product, start, end="smallest", tol=finest, **search)
        residuals = jnp.concatenate([largest.residuals, smallest.residuals])
        found = _condition(largest.values[0], smallest.values[0], residuals, tol)
        return found, _dependence(objective, params, chunk or n)


def _condition(
    largest: jax.Array, smallest: jax.Array, residuals: jax.Array, tol: float
) -> ConditionNumber:
    positive = smallest > 0
    value = jnp.where(positive, largest / jnp.where(positive, smallest, 1), jnp.inf)
    near = jnp.all(residuals <= tol * jnp.stack([largest, smallest]))
    return ConditionNumber(value, largest, smallest, residuals, near)


def _dependence(objective: Objective, params: Tree, chunk: int) -> jax.Array:
    """The relative change of outputs with the other examples in the batch, in units of √ε."""
    count = min(max(2, chunk), objective.size)
    some = objective.on(jax.tree.map(lambda x: meshes.first(x, count), objective.batch))
    together, alone = outputs_of(some, params), outputs_alone(some, params)
    rounding = jnp.finfo(together.dtype).eps ** 0.5 * jnp.max(jnp.abs(together))
    return trees.ratio(jnp.max(jnp.abs(together - alone)), rounding)


def _refuse_dependent(difference: jax.Array, name: str) -> None:
    if isinstance(difference, jax.core.Tracer) or not difference > 1:
        return
    raise ValueError(
        f"`{name}` differentiates the outputs of each example, and here they depend on the other "
        "examples of the batch, or on a key. Freeze batch norm and dropout in the model of the "
        "`Objective`: `train=False` and no `key`, or `model.eval()`."
    )


def _checked(
    objective: Objective | ValueFn, params: Tree, name: str, form: str, chunk: int | None
) -> Objective:
    what = f"`{name}`"
    objective = require_model(require_batch(as_objective(objective, name, params), name), what)
    if form not in FORMS:
        raise ValueError(f"`{name}` takes `form` as one of {FORMS}, and got {form!r}.")
    if chunk is not None:
        microbatching.check_divides(objective.size, chunk, f"`{name}(chunk=)`")
    return objective
