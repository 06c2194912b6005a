"""AdamW, SAM and GSAM: ViT-S/32, S/16, B/32 or B/16 on ImageNet alone.

Paper: Zhuang et al., GSAM, arXiv:2203.08065, Table 1, and Chen et al., When Vision Transformers
Outperform ResNets, arXiv:2106.01548, with the settings of GSAM in google-research/big_vision
(configs/proj/gsam/vit_i1k_gsam_no_aug.py, there for B/32): sigmoid loss with a head that starts at
-10, mean of the tokens, batch 4096, 300 epochs, inception crops and flips alone, Adam at 3e-3 after
10 000 steps of warm-up, falling linearly to 1 % of it, decay of 0.3 × the learning rate on kernels,
clipping at 1 after the mean, ρ from 0.6 to 0.1, α = 0.6. This differs from theirs in: all training
images and not 99 %, ρ that is never negative in the warm-up. Not in the texts and chosen here: ρ of
SAM, m as in SAM's own ImageNet runs, activations in bf16.

Command: curvax compare imagenet_vit:b32 --data.path=records/imagenet
         (imagenet_vit:s32, :s16 and :b16; with the second paper's strong augmentation
         --data.augment="['flip()','rand_augment(2, 15)','mixup(0.5)']"; --distributed on a pod)

Expected: top-1 accuracies of S/32, S/16, B/32 and B/16 in GSAM's Table 1: AdamW 68.4, 74.4, 71.4
and 74.6, SAM 70.5, 78.1, 73.6 and 79.9, GSAM 73.8, 79.5, 76.8 and 81.0 %. Not run here.

Cost: tests/evidence/plans.md has what a device of two TPU topologies needs for a step, 5 GB under
SAM on 256 chips of v5e for B/16, 15 of the 17 GB on v3:4x8; AdaHessian there needs
--model.options.remat=True. An epoch has 312 steps.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config(size: str = "b32") -> ConfigDict:
    config = defaults(
        lr=3e-3, lr_min=3e-5, warmup=10_000, rho=0.2, rho_max=0.6, rho_min=0.1, alpha=0.6, m=128
    )
    config.model.name = f"vit_{size}"
    config.model.options.update(dtype="bfloat16", dropout=0.0, head_bias=-10.0)
    config.data.update(name="imagenet", augment=["flip()"])
    config.loss = "sigmoid"
    rate = "linear(lr, warmup=warmup, end=lr_min)"
    radius = f"rho_schedule({rate}, rho_max, rho_min, lr_max=lr, lr_min=lr_min)"
    adamw = f"adamw({rate}, weight_decay=0.3, mask=kernels)"
    base = f"pmean_updates(axes) | clip_by_global_norm(1.0) | {adamw}"
    config.baseline = base
    config.optimizer = f"per_group(m, sam_perturb({radius}) | gsam_project(alpha)) | {base}"
    config.more_optimizers = [f"per_group(m, sam_perturb(rho)) | {base}"]
    config.update(parallelism="shard_map", batch=4096, eval_batch=4096, epochs=300, test_every=8)
    config.update(log_every=50, hessian_examples=0)
    return config
