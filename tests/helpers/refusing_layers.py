"""Layers whose second derivatives JAX refuses: kernels, an implicit layer, a callback."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl


def call(kernel: Any, *xs: jax.Array) -> jax.Array:
    shape = jax.ShapeDtypeStruct(xs[0].shape, xs[0].dtype)
    return pl.pallas_call(kernel, out_shape=shape, interpret=True)(*xs)


def forward_kernel(x: Any, out: Any) -> None:
    out[...] = jnp.tanh(x[...])


def backward_kernel(y: Any, g: Any, out: Any) -> None:
    out[...] = g[...] * (1 - y[...] ** 2)


def halving_kernel(x: Any, out: Any) -> None:
    @pl.when(x[0, 0] > 0)
    def _() -> None:
        out[...] = x[...].astype(jnp.bfloat16).astype(out.dtype)


@jax.custom_vjp
def kernel(x: jax.Array) -> jax.Array:
    """tanh by a kernel whose backward pass is one: JAX pushes vectors through it alone."""
    return call(forward_kernel, x)


def kernel_forward(x: jax.Array) -> Any:
    y = call(forward_kernel, x)
    return y, y


kernel.defvjp(kernel_forward, lambda y, g: (call(backward_kernel, y, g),))


def masked_kernel(x: Any, mask: Any, out: Any) -> None:
    out[...] = jnp.tanh(x[...]) * mask[...]


def masked_backward(x: Any, mask: Any, g: Any, out: Any) -> None:
    out[...] = g[...] * mask[...] * (1 - jnp.tanh(x[...]) ** 2)


@jax.custom_vjp
def masked(x: jax.Array) -> jax.Array:
    """tanh by a kernel with a constant operand: its derivative is traced, but cannot be lowered."""
    return call(masked_kernel, x, jnp.ones_like(x))


masked.defvjp(
    lambda x: (call(masked_kernel, x, jnp.ones_like(x)), x),
    lambda x, g: (call(masked_backward, x, jnp.ones_like(x), g),),
)


def settled(f: Callable[[jax.Array], jax.Array], z: jax.Array) -> jax.Array:
    go = lambda c: (jnp.max(jnp.abs(c[1] - c[0])) > 1e-13) & (c[2] < 90)
    step = lambda c: (c[1], f(c[1]), c[2] + 1)
    return jax.lax.while_loop(go, step, (z, f(z), 0))[1]


def layer(w: jax.Array, x: jax.Array, z: jax.Array) -> jax.Array:
    return jnp.tanh(0.3 * z @ w + x)


@jax.custom_vjp
def fixed_point(w: jax.Array, x: jax.Array) -> jax.Array:
    return settled(lambda z: layer(w, x, z), jnp.zeros_like(x))


def fixed_forward(w: jax.Array, x: jax.Array) -> Any:
    z = fixed_point(w, x)
    return z, (w, x, z)


def fixed_backward(saved: Any, cotangent: jax.Array) -> Any:
    w, x, z = saved
    pull = jax.vjp(lambda z: layer(w, x, z), z)[1]
    u = settled(lambda u: cotangent + pull(u)[0], jnp.zeros_like(cotangent))
    return jax.vjp(lambda w, x: layer(w, x, z), w, x)[1](u)


fixed_point.defvjp(fixed_forward, fixed_backward)


def unrolled(w: jax.Array, x: jax.Array) -> jax.Array:
    z = jnp.zeros_like(x)
    for _ in range(40):
        z = layer(w, x, z)
    return z


def host(f: Callable[..., Any], *xs: jax.Array) -> jax.Array:
    shape = jax.ShapeDtypeStruct(xs[0].shape, xs[0].dtype)
    return jax.pure_callback(f, shape, *xs, vmap_method="expand_dims")


@jax.custom_vjp
def on_host(x: jax.Array) -> jax.Array:
    """tanh outside of JAX: no derivative but the one that is given."""
    return host(np.tanh, x)


on_host.defvjp(
    lambda x: (on_host(x), x), lambda x, g: (host(lambda x, g: g * (1 - np.tanh(x) ** 2), x, g),)
)
