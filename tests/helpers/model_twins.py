"""Models with random variables, and the layers of their naive twins."""

import jax
import jax.numpy as jnp
import numpy as np


def random_variables(model, x):
    """Float64 variables with every parameter drawn, as heads and some norms start trivial."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    rng = np.random.default_rng(1)
    draw = lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape))
    stat = lambda path, leaf: jnp.full(leaf.shape, float(path[-1].key == "var"))
    stats = jax.tree_util.tree_map_with_path(stat, shapes.get("batch_stats", {}))
    params = jax.tree.map(draw, shapes["params"])
    return {"params": params, "batch_stats": stats} if stats else {"params": params}


def run(model, variables, x, **options):
    """One jitted call: eager ones compile each operation by itself."""
    return jax.jit(lambda variables, x: model.apply(variables, x, **options))(variables, x)


def with_statistics(variables):
    """The variables with drawn running statistics, which are 0 and 1 at the start."""
    rng = np.random.default_rng(2)
    draw = {
        "mean": lambda x: rng.normal(size=x.shape),
        "var": lambda x: rng.uniform(0.2, 1, x.shape),
    }
    drawn = lambda path, x: jnp.asarray(draw[path[-1].key](x))
    stats = jax.tree_util.tree_map_with_path(drawn, variables["batch_stats"])
    return {**variables, "batch_stats": stats}


class Layers:
    """Convolutions and batch norms written out, by the path of their parameters."""

    def __init__(self, variables, train, epsilon):
        self.params, self.stats = variables["params"], variables["batch_stats"]
        self.train, self.epsilon = train, epsilon

    def get(self, at, tree=None):
        tree = self.params if tree is None else tree
        for name in at.split("/"):
            tree = tree[name]
        return tree

    def conv(self, x, at, stride=1):
        return jax.lax.conv_general_dilated(
            x,
            self.get(at)["kernel"],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def norm(self, x, at):
        layer, old = self.get(at), self.get(at, self.stats)
        mean, var = (along(old[name], x) for name in ("mean", "var"))
        if self.train:
            mean = x.mean((0, 1, 2), keepdims=True)
            var = ((x - mean) ** 2).mean((0, 1, 2), keepdims=True)
        scale, bias = (along(layer[name], x) for name in ("scale", "bias"))
        return (x - mean) / jnp.sqrt(var + self.epsilon) * scale + bias

    def dense(self, x, at):
        layer = self.get(at)
        return x @ layer["kernel"] + along(layer["bias"], x)


def along(vector, x):
    """A vector [C] along the last axis of x."""
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))
