"""Adversarial training with AdamW and with SAM on handwritten digits.

Paper: Chen et al., When Vision Transformers Outperform ResNets, arXiv:2106.01548, section 5.4 and
eq. 5, at a small scale: an MLP-Mixer of two blocks on 512 training images. Images are attacked by
one step from a random start (Wong et al., arXiv:2001.03994) within |δ| ≤ 0.1 per pixel; rates and ρ
are chosen here.

Command: curvax train digits_adversarial
         curvax evaluate runs/digits_adversarial-... --attack "pgd(0.1, steps=10)"
         (without adversarial training --attack=none)

Expected: over five seeds AdamW classifies 97.4 ± 0.5 % of the test images correctly and SAM
96.6 ± 0.5 %; under PGD-10 68.7 ± 3.3 % and 72.0 ± 2.4 %. Without adversarial training it is 93.9
and 94.7 %, under PGD-10 9.1 and 13.2 % (tests/evidence/adversarial_digits.md).

Cost: a minute on two busy CPU cores, half of it compilation.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults(lr=2e-3, rho=0.2)
    config.model.name = "mixer_tiny"
    config.model.options.update(depth=2, scan=False)
    config.data.update(name="digits", num_train=512)
    config.attack = "pgd(0.1, steps=1)"
    config.optimizer = "sam_perturb(rho) | adamw(cosine(lr))"
    config.baseline = "adamw(cosine(lr))"
    config.train_baselines = True
    config.checkpoint_every = 80
    return config
