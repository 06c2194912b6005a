"""SOAP, Muon, AdamW, K-FAC and others: a small language model on Python's own reference.

Paper: Vyas et al., SOAP, arXiv:2409.11321, Muon as in Optax, Liu et al., Sophia, arXiv:2305.14342,
Algorithms 2 and 3 with its γ and betas, and Yao et al., AdaHessian, arXiv:2006.00719, with its
betas, at a small scale: a decoder-only transformer of two layers over bytes, half of the windows of
the text that comes with Python.

Command: curvax train pydoc
         (any other text: --data.name=text --data.path=FILE)

Expected: over three seeds in 400 steps, with a warm-up of 40, SOAP predicts the test text at 1.429
nats a byte, Muon at 1.473, AdaHessian (0.15) at 2.05, K-FAC at 2.24 and AdamW at 2.25
(tests/evidence/methods_on_pydoc.md). Without a warm-up and with one seed AdamW reaches 2.11
(40.1 % of the bytes), AdaHessian (0.05) 2.36 (33.6 %) and Sophia-G 2.50 (30.3 %).

Cost: on two idle CPU cores 0.06 seconds a step for SOAP, Muon and AdamW, 0.07 for Sophia-G, 0.12
for AdaHessian and 0.17 for K-FAC, compilation apart.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults(lr=3e-2)
    config.task = "language"
    config.model.name = "lm_tiny"
    config.data.update(name="pydoc", num_train=3200)
    config.optimizer = "soap(cosine(lr, warmup=40), 0.9, layout=layout)"
    config.baseline = (
        "muon(cosine(lr, warmup=40), muon_weight_dimension_numbers=matrix_axes(layout))"
    )
    config.more_optimizers = [
        "adamw(cosine(1e-2))",
        "kfac(like, cosine(0.3, warmup=40), damping=0.3, momentum=0.9, inverses_every=5, "
        "mean_over=axes)",
        "sophia_g(cosine(3e-3))",
        "adahessian(cosine(0.05))",
    ]
    config.train_baselines = True
    config.update(epochs=4, batch=32, hessian_examples=0)
    return config
