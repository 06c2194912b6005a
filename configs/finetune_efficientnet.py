"""SGD and SAM in fine-tuning: EfficientNet on CIFAR-10, CIFAR-100, Flowers or Pets.

Paper: Foret et al., SAM, arXiv:2010.01412, section 3.2 and appendix C.2: EfficientNet-b7 with its
weights from ImageNet and a new head, batch 1024, 5000 steps, SGD with momentum 0.9 and learning
rate 0.016 along a cosine, weight decay 1e-5, statistics of batch norm frozen, AutoAugment on CIFAR;
ρ = 0.05 in the table of appendix C.3. Resolution, dropout and stochastic depth are those of Tan and
Le, arXiv:1905.11946. Of the authors' code are Nesterov's momentum, clipping at 5, the decay of
every parameter, and on CIFAR shifts and flips besides; images are resized after that. Chosen here:
m, the whole batch, activations in bf16, images normalised as for ImageNet, crops of 8 to 100 % of
the area and flips on Flowers and Pets, and batches of 1016 on Flowers, which has 1020 images. Of
the paper's nine sets these four are offered.

Command: curvax compare finetune_efficientnet:cifar10 --init_from=RUN --data.path=FILE
         (FILE is cifar-10-python.tar.gz; :cifar100, :flowers and :pets, the last two on records
         that `curvax convert` made; after a dash another size, as finetune_efficientnet:pets-b0.
         RUN is the folder of a run of your own, as of imagenet_resnet with
         --model.name=efficientnet_b7 --data.image_size=600: published weights are checkpoints of
         TensorFlow or of Flax's former `flax.nn`, and not read. Without --init_from a network
         begins at random, and --model.options.freeze_norm=false has it measure its statistics. On
         one GPU --microbatch=8)

Expected: errors of b7 by SAM and without on CIFAR-10, CIFAR-100, Flowers and Pets: at ρ = 0.05
0.88, 7.56, 0.81, 4.15 and 0.95, 7.68, 1.16, 4.24 %; with ρ tuned 0.88, 7.44, 0.63, 3.97. Not run
here.

Cost: 63 812 570 parameters with 10 classes; 234 GFLOP for b7's gradient on an image, as XLA counts
them, 1.2e18 for the 5000 steps of SGD and twice that for SAM.
"""

from ml_collections import ConfigDict

from curvax.models.efficientnet import SCALINGS
from curvax.training.config.configs import defaults
from curvax.training.runtime.errors import ConfigError

STEPS = 5000
IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "flowers": 1020, "pets": 3680}
"""Training images; 1020 are no batch of 1024, and 1016 divide among eight devices."""


def get_config(variant: str = "cifar10") -> ConfigDict:
    """DATA or DATA-SIZE, where SIZE is b0 to b7."""
    name, _, size = variant.partition("-")
    size = size or "b7"
    if name not in IMAGES or size not in SCALINGS:
        raise ConfigError(
            f"`finetune_efficientnet` is on one of {', '.join(IMAGES)}, of a size from b0 to b7, "
            f"as `cifar10-b7`, and was `{variant}`."
        )
    in_memory = name.startswith("cifar")
    batch = 1016 if name == "flowers" else 1024
    config = defaults(lr=0.016, rho=0.05, m=batch)
    config.model.name = f"efficientnet_{size}"
    config.model.options.update(dtype="bfloat16", freeze_norm=True)
    of_cifar = ["auto_augment('cifar10')", "shift_crop(4)"] if in_memory else []
    config.data.update(name=name if in_memory else "records", augment=[*of_cifar, "flip()"])
    config.data.update(image_size=SCALINGS[size].side, crop_area=(0.08, 1.0))
    config.data.update(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    config.baseline = (
        "pmean_updates(axes) | clip_by_global_norm(5.0) | add_decayed_weights(1e-5)"
        " | sgd(cosine(lr), momentum=0.9, nesterov=True)"
    )
    config.optimizer = f"per_group(m, sam_perturb(rho)) | {config.baseline}"
    config.update(epochs=round(STEPS / (IMAGES[name] // batch)), batch=batch, hessian_examples=0)
    config.update(test_every=5 if in_memory else 500)
    return config
