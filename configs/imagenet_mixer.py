"""AdamW, SAM and GSAM: MLP-Mixer S/32, S/16, S/8, B/32 or B/16 on ImageNet alone.

Paper: Zhuang et al., GSAM, arXiv:2203.08065, Table 1, and Chen et al., When Vision Transformers
Outperform ResNets, arXiv:2106.01548, with the settings of `imagenet_vit`. Neither the texts nor
google-research/big_vision give settings of Mixers, so that all of them are chosen here: those of
the ViT, and no stochastic depth.

Command: curvax compare imagenet_mixer:b16 --data.path=records/imagenet
         (imagenet_mixer:s32, :s16, :s8 and :b32; --distributed on a pod)

Expected: top-1 accuracies of S/32, S/16, S/8, B/32 and B/16 in GSAM's Table 1: AdamW 63.9, 68.8,
70.2, 62.5 and 66.4, SAM 66.7, 72.9, 75.9, 72.4 and 77.4, GSAM 68.6, 75.0, 76.8, 73.6 and 77.8 %.
Not run here.

Cost: tests/evidence/plans.md has what a device of two TPU topologies needs for a step of B/16;
AdaHessian needs --model.options.remat=True on v3:4x8. An epoch has 312 steps.
"""

from ml_collections import ConfigDict

from curvax.training.config import configs


def get_config(size: str = "b16") -> ConfigDict:
    config = configs.load("imagenet_vit")
    config.model.name = f"mixer_{size}"
    return config
