"""SGD and SAM under label noise: ResNet-32 on CIFAR-10, 40 % of the training labels wrong.

Paper: Foret et al., SAM, arXiv:2010.01412, section 3.3 and Table 4: model, epochs and ρ. All other
settings are those of its code for WRN-28-10, since the text does not say, except for the weight
decay, which is added after the ascent here and is a part of the loss there, and m, which is the
whole batch. The baseline with mixup is --baseline="..."
--data.augment="['shift_crop(4)','flip()','mixup(1.0, 8)']", with α of 1, 8, 16 or 32.

Command: curvax compare cifar10_noise --seeds 5 --fair --data.path=cifar-10-python.tar.gz
         (and with --data.label_noise=0.2, 0.6 and 0.8, the last with --rho=0.05; Bootstrap, trained
         again from scratch on the labels that the first run predicts, seed by seed, takes the same
         arguments and --data.labels=runs/FOLDER/METHOD: FOLDER is that of the first run, METHOD
         the method in it whose predictions are used: SAM for Bootstrap + SAM, SGD with mixup for
         Bootstrap + Mixup, which uses the same mixup again)

Expected: at 20, 40, 60 and 80 % noise in the paper's Table 4 SGD 84.8, 68.8, 48.2 and 26.2 %, Mixup
93.0, 90.0, 83.8 and 70.2, Bootstrap + Mixup 93.3, 92.0, 87.6 and 72.0, SAM 95.1, 93.4, 90.5 and
77.9, Bootstrap + SAM 95.4, 94.2, 91.8 and 79.9 %. Not run here.

Cost: on one GPU about two hours for each run of SAM, half of that for SGD, as much again where it
is bootstrapped; an estimate.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults(rho=0.1, m=256)
    config.model.name = "resnet32"
    config.data.update(name="cifar10", label_noise=0.4, augment=["shift_crop(4)", "flip()"])
    config.baseline = (
        "pmean_updates(axes) | clip_by_global_norm(5.0) | add_decayed_weights(5e-4)"
        " | sgd(cosine(0.1), momentum=0.9)"
    )
    config.optimizer = f"per_group(m, sam_perturb(rho)) | {config.baseline}"
    config.update(epochs=200, batch=256, log_every=50)
    return config
