"""Programs whose layers are a scan, unrolled or not."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

WIDTH, DEPTH = 64, 5


def layers(x, weights, *, unroll):
    layer = lambda h, w: (jnp.tanh(h @ w), None)
    return lax.scan(layer, x, weights, unroll=unroll)[0]


def nested(x, weights, *, unroll):
    """Each layer three times, in a scan in a scan."""

    def outer(h, w):
        return lax.scan(lambda h, _: (jnp.tanh(h @ w), None), h, length=3, unroll=unroll)[0], None

    return lax.scan(outer, x, weights, unroll=unroll)[0]


def convolutions(x, kernels, *, unroll):
    names = ("NHWC", "HWIO", "NHWC")
    convolve = functools.partial(
        lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=names
    )
    layer = lambda h, k: (jax.nn.relu(convolve(h, k)), None)
    return lax.scan(layer, x, kernels, unroll=unroll)[0]


def gradient(f):
    return lambda x, w, **options: jax.grad(lambda x, w: jnp.sum(f(x, w, **options)), (0, 1))(x, w)


MATRICES = (32, WIDTH), (DEPTH, WIDTH, WIDTH)


IMAGES = (4, 10, 12, 8), (DEPTH, 3, 5, 8, 8)


LOOPS = {
    "matrix products": (layers, MATRICES),
    "matrix products, a scan in a scan": (nested, MATRICES),
    "convolutions": (convolutions, IMAGES),
    "gradient of matrix products": (gradient(layers), MATRICES),
    "gradient of a scan in a scan": (gradient(nested), MATRICES),
    "gradient of convolutions": (gradient(convolutions), IMAGES),
}
