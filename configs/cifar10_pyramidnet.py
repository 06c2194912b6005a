"""SGD and SAM: PyramidNet-272 with α = 200 and ShakeDrop on CIFAR-10.

Paper: Foret et al., SAM, arXiv:2010.01412, section 3.1, Tables 1 and 6: batch 256, learning rate
0.02, weight decay 5e-4, ρ = 0.05. Of the authors' code are Nesterov's momentum 0.9, a cosine, the
decay of every parameter, clipping at 5, and the ShakeDrop of Yamada et al., arXiv:1802.02375. The
1800 epochs are those of Cubuk et al.'s code for AutoAugment, to which the paper refers. Unlike in
the code the decay is not part of the ascent, and SAM's first gradient too has other coefficients
backward than forward. m, the whole batch, is chosen here, on any number of devices; the authors'
code perturbs on each device's own part, which is --m=32 for eight.

Command: curvax compare cifar10_pyramidnet --seeds 5 --fair --data.path=cifar-10-python.tar.gz
         (with cutout: --data.augment="['shift_crop(4)','flip()','normalise()','cutout(16)']"; the
         plain network: --model.options.shake_drop=0 --lr=0.05; on CIFAR-100: --data.name=cifar100
         --lr=0.05, plain also --rho=0.2; where memory is short: --model.options.remat=true)

Expected: SAM 2.1 ± 0.1 and SGD 2.5 ± 0.1 % of errors in the paper, 1.6 and 1.9 with cutout; the
plain network 2.7 ± 0.1 and 4.0 ± 0.1. Not run here.

Cost: 26 210 842 parameters; 26.2 GFLOP for the gradient on an image, as XLA counts them, 2.4e18 for
the 1800 epochs of SGD and twice that for SAM.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config() -> ConfigDict:
    config = defaults(lr=0.02, rho=0.05, m=256)
    config.model.name = "pyramidnet272_200"
    config.data.update(name="cifar10", augment=["shift_crop(4)", "flip()"])
    config.baseline = (
        "pmean_updates(axes) | clip_by_global_norm(5.0) | add_decayed_weights(5e-4)"
        " | sgd(cosine(lr), momentum=0.9, nesterov=True)"
    )
    config.optimizer = f"per_group(m, sam_perturb(rho)) | {config.baseline}"
    config.update(epochs=1800, batch=256, log_every=50, test_every=10)
    return config
