"""SGD and SAM: WRN-28-10 on SVHN with its extra images.

Paper: Foret et al., SAM, arXiv:2010.01412, appendix B.1, Tables 5 and 7: all 73 257 + 531 131
training images, batch 256, learning rate 0.01, weight decay 5e-4, ρ = 0.01. The epochs, m and the
crops that it calls basic are chosen here. Its other row has AutoAugment's policy for SVHN with
cutout; `auto_augment` knows that for CIFAR-10 alone.

Command: curvax compare svhn_wrn --seeds 5 --fair --data.path=FOLDER
         (of train_32x32.mat, extra_32x32.mat and test_32x32.mat)

Expected: SAM 1.42 ± 0.02 and SGD 1.58 ± 0.03 % of errors in the paper; 0.99 ± 0.01 and 1.14 ± 0.04
with AutoAugment. Not run here.

Cost: on one GPU about two days for each run of SAM, half of that for SGD; an estimate.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults(rho=0.01, m=256)
    config.model.name = "wrn28_10"
    config.data.update(name="svhn_extra", augment=["shift_crop(4)"])  # a mirrored digit is none
    config.baseline = (
        "pmean_updates(axes) | clip_by_global_norm(5.0) | add_decayed_weights(5e-4)"
        " | sgd(cosine(0.01), momentum=0.9)"
    )
    config.optimizer = f"per_group(m, sam_perturb(rho)) | {config.baseline}"
    config.update(epochs=40, batch=256, log_every=50)
    return config
