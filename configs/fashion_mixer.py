"""AdamW and SAM: a small MLP-Mixer on Fashion-MNIST with 40 % wrong labels.

Paper: Foret et al., SAM, arXiv:2010.01412: its label noise (section 3.3) on one of its data sets
(appendix B.1), at a small scale; all settings are chosen here. The images are read from the IDX
files of Debian's package dataset-fashion-mnist, or from --data.path=FOLDER.

Command: curvax compare fashion_mixer --seeds 3 --fair

Expected: AdamW 44.6 % and SAM 59.2 %, largest Hessian eigenvalue 96.4 against 11.5, with one seed
(`curvax train fashion_mixer --train_baselines=true`).

Cost: about a minute a run on two CPU cores.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults(lr=0.001, rho=0.2)
    config.model.name = "mixer_tiny"
    config.model.options.update(depth=2, scan=False, patch=7)
    config.data.update(name="fashion_mnist", num_train=512, label_noise=0.4)
    config.optimizer = "sam_perturb(rho) | adamw(cosine(lr))"
    config.baseline = "adamw(cosine(lr))"
    config.update(test_every=5, checkpoint_every=80)
    return config
