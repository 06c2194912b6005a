"""Activations and cotangents at the sites of a model ↦ the factors A and G, and diagonals."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.curvature.kronecker.atoms import arranged, canonical, size_of
from curvax.curvature.kronecker.plan import Block, Plan, is_flipped
from curvax.curvature.kronecker.taps import Arrays
from curvax.curvature.kronecker.uses import Use
from curvax.curvature.kronecker.values import ROWS
from curvax.likelihoods import Likelihood
from curvax.objective import Objective


class Rows(NamedTuple):
    """The activations of a block, and what each row of them weighs."""

    values: jax.Array
    """a, [layers, examples, positions, features], or the numbers of the rows of a table, [layers,
    examples, positions]."""
    weights: jax.Array | None
    """ρ with Σρ = 1, [examples, positions]; None if all are the same."""
    table: int = 0
    """The number of rows of the table, if it is one."""


def site_weights(part: Objective, outputs: Tree) -> jax.Array | None:
    """w / Σw of the sites, [n, ...]; None if all count the same."""
    if not isinstance(part.loss, Likelihood) or not part.loss.weighted:
        return None
    w = part.loss.site_weights(outputs, part.batch)
    sites = max((i for i, size in enumerate(w.shape) if size > 1), default=0) + 1
    return w.reshape(w.shape[: max(1, sites)])


def row_weights(use: Use, sites: jax.Array, n: int) -> jax.Array:
    """The weight of every row of a use, [examples, positions], which sum to one.

    A position along which the sites lie has their weights; others share equally.
    """
    digits = {k: [a for a in use.positions if a[:2] == (ROWS, k)] for k in range(1, sites.ndim)}
    kept = [k for k, own in digits.items() if size_of(own) == sites.shape[k] > 1]
    w = jnp.sum(sites, axis=tuple(k for k in range(1, sites.ndim) if k not in kept))
    own = [atom for k in kept for atom in canonical(digits[k])]
    others = [atom for atom in use.positions if atom[:2] not in {(ROWS, k) for k in kept}]
    w = w.reshape(n, *(atom.size for atom in own), *[1] * len(others)) / size_of(others)
    w = jnp.broadcast_to(w, (n, *(atom.size for atom in (*own, *others))))
    axes = (use.examples, *((atom,) for atom in (*own, *others)))
    return arranged(w, axes, (use.examples, use.positions))


def inputs_of(use: Use, seen: Arrays) -> jax.Array:
    """The activations at a use, [layers, examples, positions, features]; of a table, numbers."""
    a = seen[use.number]
    if use.site.kind == "lookup":
        return arranged(a[..., 0], use.given, use.of_rows)
    if use.site.kind == "convolution":
        a = _patches(use, a)
    a = trees.widen(a)
    if use.factor is not None:
        scale = _factor(use, seen)
        a = a * scale.reshape(*scale.shape, *[1] * (a.ndim - scale.ndim))
    return arranged(a, use.given, (*use.of_rows, use.inputs))


def _factor(use: Use, seen: Arrays) -> jax.Array:
    """What the parameter was multiplied by before this use, over all scans."""
    assert use.factor is not None
    assert use.site.scale is not None
    c = trees.widen(seen[use.site.scale])
    return 1 / c if use.factor.eqn.primitive.name == "div" else c


def outputs_of(use: Use, cotangent: jax.Array) -> jax.Array:
    """The cotangents at a use, [layers, examples, positions, features]."""
    return arranged(trees.widen(cotangent), use.result, (*use.of_rows, use.outputs))


def _patches(use: Use, images: jax.Array) -> jax.Array:
    """The windows of the images that the kernel multiplies, as the result of a convolution."""
    eqn = use.site.eqn
    options = {name: eqn.params[name] for name in ("padding", "lhs_dilation", "rhs_dilation")}
    numbers = eqn.params["dimension_numbers"]
    window = [eqn.invars[1].aval.shape[i] for i in numbers.rhs_spec[2:]]
    cut: Any = lambda x: lax.conv_general_dilated_patches(
        x, window, eqn.params["window_strides"], dimension_numbers=numbers,
        precision=lax.Precision.HIGHEST, **options,
    )  # fmt: skip
    for _ in use.site.levels:
        cut = jax.vmap(cut)
    return cut(images)


def rows_of(uses: list[Use], seen: Arrays, sites: jax.Array | None, n: int) -> Rows:
    """The activations of several uses of a parameter, side by side as positions."""
    weights = None
    if sites is not None:
        count = sum(use.count for use in uses)
        share = lambda use: row_weights(use, sites, n) * (use.count / count)
        weights = jnp.concatenate([share(use) for use in uses], axis=1)
    values = [inputs_of(use, seen) for use in uses]
    table = 0
    if all(use.site.kind == "lookup" for use in uses):
        table = size_of(uses[0].inputs)
    else:
        features = size_of(uses[0].inputs)
        hot = lambda use, a: jax.nn.one_hot(a, features) if use.site.kind == "lookup" else a
        values = [hot(use, a) for use, a in zip(uses, values)]
    return Rows(jnp.concatenate(values, axis=2), weights, table)


def cotangents_of(uses: list[Use], pulled: Arrays) -> jax.Array:
    """The cotangents of several uses of a parameter, side by side as positions."""
    return jnp.concatenate([outputs_of(use, pulled[use.number]) for use in uses], axis=2)


def with_ones(rows: Rows) -> Rows:
    """The activations with a last feature that is 1, for the bias."""
    a = rows.values
    return rows._replace(values=jnp.concatenate([a, jnp.ones_like(a[..., :1])], axis=-1))


def input_factor(rows: Rows, sharing: str) -> jax.Array:
    """A, [layers, features, features], or its diagonal for a table, [layers, features]."""
    if rows.table:
        return _table_factor(rows, sharing)
    a, rho = rows.values, rows.weights
    if sharing == "reduce" and rho is None:
        a = jnp.mean(a, axis=2, keepdims=True)
    elif sharing == "reduce" and rho is not None:
        share = jnp.sum(rho, axis=1, keepdims=True)
        part = _like(trees.ratio(rho, share)[None, ..., None], a)
        a, rho = jnp.sum(part * a, axis=2, keepdims=True), share
    if rho is None:
        return jnp.einsum("lnpi,lnpj->lij", a, a) / (a.shape[1] * a.shape[2])
    return jnp.einsum("lnpi,lnpj->lij", _like(rho[None, ..., None], a) * a, a)


def _like(weights: jax.Array, a: jax.Array) -> jax.Array:
    return jnp.broadcast_to(weights, (*a.shape[:-1], 1)).astype(a.dtype)


def _table_factor(rows: Rows, sharing: str) -> jax.Array:
    """How often each row of the table is used; for `reduce`, the mean square per example."""
    ids = rows.values
    layers, n, count = ids.shape
    rho = jnp.full((n, count), 1 / (n * count)) if rows.weights is None else rows.weights
    layer, example = jnp.arange(layers)[:, None, None], jnp.arange(n)[None, :, None]
    spread = lambda w: jnp.broadcast_to(w[None], ids.shape)
    if sharing == "expand":
        return jnp.zeros((layers, rows.table), rho.dtype).at[layer, ids].add(spread(rho))
    share = jnp.sum(rho, axis=1)
    part = spread(trees.ratio(rho, share[:, None]))
    means = jnp.zeros((layers, n, rows.table), rho.dtype).at[layer, example, ids].add(part)
    return jnp.einsum("n,lnv->lv", share, jnp.square(means))


def output_factor(g: jax.Array, sharing: str) -> jax.Array:
    """The outer products of the cotangents of one column, [layers, features, features]."""
    if sharing == "reduce":
        g = jnp.sum(g, axis=2, keepdims=True)
    return jnp.einsum("lnpo,lnpq->loq", g, g)


def squares(
    uses: tuple[Use, ...], pulled: Arrays, seen: Arrays, shape: tuple[int, ...]
) -> jax.Array:
    """Σ over the examples of the squared gradients of a repeated parameter, shaped like it."""
    total = jnp.zeros(())
    for use in uses:
        own = canonical((*use.stack, *use.outputs))
        g = trees.widen(pulled[use.number])
        g = jnp.sum(arranged(g, use.result, (use.examples, use.positions, own)), axis=1)
        if use.factor is not None:
            c = _factor(use, seen)
            levels, inside = c.shape[: len(use.site.levels)], use.factor.given
            whole = (*levels, *map(size_of, inside))
            c = c.reshape(*levels, *[1] * (len(whole) - c.ndim), *c.shape[len(levels) :])
            stack = tuple(axis for _, axis in use.site.outer)
            g = g * arranged(jnp.broadcast_to(c, whole), (*stack, *inside), (own,))[None]
        total = total + g
    return jnp.sum(jnp.square(total), axis=0).reshape(shape)


def split(block: Block, uses: tuple[Use, ...]) -> tuple[list[Use], list[Use]]:
    """(the uses of a block as it is, those with inputs and outputs exchanged)"""
    straight = [use for use in uses if not is_flipped(use, block)]
    return straight, [use for use in uses if is_flipped(use, block)]


def halves(plan: Plan) -> list[list[list[Use]]]:
    """The uses of every block, as it is and exchanged, without empty lists."""
    return [
        [half for half in split(block, uses) if half] for block, uses in zip(plan.blocks, plan.uses)
    ]


def inputs_of_blocks(
    plan: Plan, seen: Arrays, sites: jax.Array | None, n: int, joint: bool
) -> list[list[Rows]]:
    """The activations of every block, of its uses as they are and of those exchanged."""
    found = []
    for block, uses in zip(plan.blocks, halves(plan)):
        rows = [rows_of(half, seen, sites, n) for half in uses]
        found.append([with_ones(x) if joint and block.bias is not None else x for x in rows])
    return found
