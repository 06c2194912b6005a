"""FLOPs and memory of compiled steps of several models, by shapes alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
import quick_jax

import curvax as cx

flax = pytest.importorskip("flax", reason="the models are Flax's: pip install 'curvax[flax]'")
from flax import linen as nn  # noqa: E402

from curvax.models import build  # noqa: E402
from curvax.planning import flops, hlo  # noqa: E402

VIT: dict[str, Any] = dict(
    classes=10, width=192, depth=4, heads=3, mlp_width=768, patch=4, dropout=0.0
)


class Perceptron(nn.Module):
    """784-512×3-10."""

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.relu(nn.Dense(512)(x))
        return nn.Dense(10)(x)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.gelu(nn.Dense(512)(nn.LayerNorm()(x))), None


class Scanned(nn.Module):
    """Four residual layers in a scan, unrolled for the count: XLA counts a loop's body once."""

    @nn.compact
    def __call__(self, x):
        axes: Any = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(Layer, length=4, unroll=4, **axes)()(nn.Dense(512)(x), None)
        return nn.Dense(10)(x)


MODELS = {
    "MLP 784-512×3-10": (Perceptron, (256, 784)),
    "4×512 layers, scanned": (Scanned, (256, 784)),
    "ViT 4×192": (lambda: build("vit_tiny", scan=False, **VIT), (64, 32, 32, 3)),
    "ViT 4×192, remat": (lambda: build("vit_tiny", scan=False, remat=True, **VIT), (64, 32, 32, 3)),
    "ResNet-20, group norm": (lambda: build("resnet20", classes=10, norm="group"), (64, 32, 32, 3)),
}


SMALL, LARGE = list(MODELS)[:2], list(MODELS)[2:]


EVERY_MODEL = pytest.mark.parametrize(
    "name", [*SMALL, *(pytest.param(name, marks=pytest.mark.evidence) for name in LARGE)]
)


class Problem:
    """A model's loss over a batch, as shapes only: nothing here is ever run."""

    def __init__(self, name):
        make, shape = MODELS[name]
        model = make()
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        y = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
        self.batch = (x, y)
        self.params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
        self.bytes = sum(p.size * p.dtype.itemsize for p in jax.tree.leaves(self.params))
        self.apply = lambda params, x: model.apply({"params": params}, x)

    def loss(self, params, batch):
        logits = self.apply(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def count(self, f, *args, loops=False):
        """(FLOPs, temporary bytes) of a compiled function; with every iteration if `loops`."""
        # Less work for the code generator; what is counted is settled before it.
        options: Any = {"xla_backend_optimization_level": "0", **quick_jax.AS_USERS}
        compiled = jax.jit(f).lower(*args).compile(compiler_options=options)
        costs: Any = compiled.cost_analysis()
        memory: Any = compiled.memory_analysis()
        whole = flops.count(compiled, hlo.read(compiled)) if loops else costs["flops"]
        return whole, memory.temp_size_in_bytes

    @functools.cached_property
    def gradient(self):
        f = lambda params, batch: cx.Objective(self.loss, batch).value_and_grad(params)
        return self.count(f, self.params, self.batch)

    @functools.cached_property
    def bare_product(self):
        """jvp of value_and_grad, written by hand."""

        def f(params, z, batch):
            both = jax.value_and_grad(lambda p: self.loss(p, batch))
            return jax.jvp(both, (params,), (z,))

        return self.count(f, self.params, self.params, self.batch)

    def step(self, tx, *, plain=False, keep_loss=False, at=None):
        def f(params, state, batch):
            if at is not None:
                state = (state[0]._replace(step=jnp.int32(at)), *state[1:])
            objective: Any = cx.Objective(self.loss, batch)
            if plain:
                objective = lambda p: self.loss(p, batch)
                loss, grads = jax.value_and_grad(objective)(params)
            else:
                loss, grads = objective.value_and_grad(params)
            updates, state = tx.update(grads, state, params, value_fn=objective)
            return (updates, state, loss) if keep_loss else (updates, state)

        return self.count(f, self.params, jax.eval_shape(tx.init, self.params), self.batch)


def ratio(counted, base):
    return counted[0] / base[0]
