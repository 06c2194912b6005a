"""Decompositions of stacks of matrices [..., d, d], on one device or divided among several.

On the CPU jaxlib before 0.11.2 hands the matrices of a stack to the threads that run the program,
and waits for them: as many such calls at once as there are threads wait forever. There the matrices
of a stack are taken one by one.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.scipy.linalg import cho_factor, cho_solve

from curvax.devices import axes, meshes

Function = Callable[..., tuple[jax.Array, ...]]


def eigh(*matrices: jax.Array) -> list[tuple[jax.Array, ...]]:
    """(eigenvalues in ascending order, eigenvectors as columns) of symmetric matrices."""
    return _each(lambda m: tuple(jnp.linalg.eigh(m)), [(m,) for m in matrices])


def orthogonal_factors(*matrices: jax.Array) -> list[jax.Array]:
    """Q of M = QR."""
    return [q for (q,) in _each(lambda m: (jnp.linalg.qr(m)[0],), [(m,) for m in matrices])]


def inverses(*matrices: jax.Array) -> list[jax.Array]:
    """M⁻¹ of positive definite matrices."""
    return [x for (x,) in _each(lambda m: (_inverse(m),), [(m,) for m in matrices])]


def cholesky_solved(matrix: jax.Array, v: jax.Array) -> jax.Array:
    """M⁻¹ V of positive definite matrices M and matrices V [..., d, n]."""
    ((x,),) = _each(lambda m, v: (cho_solve(cho_factor(m, lower=True), v),), [(matrix, v)])
    return x


SMALL = 128
"""The size up to which an inverse is taken by a Cholesky factor."""


def _inverse(matrix: jax.Array) -> jax.Array:
    """By halves: [[A, B], [Bᵀ, D]]⁻¹ from the inverses of A and of D - BᵀA⁻¹B.

    Nearly all of it is matrix products; half the time of triangular solves at d = 785, as
    accurate.
    """
    size = len(matrix)
    if size <= SMALL:
        return cho_solve(cho_factor(matrix, lower=True), jnp.eye(size, dtype=matrix.dtype))
    half = size // 2
    a, b, d = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    inverse_a = _inverse(a)
    x = inverse_a @ b
    inverse_s = _inverse(d - b.T @ x)
    y = x @ inverse_s
    return jnp.block([[inverse_a + y @ x.T, -y], [-y.T, inverse_s]])


class _Division:
    """Devices among which matrices are divided, and what each of them has to do so far."""

    def __init__(self, over: tuple[str, ...]):
        self.over, self.loads = over, np.zeros(axes.index_and_size(over)[1])

    def owners(self, count: int, cost: float) -> list[int]:
        """The device of each of `count` matrices: the one with the least to do."""
        found = []
        for _ in range(count):
            found.append(int(np.argmin(self.loads)))
            self.loads[found[-1]] += cost
        return found


_over: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("over", default=())


@contextlib.contextmanager
def divided(over: tuple[str, ...]) -> Iterator[None]:
    """Within it each device takes a share of the matrices, and all devices receive all results.

    Args:
        over: device axes, over which the matrices are equal: all bound, or all of the mesh of the
            context; () divides nothing.
    """
    token = _over.set(over)
    try:
        yield
    finally:
        _over.reset(token)


def _each(f: Function, items: Sequence[tuple[jax.Array, ...]]) -> list[tuple[jax.Array, ...]]:
    """f of the matrices of every item, stacks of equal shapes [..., ., .]."""
    over = _over.get()
    if not over:
        return [_alone(f, *stacks) for stacks in items]
    flat = [tuple(x.reshape(-1, *x.shape[-2:]) for x in stacks) for stacks in items]
    shared = meshes.mapped(lambda *flat: _shared(f, flat, over), over)(*flat)
    return [
        tuple(x.reshape(*stacks[0].shape[:-2], *x.shape[1:]) for x in own)
        for stacks, own in zip(items, shared)
    ]


def _shared(
    f: Function, items: Sequence[tuple[jax.Array, ...]], over: tuple[str, ...]
) -> list[tuple[jax.Array, ...]]:
    """f of stacks [n, ., .], each device taking a share of the matrices."""
    division = _Division(over)
    return lax.psum([_share(f, stacks, division) for stacks in items], over)


def _alone(f: Function, *stacks: jax.Array) -> tuple[jax.Array, ...]:
    first, one = stacks[0].shape[:-2], _one(f)
    if not first:
        return one(*stacks)
    flat = [x.reshape(-1, *x.shape[-2:]) for x in stacks]
    one_by_one = lambda *xs: lax.map(lambda x: one(*x), xs)
    found = lax.platform_dependent(*flat, cpu=one_by_one, default=jax.vmap(f))
    return tuple(x.reshape(*first, *x.shape[1:]) for x in found)


def _one(f: Function) -> Function:
    """f of single matrices, which stays so under `jax.vmap`, as over the groups of `per_group`."""
    single = custom_vmap(f)

    @single.def_vmap
    def rule(size: int, batched: list[bool], *xs: jax.Array) -> Any:
        each = [x if own else jnp.broadcast_to(x, (size, *x.shape)) for x, own in zip(xs, batched)]
        found = _alone(f, *each)
        return found, tuple(True for _ in found)

    return single


def _share(
    f: Function, stacks: tuple[jax.Array, ...], division: _Division
) -> tuple[jax.Array, ...]:
    """f of the matrices of this device, and 0 in the places of others."""
    count, over = len(stacks[0]), division.over
    owners = division.owners(count, float(stacks[0].shape[-1]) ** 3)
    mine = jnp.array(owners) == axes.index_and_size(over)[0]
    # The matrices of this device come first, in their order.
    order, todo = jnp.argsort(~mine, stable=True), jnp.sum(mine)
    stacks = axes.vary(stacks, over)
    shapes = jax.eval_shape(f, *(x[0] for x in stacks))
    empty = tuple(jnp.zeros((count, *x.shape), x.dtype) for x in shapes)

    def step(carry: tuple[jax.Array, tuple[jax.Array, ...]]) -> tuple[jax.Array, tuple]:
        done, found = carry
        i = order[done]
        new = f(*(x[i] for x in stacks))
        return done + 1, tuple(x.at[i].set(y) for x, y in zip(found, new))

    start = (jnp.zeros((), todo.dtype), empty)
    return axes.while_loop(lambda carry: carry[0] < todo, step, start)[1]
