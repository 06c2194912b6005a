"""SAM, two cheaper ascents and SAF on handwritten digits, 40 % of them wrongly labelled.

Paper: Foret et al., SAM, arXiv:2010.01412, with the label noise of its section 3.3, and Becker et
al., Momentum-SAM, arXiv:2401.12033: the network and the data of `digits`. The first pipe ascends
along an average of earlier gradients, for one gradient a step; the second on a quarter of the
batch, for one and a quarter; the third is SAM, for two; the fourth has the trajectory loss of Du et
al., arXiv:2205.14083, for one.

Command: curvax compare digits_cheap --seeds 5
         (at equal time: --budget 10)

Expected: over five seeds AdamW classifies 74.0 ± 3.2 % of the clean test images correctly, the
first pipe 78.5 ± 2.7 %, the second 82.7 ± 1.2 %, SAM 82.7 ± 1.7 % and SAF 81.1 ± 3.9 %, with
largest Hessian eigenvalues of 74, 5.6, 3.5, 3.6 and 4.9 (tests/evidence/cheap_sharpness_mixer.md).
Each has the ρ or λ that was best of three on held-out images.

Cost: a step takes 0.96, 1.28, 1.72 and 1.12 times as long as one of AdamW; about ten seconds a run
on two idle CPU cores, compilation apart.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults(lr=1e-3, base_lr=5e-4)
    config.model.name = "mixer_tiny"
    config.model.options.update(depth=2, scan=False)
    config.data.update(name="digits", num_train=512, label_noise=0.4)
    adamw = "adamw(cosine(lr))"
    config.optimizer = f"sam_perturb(0.2, ascent=momentum(0.9), sync_over=axes) | {adamw}"
    config.baseline = "adamw(cosine(base_lr))"
    config.more_optimizers = [
        f"sam_perturb(0.4, fraction=0.25) | {adamw}",
        f"sam_perturb(0.3) | {adamw}",
        f"trajectory_loss(examples, outputs, strength=10.0, sync_over=axes) | {adamw}",
    ]
    config.train_baselines = True
    config.checkpoint_every = 80
    return config
