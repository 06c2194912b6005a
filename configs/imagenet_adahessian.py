"""SGD and AdaHessian: ResNet-18 on ImageNet.

Paper: Yao et al., AdaHessian, arXiv:2006.00719, Table 2; learning rate 0.15, eps, betas and a
weight decay that is divided by the learning rate are those of the authors' code for ResNet-20 and
32 on CIFAR-10 (amirgholami/adahessian). Not in the text and chosen here: batch 256, 90 epochs with
a tenth of the rate after 30 and 60, decay 1e-4, crops of 8 to 100 % of the area and flips,
activations in bf16.

Command: curvax compare imagenet_adahessian --data.path=records/imagenet
         (on a pod with --distributed)

Expected: AdaHessian 70.08 and SGD 70.03 % in the paper. Not run here.

Cost: three gradients a step for AdaHessian; an epoch has 5004 steps.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults(lr=0.15)
    config.model.name = "resnet18"
    config.model.options.dtype = "bfloat16"
    config.data.update(name="imagenet", crop_area=(0.08, 1.0), augment=["flip()"])
    config.optimizer = (
        "adahessian(step_decay(lr, at=[0.3333, 0.6667]), weight_decay=6.7e-4, mean_over=axes)"
    )
    config.baseline = (
        "pmean_updates(axes) | add_decayed_weights(1e-4)"
        " | sgd(step_decay(0.1, at=[0.3333, 0.6667]), momentum=0.9)"
    )
    config.update(parallelism="shard_map", batch=256, eval_batch=256, epochs=90)
    config.update(log_every=50, hessian_examples=0)
    return config
