"""Adversarial training with AdamW and SAM: ViT-S/16, B/32 or B/16 on ImageNet.

Paper: Chen et al., When Vision Transformers Outperform ResNets, arXiv:2106.01548, section 5.4,
eq. 5 and Table 5: one step from a random start within |δ| ≤ 2/255 per pixel (Wong et al.,
arXiv:2001.03994), whose gradient is that of SAM's ascent too. The paper does not give step size and
ρ: 1.25 ε is that of Wong et al., ρ and all else are those of `imagenet_vit`, but that every device
ascends on its own part of the batch, as in SAM's own runs.

Command: curvax compare imagenet_adversarial:b16 --data.path=records/imagenet
         curvax evaluate runs/imagenet_adversarial_b16-... --attack "pgd(2/255, steps=10)"
         (imagenet_adversarial:s16 and :b32; --distributed on a pod)

Expected: Table 5 has top-1 accuracies of S/16, B/32 and B/16 with SAM of 73.2, 69.9 and 76.7 %, and
58.0, 54.0 and 62.0 % under PGD-10; without SAM 1.2, 3.0 and 3.9 points less, and 5.2, 6.4 and 7.7
less under PGD-10. Not run here.

Cost: two gradients a step with either method. AdamW attacks first, SAM shares the backward pass of
its ascent.
"""

from ml_collections import ConfigDict

from curvax.training.config import configs


def get_config(size: str = "b16") -> ConfigDict:
    config = configs.load(f"imagenet_vit:{size}")
    config.attack, config.share_attack = "pgd(2/255, steps=1)", True
    # Without groups, whose ascent would take a gradient of its own at the attack.
    config.optimizer, config.more_optimizers = f"sam_perturb(rho) | {config.baseline}", []
    return config
