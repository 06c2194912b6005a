"""Entropy-SGD on handwritten digits, 40 % of them wrongly labelled, beside SGD in as many epochs.

Paper: Chaudhari et al., Entropy-SGD, arXiv:1611.01838, on the network and the data of `digits`.
Each step has five inner steps on its batch, so that twelve epochs cost the gradients of sixty. The
rate of the inner steps and L are chosen here; scope, noise and averages are those of the authors'
code.

Command: curvax compare digits_entropy --seeds 3
         (SGD at as many gradients: --epochs=60 --optimizers "sgd(3e-3, momentum=0.9, nesterov=True)")

Expected: @@

Cost: about ten seconds a run on two idle CPU cores, compilation apart.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults(scope=1e-4, rate=0.03, lr=0.01)
    config.model.name = "mixer_tiny"
    config.model.options.update(depth=2, scan=False)
    config.data.update(name="digits", num_train=512, label_noise=0.4)
    config.epochs = 12
    config.optimizer = "entropy_sgd(sgd(1.0), scope, steps=5, rate=rate, mean_over=axes)"
    config.baseline = "sgd(lr, momentum=0.9, nesterov=True)"
    config.train_baselines = True
    return config
