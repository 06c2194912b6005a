"""Base optimiser, schedule and loss of the recorded runs of SAM and GSAM."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from curvax import pipe, rho_schedule


def momentum_sgd(hyper, learning_rate):
    """PyTorch's SGD, whose weight decay sees the restored weights."""
    return pipe(
        optax.add_decayed_weights(hyper.get("weight_decay", 0.0)),
        optax.sgd(learning_rate, hyper.get("momentum"), nesterov=hyper.get("nesterov", False)),
    )


def scheduled_rho(hyper, lr, lr_max):
    """ρ of each step by `rho_schedule`, from the recorded learning rates."""
    bounds = {"lr_max": lr_max, "lr_min": hyper["lr_min"]}
    schedule = rho_schedule(lambda t: lr[t], hyper["rho_max"], hyper["rho_min"], **bounds)
    return np.stack([schedule(t) for t in range(len(lr))])


def google_loss(run):
    """Cross-entropy and ½ λ ‖θ‖², so that weight decay moves the ascent too."""
    hyper = run.hyper

    def loss(params, batch):
        with jax.numpy_rank_promotion("allow"):
            logits = run.problem.logits(params, batch)
        labels = jax.nn.one_hot(batch["Y"], logits.shape[-1], dtype=logits.dtype)
        labels = optax.smooth_labels(labels, hyper["label_smoothing"])
        sizes = [
            jnp.sum(x**2)
            for x in jax.tree.leaves(params)
            if x.ndim > 1 or not hyper["no_weight_decay_on_bn"]
        ]
        entropy = jnp.mean(optax.softmax_cross_entropy(logits, labels))
        return entropy + 0.5 * hyper["l2_reg"] * sum(sizes)

    return loss
