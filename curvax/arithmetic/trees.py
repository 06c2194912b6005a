"""Arithmetic on parameter trees, in float32 or wider, with every leaf known by its path."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from curvax.arithmetic.safe_math import quotient, ratio

Tree = Any
"""A pytree of arrays; `None` leaves are absent."""


class Name(str):
    """One step of a path: a plain string that also answers to JAX's `.key`, `.name` and `.idx`."""

    __slots__ = ()

    @property
    def key(self) -> str:
        return str(self)

    name = idx = key


Path = tuple[Name, ...]


def names(path: Iterable[Any]) -> Path:
    """The names along a JAX key path: `('block_0', 'kernel')`."""
    return tuple(Name(jax.tree_util.keystr((entry,), simple=True)) for entry in path)


def label(path: Path) -> str:
    """A path as a person writes it: `block_0/kernel`."""
    return "/".join(path) or "(root)"


def map_with_path(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`jax.tree.map` whose function also receives the path as a tuple of names."""
    return jax.tree.map_with_path(lambda path, *leaves: f(names(path), *leaves), tree, *rest)


def same_leaves(a: Tree, b: Tree) -> bool:
    """Whether two trees hold the very same arrays."""
    x, y = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(x) == len(y) and all(u is v for u, v in zip(x, y))


def is_leaf(tree: Tree) -> bool:
    """Whether this is one array or number, not a tree of them."""
    leaves = jax.tree.leaves(tree)
    return len(leaves) == 1 and leaves[0] is tree


OVERWRITTEN = "_overwrite_with_gradient"
"""Flax's collection of states whose gradients are their next values, such as the scales of fp8."""


def is_overwritten(path: Path) -> bool:
    """Whether the gradient of a leaf is its next value, which is no mean."""
    return OVERWRITTEN in path


def has_overwritten(tree: Tree) -> bool:
    return any(is_overwritten(names(path)) for path, _ in jax.tree.leaves_with_path(tree))


def is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def arrays(tree: Tree) -> Tree:
    """The tree with plain numbers as arrays; arrays of JAX and NumPy stay the objects they are."""
    if all(hasattr(x, "dtype") for x in jax.tree.leaves(tree)):
        return tree
    return jax.tree.map(lambda x: x if hasattr(x, "dtype") else jnp.asarray(x), tree)


def differentiated(f: Callable[[Tree], tuple[Any, Any]], params: Tree) -> tuple[Any, Tree]:
    """(f(params), the gradient of its first part), where integer leaves have a gradient of zeros of
    their own dtype, with which Optax leaves them as they are."""
    if all(is_float(x) for x in jax.tree.leaves(params)):
        return jax.value_and_grad(f, has_aux=True)(params)
    out, grads = jax.value_and_grad(f, has_aux=True, allow_int=True)(params)
    return out, jax.tree.map(lambda x, g: g if is_float(x) else jnp.zeros_like(x), params, grads)


def widen(x: Any) -> jax.Array:
    """A number or an array in float32 or wider."""
    x = jnp.asarray(x)
    return x.astype(wide_dtype(x.dtype))


def wide_dtype(dtype: Any) -> Any:
    """That type, or float32 for narrower ones and whole numbers."""
    inexact = jnp.issubdtype(dtype, jnp.inexact)
    return dtype if inexact and jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def wide(tree: Tree) -> Tree:
    """The tree with every leaf in float32 or wider."""
    return jax.tree.map(widen, tree)


def cast_like(tree: Tree, like: Tree) -> Tree:
    return jax.tree.map(lambda x, y: _cast(x, y.dtype), tree, like)


def _cast(x: jax.Array, dtype: Any) -> jax.Array:
    """x as another type, but no complex number as its real part.

    Raises:
        TypeError: x is complex, and the type is not.
    """
    kind = jnp.complexfloating
    if jnp.issubdtype(x.dtype, kind) and not jnp.issubdtype(dtype, kind):
        raise TypeError(
            f"A product took a vector of {jnp.dtype(dtype)} to one of {x.dtype}, of which the "
            "imaginary part would be lost. Write a complex matrix A + iB as the real one "
            "[[A, -B], [B, A]] of real and imaginary parts."
        )
    return x.astype(dtype)


def is_sharded(x: jax.Array) -> bool:
    """Whether the type says that an array lies in parts (explicit meshes)."""
    return any(entry is not None for entry in jax.typeof(x).sharding.spec)


def laid_out_like(tree: Tree, like: Tree) -> Tree:
    """The same values with the dtypes of `like`, and laid out as its types say."""

    def lay(x: jax.Array, y: jax.Array) -> jax.Array:
        x, mine, other = _cast(x, y.dtype), jax.typeof(x).sharding, jax.typeof(y).sharding
        if not (is_sharded(x) or is_sharded(y)) or mine.spec == other.spec:
            return x
        mesh = (other if is_sharded(y) else mine).mesh
        return jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, other.spec))

    return jax.tree.map(lay, tree, like)


def add(a: Tree, b: Tree) -> Tree:
    """a + b with the dtypes of a."""
    return jax.tree.map(lambda x, y: (widen(x) + widen(y)).astype(x.dtype), a, b)


def add_scaled(a: Tree, scale: Any, b: Tree) -> Tree:
    """a + scale·b with the dtypes of a."""
    return jax.tree.map(lambda x, y: (widen(x) + scale * widen(y)).astype(x.dtype), a, b)


def scale(factor: Any, tree: Tree) -> Tree:
    return jax.tree.map(lambda x: (factor * widen(x)).astype(x.dtype), tree)


def nan_like(x: jax.Array) -> jax.Array:
    """NaN for what is not known; placed, where `jax_debug_nans` would stop an operation."""
    if isinstance(x, jax.core.Tracer):
        return jnp.full_like(x, jnp.nan)
    return jax.device_put(np.full(x.shape, np.nan, x.dtype))


def total(tree: Tree) -> jax.Array:
    """The sum over all entries of all leaves."""
    return sum((jnp.sum(widen(x)) for x in jax.tree.leaves(tree)), jnp.zeros((), jnp.float32))


def dot(a: Tree, b: Tree) -> jax.Array:
    """<a, b> over the whole tree (a sum of products: `vdot` refuses sharded parameters)."""
    return total(jax.tree.map(lambda x, y: widen(x) * widen(y), a, b))


@jax.custom_jvp
def norm(tree: Tree) -> jax.Array:
    """‖a‖₂ over the whole tree, with derivative 0 at 0; no square leaves the range of floats.

    Squares are summed as they are, enlarged and reduced, each by a power of two, and the sum that
    is in range counts. The largest entry would tell the scale beforehand, at the price of one more
    exchange between devices where parameters are divided among them.
    """
    plain, enlarged, reduced, (large, low, high) = _inner(tree, tree)
    length = jnp.where(plain < low, jnp.sqrt(enlarged) / large, jnp.sqrt(plain))
    return jnp.where(plain > high, jnp.sqrt(reduced) * large, length)


@norm.defjvp
def _norm_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    length = norm(*primals)
    return length, dot(unit(*primals), *tangents).astype(length.dtype)


def _ranges(dtype: Any) -> tuple[float, float, float]:
    """(a power of two, below and above which sums of squares another scale is right)."""
    exponent = int(jnp.finfo(dtype).maxexp)
    return 2.0 ** (0.6 * exponent // 1), 2.0 ** (-0.55 * exponent), 2.0 ** (0.78 * exponent)


@jax.custom_jvp
def unit(tree: Tree) -> Tree:
    """a / ‖a‖₂ in float32 or wider, and 0 for a = 0."""
    near_one = inverse(magnitude(tree))
    return divided(scale(near_one, wide(tree)), norm(tree) * near_one)


@unit.defjvp
def _unit_jvp(primals: Any, tangents: Any) -> tuple[Tree, Tree]:
    # ∂(a/‖a‖) = (∂a - â<â, ∂a>) / ‖a‖: no power of ‖a‖ but the first.
    length, e = norm(*primals), unit(*primals)
    across = add_scaled(wide(*tangents), -dot(e, *tangents), e)
    return e, scale(ratio(jnp.ones((), length.dtype), length), across)


def divided(tree: Tree, length: jax.Array) -> Tree:
    """a / ‖a‖ for a length known, with the dtypes of a."""
    length = jnp.where(length == 0, 1, length)
    return jax.tree.map(lambda x: quotient(widen(x), length).astype(x.dtype), tree)


def magnitude(tree: Tree) -> jax.Array:
    """The power of two next below ‖a‖₂, a constant; 1 where that is 0 or not finite.

    In units of it a vector is near 1, and to the last bit what it was; so are its linear maps.
    """
    length = lax.stop_gradient(norm(tree))
    info = jnp.finfo(length.dtype)
    integer = jnp.dtype(f"uint{info.bits}")
    bits = lax.bitcast_convert_type(length, integer)
    below = lax.bitcast_convert_type((bits >> info.nmant) << info.nmant, length.dtype)
    fine = jnp.isfinite(length) & (length > 0)
    edge = 2.0 ** (info.maxexp - 8)
    return jnp.where(fine, jnp.clip(below, 1 / edge, edge), 1)


def inverse(one: jax.Array) -> jax.Array:
    """1 / a `magnitude`, from its bits: XLA turns (a/b)(c/d) into ac/bd, which leaves the range."""
    info = jnp.finfo(one.dtype)
    integer = jnp.dtype(f"uint{info.bits}")
    unit_bits = lax.bitcast_convert_type(jnp.ones((), one.dtype), integer)
    bits = unit_bits + unit_bits - lax.bitcast_convert_type(one, integer)
    return lax.bitcast_convert_type(bits, one.dtype)


@jax.custom_jvp
def cosine(a: Tree, b: Tree) -> jax.Array:
    """<a, b> / ‖a‖‖b‖ over the whole tree, and 0 where one of them is. It waits for no norm."""
    plain, enlarged, reduced, (large, low, high) = _inner(a, b)
    length, other = norm(a), norm(b)
    size = length * other
    over = lambda x, factor: ratio(ratio(x, length * factor), other * factor)
    near = jnp.where(size < low, over(enlarged, large), over(plain, 1))
    return jnp.where(size > high, over(reduced, 1 / large), near)


@cosine.defjvp
def _cosine_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (a, b), (da, db) = primals, tangents
    value, x, y = cosine(a, b), unit(a), unit(b)
    turned = lambda e, other, de, length: ratio(dot(add_scaled(other, -value, e), de), length)
    return value, (turned(x, y, da, norm(a)) + turned(y, x, db, norm(b))).astype(value.dtype)


def _inner(a: Tree, b: Tree) -> tuple[jax.Array, jax.Array, jax.Array, tuple[float, float, float]]:
    """<a, b>, the same with both enlarged, both reduced, and `_ranges`."""
    pairs = [(widen(x), widen(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))]
    dtype = jnp.result_type(*(x for pair in pairs for x in pair)) if pairs else jnp.float32
    pairs = [(x.astype(dtype), y.astype(dtype)) for x, y in pairs]
    large, low, high = _ranges(dtype)

    def inner(factor: float) -> jax.Array:
        # XLA joins the factors of (cx)(cy) to c², out of range, but for the minimum; those of
        # arrays too, where x has been multiplied by a number.
        first = lambda x: jnp.minimum(x * factor, large)
        return sum((jnp.sum(first(x) * (y * factor)) for x, y in pairs), jnp.zeros((), dtype))

    plain = sum((jnp.sum(x * y) for x, y in pairs), jnp.zeros((), dtype))
    return plain, inner(large), inner(1 / large), (large, low, high)


def reject(a: Tree, b: Tree) -> Tree:
    """The part of a orthogonal to b, over the whole tree: a - <a, b̂> b̂."""
    return add_scaled(a, -cosine(a, b) * norm(a), unit(b))


def broadcast_prefix(prefix: Tree, tree: Tree) -> Tree:
    """A leaf of `prefix` for each leaf of `tree` beneath it.

    Raises:
        ValueError: `prefix` is not a tree prefix of `tree`.
    """
    try:
        spread = jax.tree.map(lambda p, sub: jax.tree.map(lambda _: p, sub), prefix, tree)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "A tree of options must be a prefix of the parameters: a value or a subtree for each "
            f"of their branches. Got {jax.tree.structure(prefix)} for parameters "
            f"{jax.tree.structure(tree)}."
        ) from error
    return spread


def require_floating(params: Tree, stage: str) -> None:
    """Refuses integer leaves where a stage differentiates with respect to every leaf.

    Raises:
        TypeError: a leaf has an integer or boolean dtype.
    """
    for path, leaf in jax.tree.leaves_with_path(params):
        if not is_float(leaf):
            raise TypeError(
                f"`{stage}` differentiates the loss with respect to every parameter, and the leaf "
                f"`{label(names(path))}` has dtype {jnp.result_type(leaf)}. Keep counters and "
                f"tables out of the parameters, or write `curvax.restrict({stage}(...), mask)` "
                "with a mask that is False there."
            )
