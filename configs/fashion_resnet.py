"""SGD with momentum and SAM: a small ResNet on Fashion-MNIST with 40 % wrong labels.

Paper: Foret et al., SAM, arXiv:2010.01412: its label noise (section 3.3) on one of its data sets
(appendix B.1), at a small scale; all settings are chosen here. The images are read from the IDX
files of Debian's package dataset-fashion-mnist, or from --data.path=FOLDER.

Command: curvax compare fashion_resnet --seeds 3 --fair

Expected: SGD 60.5 % and SAM 59.8 %, largest Hessian eigenvalue 893 against 49, with one seed
(`curvax train fashion_resnet --train_baselines=true`): in these 480 steps SGD fits only a fifth of
the wrong labels, so that SAM ends flatter but not more accurate.

Cost: under a minute a run on two CPU cores.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults(lr=0.01, rho=0.2)
    config.model.name = "resnet8"
    config.model.options.width = 8
    config.data.update(name="fashion_mnist", num_train=512, label_noise=0.4)
    config.optimizer = "sam_perturb(rho) | sgd(cosine(lr), momentum=0.9)"
    config.baseline = "sgd(cosine(lr), momentum=0.9)"
    config.update(test_every=5, checkpoint_every=80)
    return config
