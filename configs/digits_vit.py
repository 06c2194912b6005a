"""AdamW and SAM: a small vision transformer on digits, 40 % of them wrongly labelled.

Paper: Chen et al., When Vision Transformers Outperform ResNets, arXiv:2106.01548, with the label
noise of Foret et al., SAM, arXiv:2010.01412, section 3.3, at a small scale; all settings are chosen
here.

Command: curvax compare digits_vit --seeds 3 --fair

Expected: AdamW 44.1 ± 3.3 % on the clean test images and SAM 57.2 ± 1.5 % over three seeds, largest
Hessian eigenvalue 50 against 4.2, without --fair. At learning rate 3e-4 AdamW reaches
50.1 ± 3.2 %. Held-out sweeps chose the settings, SAM's from twelve and AdamW's from three, within
each other's spread; AdamW's 3e-4 is the lowest rate tried, SAM's ρ 0.4 the largest.

Cost: half a minute a run on two CPU cores.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults(lr=2e-3, rho=0.4)
    config.model.name = "vit_tiny"
    config.model.options.update(depth=2, scan=False)
    config.data.update(name="digits", num_train=512, label_noise=0.4)
    config.optimizer = "sam_perturb(rho) | adamw(cosine(lr))"
    config.baseline = "adamw(cosine(lr))"
    config.checkpoint_every = 80
    return config
