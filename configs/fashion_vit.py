"""AdamW and SAM: a small vision transformer on Fashion-MNIST with 40 % wrong labels.

Paper: Foret et al., SAM, arXiv:2010.01412: its label noise (section 3.3) on one of its data sets
(appendix B.1), at a small scale; all settings are chosen here. The images are read from the IDX
files of Debian's package dataset-fashion-mnist, or from --data.path=FOLDER.

Command: curvax compare fashion_vit --seeds 3 --fair

Expected: AdamW 40.8 % and SAM 54.8 %, largest Hessian eigenvalue 42.1 against 7.6, with one seed
(`curvax train fashion_vit --train_baselines=true`).

Cost: under a minute a run on two CPU cores.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults(lr=0.001, rho=0.3)
    config.model.name = "vit_tiny"
    config.model.options.update(depth=2, scan=False, patch=7)
    config.data.update(name="fashion_mnist", num_train=512, label_noise=0.4)
    config.optimizer = "sam_perturb(rho) | adamw(cosine(lr))"
    config.baseline = "adamw(cosine(lr))"
    config.update(test_every=5, checkpoint_every=80)
    return config
