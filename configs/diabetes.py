"""Adam and Gauss-Newton: a regression of the progression of diabetes, at equal steps.

Paper: Martens, New insights on the natural gradient, arXiv:1412.1193, section 8, with the damping
of its section 10; the network (10-8-1, tanh) and all settings chosen here. The data are
scikit-learn's 442 patients, standardised by the 354 of the training part, which are one batch.

Command: curvax train diabetes

Expected: with one seed Gauss-Newton reaches Adam's lowest training loss of 30 steps, 0.224, at step
8, and ends at 0.130. On the test patients both are equally good at their best, with squared errors
of 0.585 and 0.577 in units of the training part's variance; then Gauss-Newton overfits, to 0.885.
Adam's learning rate is the best of three for the test; 0.1 ends at a training loss of 0.202.

Cost: seconds on two CPU cores.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.task = "regression"
    config.model.name = "mlp"
    config.model.options.widths = (8,)
    config.data.name = "diabetes"
    config.optimizer = (
        "levenberg_marquardt(gauss_newton_matvec() | damp() | solve(cg(20)) "
        "| scale_by_learning_rate(1.0))"
    )
    config.baseline = "adam(3e-2)"
    config.train_baselines = True
    config.update(epochs=30, batch=354, log_every=1, checkpoint_every=10)
    return config
