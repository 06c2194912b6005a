"""AdamW, Sophia-G and AdaHessian: a small language model on Python's own reference.

Paper: Liu et al., Sophia, arXiv:2305.14342, Algorithms 2 and 3 with its γ and betas, and Yao et
al., AdaHessian, arXiv:2006.00719, with its betas, at a small scale: a decoder-only transformer
of two layers over bytes, half of the windows of the text that comes with Python.

Command: curvax train pydoc
         (any other text: --data.name=text --data.path=FILE)

Expected: with one seed and in 400 steps AdamW predicts the test text at 2.11 nats a byte (40.1 % of
the bytes), AdaHessian at 2.36 (33.6 %) and Sophia-G at 2.50 (30.3 %): neither is better than AdamW
at this length. In trials of 200 steps AdamW's 1e-2 was the better of two learning rates, Sophia-G's
3e-3 the best of three, AdaHessian's 0.05 the better of two (2.47 against 2.40 for AdamW); at 0.15
with a warm-up of 40 steps AdaHessian reached 2.36 there; AdamW was not tried with a warm-up.

Cost: 2.4 minutes for AdamW, 2.6 for Sophia-G and 5.5 for AdaHessian on two busy CPU cores,
compilation included.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults(lr=3e-3)
    config.task = "language"
    config.model.name = "lm_tiny"
    config.data.update(name="pydoc", num_train=3200)
    config.optimizer = "sophia_g(cosine(lr))"
    config.baseline = "adamw(cosine(1e-2))"
    config.more_optimizers = ["adahessian(cosine(0.05))"]
    config.train_baselines = True
    config.update(epochs=4, batch=32, hessian_examples=0)
    return config
