"""SAM beside AdamW: a small vision transformer on digits, 40 % of them wrongly labelled.

Paper: Chen et al., When Vision Transformers Outperform ResNets, arXiv:2106.01548, with the label
noise of Foret et al., SAM, arXiv:2010.01412, section 3.3, at a scale of our own; all settings ours.

Command: curvax compare digits_vit --seeds 3 --fair

Expected: not measured at these settings. At learning rate 1e-3 and ρ 0.3: AdamW 49.7 %, SAM
56.2 %, largest Hessian eigenvalue 241 against 3.7, with one seed.

Cost: half a minute a run on two CPU cores.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults(lr=2e-3, rho=0.4)
    config.model.name = "vit_tiny"
    config.model.options.update(depth=2, scan=False)
    config.data.update(name="digits", size=512, noise=0.4)
    config.optimizer = "sam_perturb(rho) | adamw(cosine(lr))"
    config.base = "adamw(cosine(lr))"
    config.checkpoint_every = 80
    return config
