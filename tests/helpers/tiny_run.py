"""A run of seconds whose checkpoints hold momentum, dropout keys, augmentation and diagnostics."""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults(lr=1e-2, rho=0.05)
    config.name = "tiny_run"
    config.model.name = "mixer_tiny"
    config.model.options.update(
        depth=1, scan=False, width=8, token_width=4, channel_width=8, dropout=0.1
    )
    config.data.update(num_train=64, label_noise=0.25, augment=["shift_crop(1)"])
    config.optimizer = "sam_perturb(rho) | gsam_project(0.2) | adamw(cosine(lr))"
    config.baseline = "adamw(cosine(lr))"
    config.update(
        devices=1, batch=16, epochs=3, log_every=1, checkpoint_every=3, hessian_examples=16
    )
    return config
