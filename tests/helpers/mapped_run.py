"""Short runs on eight devices, under any parallelism: a small net with dropout and batch norm."""

from typing import Any

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from curvax import models
from curvax.devices.axes import Along
from curvax.models.convnets import synced
from curvax.training.config import defaults

DEVICES = 8
GROUPS = "per_group(m, sam_perturb(rho) | gsam_project(0.2)) | pmean_updates(axes)"


class Net(nn.Module):
    """A hidden layer; norm and dropout act on groups of examples and are left out for the rest."""

    classes: int
    norm: bool = True
    dropout: float = 0.1
    sync_over: Along | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Dense(16, use_bias=False)(x.reshape(len(x), -1))
        if self.norm:
            over = synced(self.sync_over if train else None)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, **over)(x)
        x = nn.tanh(x)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        return nn.Dense(self.classes)(x)


models.RECIPES["mapped_net"] = Net, {}


def get_config(mapping: str = "jit") -> ConfigDict:
    """The variant is a parallelism; `fsdp` is jit with sharded parameters."""
    config = defaults(lr=1e-2, rho=0.05, m=4)
    config.name = "mapped_run"
    config.model.name = "mapped_net"
    config.data.update(num_train=128, label_noise=0.25, augment=["flip()"])
    config.optimizer = f"{GROUPS} | clip_by_global_norm(1.0) | adamw(cosine(lr), eps=1e-3)"
    config.baseline = "pmean_updates(axes) | adamw(cosine(lr))"
    config.update(parallelism="jit" if mapping == "fsdp" else mapping, fsdp=mapping == "fsdp")
    config.update(batch=64, epochs=5, log_every=1, checkpoint_every=2, hessian_examples=0)
    return config


def changed(config: ConfigDict, **fields: Any) -> ConfigDict:
    config.update(fields)
    return config
