"""Adam and AdaHessian: a small ResNet on digits with clean labels.

Paper: Yao et al., AdaHessian, arXiv:2006.00719, section "Image Classification" (there ResNet-20 on
CIFAR-10), with its learning rate, eps and betas, at a small scale.

Command: curvax compare digits_adahessian --seeds 3

Expected: Adam 96.4 % and AdaHessian 96.6 % with one seed (`curvax train digits_adahessian
--train_baselines=true`).

Cost: a quarter of a minute a run for Adam and a minute and a half for AdaHessian on two CPU cores.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults(lr=0.15)
    config.model.name = "resnet8"
    config.data.update(name="digits", num_train=512)
    config.optimizer = "adahessian(cosine(lr))"
    config.baseline = "adam(cosine(1e-3))"
    config.checkpoint_every = 80
    return config
