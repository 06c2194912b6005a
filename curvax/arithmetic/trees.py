"""Arithmetic on pytrees of parameters in float32 or wider, and names for their leaves."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from curvax.arithmetic.safe_math import quotient, ratio

Tree = Any
"""A pytree of arrays; None is an empty subtree."""


class Name(str):
    """One entry of a path: a string with the attributes `key`, `name` and `idx` of JAX's keys."""

    __slots__ = ()

    @property
    def key(self) -> str:
        return str(self)

    name = idx = key


Path = tuple[Name, ...]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def names(path: Iterable[Any]) -> Path:
    """The names along a JAX key path, `('block_0', 'kernel')` for example."""
    return tuple(Name(jax.tree_util.keystr((entry,), simple=True)) for entry in path)


def label(path: Path) -> str:
    """A path as text, `block_0/kernel` for example."""
    return "/".join(path) or "(root)"


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Static:
    """A hashable value without leaves, which JAX's transformations pass on unchanged."""

    value: Any


def map_with_path(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`jax.tree.map` for a function that also receives the path, a tuple of names."""
    return jax.tree.map_with_path(lambda path, *leaves: f(names(path), *leaves), tree, *rest)


def same_leaves(a: Tree, b: Tree) -> bool:
    """Whether two trees hold the same arrays, compared by identity."""
    x, y = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(x) == len(y) and all(u is v for u, v in zip(x, y))


def is_leaf(tree: Tree) -> bool:
    """Whether a tree is a single array or number."""
    leaves = jax.tree.leaves(tree)
    return len(leaves) == 1 and leaves[0] is tree


OVERWRITTEN = "_overwrite_with_gradient"
"""Flax's collection of states whose gradients are their next values, such as fp8 scales."""


def is_overwritten(path: Path) -> bool:
    """Whether the gradient of a leaf is its next value, so that it must not be averaged."""
    return OVERWRITTEN in path


def has_overwritten(tree: Tree) -> bool:
    return any(is_overwritten(names(path)) for path, _ in jax.tree.leaves_with_path(tree))


def is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def arrays(tree: Tree) -> Tree:
    """The tree with Python numbers converted to arrays; other leaves are the same objects."""
    if all(hasattr(x, "dtype") for x in jax.tree.leaves(tree)):
        return tree
    return jax.tree.map(lambda x: x if hasattr(x, "dtype") else jnp.asarray(x), tree)


def differentiated(f: Callable[[Tree], tuple[Any, Any]], params: Tree) -> tuple[Any, Tree]:
    """`jax.value_and_grad(f, has_aux=True)(params)`, also for integer leaves.

    Their gradient is 0 in their own dtype, so that Optax leaves them unchanged.
    """
    if all(is_float(x) for x in jax.tree.leaves(params)):
        return jax.value_and_grad(f, has_aux=True)(params)
    out, grads = jax.value_and_grad(f, has_aux=True, allow_int=True)(params)
    return out, jax.tree.map(lambda x, g: g if is_float(x) else jnp.zeros_like(x), params, grads)


def widen(x: Any) -> jax.Array:
    """A number or an array in float32 or wider."""
    x = jnp.asarray(x)
    return x.astype(wide_dtype(x.dtype))


def wide_dtype(dtype: Any) -> Any:
    """The dtype itself, or float32 for narrower floats and for integers."""
    inexact = jnp.issubdtype(dtype, jnp.inexact)
    return dtype if inexact and jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def wide(tree: Tree) -> Tree:
    """The tree with every leaf in float32 or wider."""
    return jax.tree.map(widen, tree)


def wide_floats(tree: Tree) -> Tree:
    """The tree with floating leaves in float32 or wider, and others as they are."""
    return jax.tree.map(lambda x: widen(x) if is_float(x) else x, tree)


def cast_like(tree: Tree, like: Tree) -> Tree:
    return jax.tree.map(lambda x, y: _cast(x, y.dtype), tree, like)


def _cast(x: jax.Array, dtype: Any) -> jax.Array:
    """Casts x, but never a complex number to its real part.

    Raises:
        TypeError: x is complex, and `dtype` is not.
    """
    kind = jnp.complexfloating
    if jnp.issubdtype(x.dtype, kind) and not jnp.issubdtype(dtype, kind):
        raise TypeError(
            f"A product maps a vector of {jnp.dtype(dtype)} to one of {x.dtype}, whose imaginary "
            "part would be lost. Write a complex matrix A + iB as the real matrix "
            "[[A, -B], [B, A]] of real and imaginary parts."
        )
    return x.astype(dtype)


def is_sharded(x: jax.Array) -> bool:
    """Whether an array is sharded along an explicit mesh axis, by its type."""
    return any(entry is not None for entry in jax.typeof(x).sharding.spec)


def laid_out_like(tree: Tree, like: Tree) -> Tree:
    """The same values with the dtypes and the sharding of `like`."""

    def lay(x: jax.Array, y: jax.Array) -> jax.Array:
        x, mine, other = _cast(x, y.dtype), jax.typeof(x).sharding, jax.typeof(y).sharding
        if not (is_sharded(x) or is_sharded(y)) or mine.spec == other.spec:
            return x
        mesh = (other if is_sharded(y) else mine).mesh
        return jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, other.spec))

    return jax.tree.map(lay, tree, like)


def _at_once(f: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Makes `f` one program, traced once for trees of equal shapes, also under `jax.disable_jit`.

    Loops over products that JAX cannot trace, such as those over a whole data set, run in Python
    under `disable_jit`.
    """
    compiled = jax.jit(f)

    @functools.wraps(f)
    def run(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        in_python = jax.config.jax_disable_jit  # type: ignore[attr-defined]
        if in_python and not any(map(_is_traced, jax.tree.leaves(args))):
            with jax.disable_jit(False):
                return compiled(*args, **options)
        return compiled(*args, **options)

    return run


def _is_traced(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)


def add(a: Tree, b: Tree) -> Tree:
    """a + b with the dtypes of a."""
    return jax.tree.map(lambda x, y: (widen(x) + widen(y)).astype(x.dtype), a, b)


@_at_once
def add_scaled(a: Tree, scale: Any, b: Tree) -> Tree:
    """a + scale·b with the dtypes of a."""
    return jax.tree.map(lambda x, y: (widen(x) + scale * widen(y)).astype(x.dtype), a, b)


@_at_once
def scale(factor: Any, tree: Tree) -> Tree:
    return jax.tree.map(lambda x: (factor * widen(x)).astype(x.dtype), tree)


def nan_like(x: jax.Array) -> jax.Array:
    """NaNs shaped like x, for unknown values.

    Outside of a trace they are made by NumPy, since `jax_debug_nans` would stop a JAX operation.
    """
    if isinstance(x, jax.core.Tracer):
        return jnp.full_like(x, jnp.nan)
    return jax.device_put(np.full(x.shape, np.nan, x.dtype))


def total(tree: Tree) -> jax.Array:
    """The sum over all entries of all leaves."""
    return sum((jnp.sum(widen(x)) for x in jax.tree.leaves(tree)), jnp.zeros((), jnp.float32))


@_at_once
def dot(a: Tree, b: Tree) -> jax.Array:
    """<a, b> over the whole tree, as sums of products: `vdot` does not allow sharded leaves."""
    return total(jax.tree.map(lambda x, y: widen(x) * widen(y), a, b))


@jax.custom_jvp
@_at_once
def norm(tree: Tree) -> jax.Array:
    """‖a‖₂ over the whole tree, with derivative 0 at 0, without overflow or underflow of squares.

    A sum of squares outside the range of floats is repeated with scaled entries, in a branch that
    costs nothing where it is not taken. Devices that hold shards of one tree take the same branch.
    """
    return _measured(tree).length


class _Measured(NamedTuple):
    """A length ‖a‖₂, and c and d with a / ‖a‖ = c a / d, however small or large a is."""

    length: jax.Array
    c: jax.Array  # a power of two near 1 / ‖a‖
    d: jax.Array  # c ‖a‖, and 1 if that is 0


def _measured(tree: Tree) -> _Measured:
    """‖a‖₂ and what divides by it.

    Numbers that a branch returns or receives are computed once. XLA computes others again in the
    program of every leaf that reads them.
    """
    squares = dot(tree, tree)
    careful = lambda tree, factor: _divisors(_scaled_norm(tree, factor))
    return _where_in_range(squares, _divisors(jnp.sqrt(squares)), careful, tree, _factor(squares))


def _divisors(length: jax.Array) -> _Measured:
    near_one = inverse(power_of_two(length))
    return _Measured(length, near_one, jnp.where(length == 0, 1, length * near_one))


def _where_in_range(
    size: jax.Array, plain: Any, careful: Callable[..., Any], *operands: Any
) -> Any:
    """`plain`, or `careful(*operands)` where a sum of products of this size left the range.

    Both are computed where a mesh of explicit axes shards the operands, since `jax.vmap` of
    `lax.cond` does not take these (JAX 0.10 to 0.12).
    """
    exponent = int(jnp.finfo(size.dtype).maxexp)
    fine = (size >= 2.0 ** (-0.55 * exponent)) & (size <= 2.0 ** (0.78 * exponent))
    otherwise = lambda plain, *operands: cast_like(careful(*operands), plain)
    if any(map(is_sharded, jax.tree.leaves(operands))):
        other = otherwise(plain, *operands)
        return jax.tree.map(lambda x, y: jnp.where(fine, x, y), plain, other)
    return lax.cond(fine, lambda plain, *operands: plain, otherwise, plain, *operands)


def _factor(squares: jax.Array) -> jax.Array:
    """A power of two by which entries are multiplied whose sum of squares left the range."""
    large = 2.0 ** (0.6 * jnp.finfo(squares.dtype).maxexp // 1)
    return jnp.where(squares < 1, large, 1 / large).astype(squares.dtype)


def _scaled_norm(tree: Tree, factor: jax.Array) -> jax.Array:
    """The norm, from squares of entries times a power of two."""
    # XLA would simplify (cx)(cx) to c²x², and c² is out of range; `minimum` prevents that.
    within = lambda x: jnp.minimum(x.astype(factor.dtype) * factor, jnp.finfo(factor.dtype).max)
    scaled = jax.tree.map(within, wide(tree))
    return jnp.sqrt(dot(scaled, scaled)) * inverse(factor)


@norm.defjvp
def _norm_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    length = norm(*primals)
    return length, dot(unit(*primals), *tangents).astype(length.dtype)


@jax.custom_jvp
@_at_once
def unit(tree: Tree) -> Tree:
    """a / ‖a‖₂ in float32 or wider, and 0 for a = 0."""
    return _over(tree, _measured(tree))


def _over(tree: Tree, by: _Measured) -> Tree:
    """a / ‖a‖ in float32 or wider."""
    return divided(scale(by.c, wide(tree)), by.d)


@unit.defjvp
def _unit_jvp(primals: Any, tangents: Any) -> tuple[Tree, Tree]:
    # ∂(a/‖a‖) = (∂a - â<â, ∂a>) / ‖a‖ contains only the first power of ‖a‖.
    length, e = norm(*primals), unit(*primals)
    across = add_scaled(wide(*tangents), -dot(e, *tangents), e)
    return e, scale(ratio(jnp.ones((), length.dtype), length), across)


def divided(tree: Tree, length: jax.Array) -> Tree:
    """a / ‖a‖ for a known length ‖a‖, with the dtypes of a; a itself for length 0."""
    length = jnp.where(length == 0, 1, length)
    return jax.tree.map(lambda x: quotient(widen(x), length).astype(x.dtype), tree)


def magnitude(tree: Tree) -> jax.Array:
    """The largest power of two <= ‖a‖₂, as `power_of_two` gives it."""
    return power_of_two(norm(tree))


@jax.custom_jvp
@_at_once
def norm_and_scale(tree: Tree) -> tuple[jax.Array, jax.Array]:
    """(`norm` of a tree, a power of two near 1 / ‖a‖ without derivative)"""
    found = _measured(tree)
    return found.length, found.c


@norm_and_scale.defjvp
def _norm_and_scale_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    length, change = _norm_jvp(primals, tangents)
    scale = norm_and_scale(*primals)[1]
    return (length, scale), (change, jnp.zeros_like(scale))


def power_of_two(length: jax.Array) -> jax.Array:
    """The largest power of two <= a length, without derivative; 1 if it is 0 or not finite.

    Division by it is exact and leaves the length in [1, 2), except at the limits of the dtype.
    """
    length = lax.stop_gradient(length)
    info = jnp.finfo(length.dtype)
    integer = jnp.dtype(f"uint{info.bits}")
    bits = lax.bitcast_convert_type(length, integer)
    below = lax.bitcast_convert_type((bits >> info.nmant) << info.nmant, length.dtype)
    fine = jnp.isfinite(length) & (length > 0)
    edge = 2.0 ** (info.maxexp - 8)
    return jnp.where(fine, jnp.clip(below, 1 / edge, edge), 1)


def inverse(power: jax.Array) -> jax.Array:
    """The reciprocal of a `power_of_two`, computed from its bits.

    A division would allow XLA to rewrite (a/b)(c/d) as ac/bd, which may overflow.
    """
    info = jnp.finfo(power.dtype)
    integer = jnp.dtype(f"uint{info.bits}")
    unit_bits = lax.bitcast_convert_type(jnp.ones((), power.dtype), integer)
    bits = unit_bits + unit_bits - lax.bitcast_convert_type(power, integer)
    return lax.bitcast_convert_type(bits, power.dtype)


@jax.custom_jvp
@_at_once
def cosine(a: Tree, b: Tree) -> jax.Array:
    """<a, b> / ‖a‖‖b‖ over the whole tree, and 0 if a or b is 0.

    The inner product is not computed from normalised vectors, so that on devices it needs no
    all-reduce after those of the norms.
    """
    return _cosine(a, b, _measured(a), _measured(b))


def _cosine(a: Tree, b: Tree, of_a: _Measured, of_b: _Measured) -> jax.Array:
    plain = ratio(ratio(dot(a, b), of_a.length), of_b.length)
    careful = lambda a, b, of_a, of_b: dot(_over(a, of_a), _over(b, of_b))
    return _where_in_range(of_a.length * of_b.length, plain, careful, a, b, of_a, of_b)


@cosine.defjvp
def _cosine_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (a, b), (da, db) = primals, tangents
    value, x, y = cosine(a, b), unit(a), unit(b)
    turned = lambda e, other, de, length: ratio(dot(add_scaled(other, -value, e), de), length)
    return value, (turned(x, y, da, norm(a)) + turned(y, x, db, norm(b))).astype(value.dtype)


@jax.custom_jvp
@_at_once
def reject(a: Tree, b: Tree) -> Tree:
    """The component of a orthogonal to b over the whole tree, a - <a, b̂> b̂."""
    of_a, of_b = _measured(a), _measured(b)
    return add_scaled(a, -_cosine(a, b, of_a, of_b) * of_a.length, _over(b, of_b))


@reject.defjvp
def _reject_jvp(primals: Any, tangents: Any) -> tuple[Tree, Tree]:
    in_parts = lambda a, b: add_scaled(a, -cosine(a, b) * norm(a), unit(b))
    return jax.jvp(in_parts, primals, tangents)


def broadcast_prefix(prefix: Tree, tree: Tree) -> Tree:
    """Expands a tree prefix: every leaf of `tree` becomes the leaf of `prefix` above it.

    Raises:
        ValueError: `prefix` is not a tree prefix of `tree`.
    """
    try:
        spread = jax.tree.map(lambda p, sub: jax.tree.map(lambda _: p, sub), prefix, tree)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "A tree of options must be a prefix of the parameters, with a value or a subtree for "
            f"each of their branches, and is {jax.tree.structure(prefix)} for parameters "
            f"{jax.tree.structure(tree)}."
        ) from error
    return spread


def require_floating(params: Tree, stage: str) -> None:
    """Raises if a stage that differentiates with respect to every leaf receives an integer leaf.

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
