"""K-FAC with and without SAM on handwritten digits, 40 % of them wrongly labelled.

Paper: Martens & Grosse, K-FAC, arXiv:1503.05671, and Foret et al., SAM, arXiv:2010.01412, with the
label noise of its section 3.3: the network and the data of `digits`. The factors are those of the
clean parameters, the gradient is that of the perturbed ones. The learning rate is that of a sweep
without wrong labels (tests/evidence/methods_on_digits.md); damping and ρ are the best of three
settings tried.

Command: curvax train digits_kfac

Expected: with one seed K-FAC learns all of the wrong labels and classifies 58.5 % of the clean test
images correctly, with SAM 47 % of them and 75.3 %. With a damping of 0.03 and ρ = 0.2 both learn
all of them (54.8 and 59.7 %).

Cost: two minutes a run on two busy CPU cores.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults(lr=0.03, damping=0.3, rho=0.4)
    config.model.name = "mixer_tiny"
    config.model.options.update(depth=2, scan=False)
    config.data.update(name="digits", num_train=512, label_noise=0.4)
    method = "kfac(like, cosine(lr), damping=damping, momentum=0.9, mean_over=axes)"
    config.optimizer = f"sam_perturb(rho) | {method}"
    config.baseline = method
    config.train_baselines = True
    config.checkpoint_every = 80
    return config
