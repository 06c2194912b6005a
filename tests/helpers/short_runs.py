"""Short runs of one small config, and the comparison of their states."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny_run

from curvax.training.compare import comparison

CONFIG = tiny_run.get_config()


def changed(**fields):
    return comparison.replace(CONFIG, **fields)


def assert_same_bits(state, expected):
    bits = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), state, expected)
