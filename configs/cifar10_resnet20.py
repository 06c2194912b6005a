"""SGD and AdaHessian: ResNet-20 on CIFAR-10.

Paper: Yao et al., AdaHessian, arXiv:2006.00719, Table 2; learning rate, eps, betas and a weight
decay that is divided by the learning rate are those of the authors' code
(amirgholami/adahessian). Batch, epochs, decay, schedule and augmentation are not in its text and
chosen here.

Command: curvax compare cifar10_resnet20 --seeds 5 --data.path=cifar-10-python.tar.gz
         (and with --model.name=resnet32)

Expected: AdaHessian 92.13 ± .18 and SGD 92.08 ± .08 % in the paper; ResNet-32 93.08 ± .10 and
93.14 ± .10 %. Not run here.

Cost: on one GPU about an hour for each run of AdaHessian, a third of that for SGD; an estimate.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.model.name = "resnet20"
    config.data.update(name="cifar10", augment=["shift_crop(4, 'constant')", "flip()"])
    config.optimizer = (
        "adahessian(step_decay(0.15), weight_decay=3.3e-3, mean_over=axes)"  # 5e-4 / 0.15
    )
    config.baseline = (
        "pmean_updates(axes) | add_decayed_weights(5e-4) | sgd(step_decay(0.1), momentum=0.9)"
    )
    config.update(epochs=160, batch=256, log_every=50)
    return config
