"""SGD and SAM: WRN-28-10 on CIFAR-100.

Paper: Foret et al., SAM, arXiv:2010.01412, section 3.1, Tables 1 and 6: batch 256, learning rate
0.1, weight decay 5e-4, 200 epochs, ρ = 0.1. Of its code are the decay of every parameter and
clipping at 5. The decay is not part of the ascent here, and in the authors' code it is. m, the
whole batch, is chosen here, on any number of devices; the authors' code perturbs on each device's
own part, which is --m=32 for eight.

Command: curvax compare cifar100_wrn --seeds 5 --fair --data.path=cifar-100-python.tar.gz
         (with cutout: --data.augment="['shift_crop(4)','flip()','normalise()','cutout(16)']")

Expected: SAM 16.5 ± 0.2 and SGD 18.8 ± 0.2 % of errors in the paper, 14.9 and 16.9 with
cutout. Not run here.

Cost: on one GPU about a day for each run of SAM, half of that for SGD; an estimate.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults(rho=0.1, m=256)
    config.model.name = "wrn28_10"
    config.data.update(name="cifar100", augment=["shift_crop(4)", "flip()"])
    config.baseline = (
        "pmean_updates(axes) | clip_by_global_norm(5.0) | add_decayed_weights(5e-4)"
        " | sgd(cosine(0.1), momentum=0.9)"
    )
    config.optimizer = f"per_group(m, sam_perturb(rho)) | {config.baseline}"
    config.update(epochs=200, batch=256, log_every=50)
    return config
