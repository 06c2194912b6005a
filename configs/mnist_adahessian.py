"""AdaHessian beside Adam: a small ResNet on MNIST's digits, rightly labelled.

Paper: Yao et al., AdaHessian, arXiv:2006.00719, section "Image Classification", with its learning
rate, eps and betas, at a scale of our own. Every fifth step refreshes the diagonal (Table 8).

Command: curvax compare mnist_adahessian --seeds 3

Expected: Adam 91.4 % and AdaHessian 79.9 % with one seed (`curvax train mnist_adahessian
--beside=true`): at this length and learning rate AdaHessian is behind.

Cost: half a minute a run for Adam and a minute and a half for AdaHessian on two CPU cores.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults(lr=0.15)
    config.model.name = "resnet8"
    config.model.options.width = 8
    config.data.update(name="mnist", size=1000)
    config.epochs = 30
    config.optimizer = "adahessian(cosine(lr), every=5)"
    config.base = "adam(cosine(1e-3))"
    return config
