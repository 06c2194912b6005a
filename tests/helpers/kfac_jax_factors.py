"""The Kronecker factors that kfac-jax computes for a small convolutional network.

    python kfac_jax_factors.py > kfac_jax_factors.json

with kfac-jax 0.0.8 and jax 0.9.0, in a process of its own since newer versions of JAX fail with it.
The file holds [A, G] of each kernel with its bias joined, G times the scale of the block, by
"Fisher matrix, layer".
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MODES = {"empirical": "fisher_empirical", "exact": "fisher_exact"}
"""By the name of the Fisher matrix here: the estimation mode of kfac-jax."""


def problem() -> tuple[Any, Any]:
    """(parameters, batch) of six examples in float64."""
    draws = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(draws.normal(size=shape) / 2)
    params = {
        "conv": {"w": normal(2, 2, 2, 3), "b": normal(3)},
        "hidden": {"w": normal(3, 5), "b": normal(5)},
        "out": {"w": normal(5, 4), "b": normal(4)},
    }
    return params, {"x": normal(6, 4, 4, 2), "label": jnp.asarray(draws.integers(0, 4, 6))}


def predict(params: Any, batch: Any) -> jax.Array:
    """Logits [6, 4] of a convolution, a mean over places, and two dense layers."""
    h = jax.lax.conv_general_dilated(
        batch["x"], params["conv"]["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    h = jnp.mean(jnp.tanh(h + params["conv"]["b"][None, None, None]), axis=(1, 2))
    h = jnp.tanh(h @ params["hidden"]["w"] + params["hidden"]["b"][None])
    return h @ params["out"]["w"] + params["out"]["b"][None]


def main() -> None:
    import kfac_jax

    def loss(params: Any, batch: Any) -> jax.Array:
        z = predict(params, batch)
        kfac_jax.register_softmax_cross_entropy_loss(z, batch["label"])
        return -jnp.mean(jax.nn.log_softmax(z)[jnp.arange(len(z)), batch["label"]])

    args = problem()
    found: dict[str, Any] = {}
    for name, mode in MODES.items():
        estimator = kfac_jax.BlockDiagonalCurvature(loss, default_estimation_mode=mode)
        key = jax.random.key(0)
        estimator.finalize(args)
        state = estimator.init(key, args, (), (), cache_eigenvalues=False)
        state = estimator.update_curvature_matrix_estimate(
            state, 0.0, 1.0, 0.0, len(args[1]["x"]), key, args
        )
        layers = {block["w"]: layer for layer, block in estimator.params_block_index.items()}
        for k, (block, own) in enumerate(zip(estimator.blocks, state.blocks_states)):
            inputs, outputs = (np.asarray(factor.value) for factor in own.factors)
            scaled = outputs * float(block.scale(own, False))
            found[f"{name} {layers[k]}"] = [inputs.tolist(), scaled.tolist()]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
