"""Entropy-SGD on handwritten digits, 40 % of them wrongly labelled, beside SGD in as many epochs.

Paper: Chaudhari et al., Entropy-SGD, arXiv:1611.01838, on the network and the data of `digits`.
Each step has five inner steps on its batch, so that twelve epochs cost the gradients of sixty. L is
chosen here, and both rates are the best of three on held-out images; scope, noise and average are
those of the authors' code.

Command: curvax compare digits_entropy --seeds 3
         (SGD at as many gradients: curvax train digits_entropy --epochs=60 --lr=0.01
         --optimizer="sgd(lr, momentum=0.9, nesterov=True)")

Expected: over three seeds Entropy-SGD classifies 71.4 ± 6.2 % of the clean test images correctly,
SGD in as many epochs 74.1 ± 4.1 %, for a fifth of the gradients, and SGD at as many gradients 55.6
± 6.5 %, since it learns the wrong labels (tests/evidence/entropy_sgd.md).

Cost: about ten seconds a run on two idle CPU cores, compilation apart.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults(scope=1e-4, rate=0.03, lr=0.03)
    config.model.name = "mixer_tiny"
    config.model.options.update(depth=2, scan=False)
    config.data.update(name="digits", num_train=512, label_noise=0.4)
    config.epochs = 12
    config.optimizer = "entropy_sgd(sgd(1.0), scope, steps=5, rate=rate, mean_over=axes)"
    config.baseline = "sgd(lr, momentum=0.9, nesterov=True)"
    config.train_baselines = True
    return config
