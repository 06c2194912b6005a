"""SGD, SAM and GSAM: ResNet-50, 101 or 152 on ImageNet.

Paper: Foret et al., SAM, arXiv:2010.01412, section 3.1 and Table 2: batch 4096, learning rate 1.0
along a cosine, momentum 0.9, weight decay 1e-4, ρ = 0.05, 100, 200 or 400 epochs, on 32 cores, each
of which perturbs on its own 128 examples (m). GSAM on ResNets is in Table 1 of Zhuang et al., GSAM,
arXiv:2203.08065. Not in the texts and chosen here: no warm-up, crops of 8 to 100 % of the area and
flips, activations in bf16, decay of all parameters and after the ascent, GSAM's α, and its ρ, held
at SAM's.

Command: curvax compare imagenet_resnet:50 --data.path=records/imagenet
         (imagenet_resnet:101 and :152; --epochs=200 and 400; on a pod with --distributed)

Expected: top-1 errors of ResNet-50, 101 and 152 in 100 epochs 22.5, 20.2 and 19.2 % with SAM and
22.9, 21.2 and 20.4 % with SGD; in 400 epochs 20.9, 19.0 and 18.4 against 22.3, 22.3 and 20.9 %. In
GSAM's own setting GSAM is ahead of SAM by 0.3, 0.3 and 0.7 points. Not run here.

Cost: tests/evidence/plans.md has what a device of two TPU topologies needs for a step of
ResNet-152; an epoch has 312 steps.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config(depth: str = "50") -> ConfigDict:
    config = defaults(lr=1.0, rho=0.05, alpha=0.2, m=128)
    config.model.name = f"resnet{depth}"
    config.model.options.dtype = "bfloat16"
    config.data.update(name="imagenet", crop_area=(0.08, 1.0), augment=["flip()"])
    base = "pmean_updates(axes) | add_decayed_weights(1e-4) | sgd(cosine(lr), momentum=0.9)"
    config.baseline = base
    config.optimizer = f"per_group(m, sam_perturb(rho)) | {base}"
    config.more_optimizers = [f"per_group(m, sam_perturb(rho) | gsam_project(alpha)) | {base}"]
    config.update(parallelism="shard_map", batch=4096, eval_batch=4096, epochs=100, test_every=5)
    config.update(log_every=50, hessian_examples=0)
    return config
