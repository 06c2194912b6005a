"""K-FAC with and without SAM on handwritten digits, 40 % of them wrongly labelled.

Paper: Martens & Grosse, K-FAC, arXiv:1503.05671, and Foret et al., SAM, arXiv:2010.01412, with the
label noise of its section 3.3: the network and the data of `digits`. The factors are those of the
clean parameters, the gradient is that of the perturbed ones. Learning rate and damping are those of
a sweep without wrong labels (tests/evidence/methods_on_digits.md), ρ is that of `digits`.

Command: curvax train digits_kfac

Expected: EXPECTED

Cost: COST
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults(lr=0.03, damping=0.03, rho=0.2)
    config.model.name = "mixer_tiny"
    config.model.options.update(depth=2, scan=False)
    config.data.update(name="digits", num_train=512, label_noise=0.4)
    method = "kfac(like, cosine(lr), damping=damping, momentum=0.9, mean_over=axes)"
    config.optimizer = f"sam_perturb(rho) | {method}"
    config.baseline = method
    config.train_baselines = True
    config.checkpoint_every = 80
    return config
