"""SGD and SAM: WRN-28-10 on Fashion-MNIST.

Paper: Foret et al., SAM, arXiv:2010.01412, appendix B.1, Tables 5 and 7: batch 256, learning rate
0.1, weight decay 5e-4, ρ = 0.05. The epochs, the crops and flips that it calls basic, the size of
cutout and m are chosen here, as for CIFAR-10. The images are read from the IDX files of Debian's
package dataset-fashion-mnist, or from --data.path=FOLDER.

Command: curvax compare fashion_wrn --seeds 5 --fair
         (with cutout: --data.augment="['shift_crop(4)','flip()','normalise()','cutout(16)']")

Expected: SAM 3.98 ± 0.05 and SGD 4.57 ± 0.07 % of errors in the paper, 3.61 ± 0.06 and
3.86 ± 0.14 with cutout. Not run here.

Cost: on one GPU about a day for each run of SAM, half of that for SGD; an estimate.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults(rho=0.05, m=256)
    config.model.name = "wrn28_10"
    config.data.update(name="fashion_mnist", augment=["shift_crop(4)", "flip()"])
    config.baseline = (
        "pmean_updates(axes) | clip_by_global_norm(5.0) | add_decayed_weights(5e-4)"
        " | sgd(cosine(0.1), momentum=0.9)"
    )
    config.optimizer = f"per_group(m, sam_perturb(rho)) | {config.baseline}"
    config.update(epochs=200, batch=256, log_every=50)
    return config
