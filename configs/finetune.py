"""SGD and SAM in fine-tuning: weights from ImageNet on CIFAR-10, CIFAR-100, Flowers or Pets.

Paper: Chen et al., When Vision Transformers Outperform ResNets, arXiv:2106.01548, section 5.5 and
Table 6: resolution 224 and "vanilla SGD", which is all that it says; and Foret et al., SAM,
arXiv:2010.01412, section 3.2, Table 3 and, for ρ = 0.05, Table 11: fine-tuning by SAM, there of
EfficientNets, whose own setting is in finetune_efficientnet. Of Dosovitskiy et al.,
arXiv:2010.11929, Table 4, and of google-research/big_vision's configs/transfer.py are momentum 0.9,
batch 512, 10 000 steps (500 on Flowers and Pets) along a cosine after 500 (100) of warm-up, the
learning rate, clipping at 1, no decay, inception crops and flips, a head that starts at zero.
Chosen here: activations in bf16, no dropout, m the whole batch. Of Table 3's nine sets these four
are offered.

Command: curvax compare finetune:cifar10 --init_from=ViT-B_16.npz --data.path=cifar-10-python.tar.gz
         (finetune:cifar100, :flowers and :pets, the last two on records that `curvax convert` made
         of their training and test pictures; after a dash another model, as finetune:pets-mixer_b16
         or finetune:pets-resnet50. The first two models' weights by SAM and without are published
         with google-research/vision_transformer, at gs://vit_models and gs://mixer_models; of
         other models --init_from takes a run of your own, as of imagenet_resnet. A run of
         imagenet_vit has no class token: --model.options.pool=mean. On one GPU --microbatch=64)

Expected: in Table 6 by SGD from weights without SAM and with it, on CIFAR-10, CIFAR-100, Flowers
and Pets: ViT-B/16 98.1, 87.6, 88.5, 91.9 and 98.6, 89.1, 91.8, 93.1 %; Mixer-B/16 95.4, 80.0, 82.8,
86.1 and 97.8, 86.4, 90.0, 92.5 %; ResNet-50 with SAM 97.4, 85.2, 90.0, 91.6 %. In Table 11, errors
of EfficientNet-b7 by SAM and without: 0.88, 7.56, 0.81, 4.15 and 0.95, 7.68, 1.16, 4.24 %. Not run
here.

Cost: 5 million images through the model on CIFAR, for each run of SAM twice: on one GPU some hours
each; an estimate. Flowers and Pets a twentieth of it.
"""

from ml_collections import ConfigDict

from curvax.training.config.configs import defaults
from curvax.training.runtime.errors import ConfigError

SIDE = 224
EPOCHS = {"cifar10": 103, "cifar100": 103, "flowers": 500, "pets": 71}
"""10 000 steps, or 500, on 50 000, 50 000, 1020 and 3680 training images."""


def get_config(variant: str = "cifar10") -> ConfigDict:
    """DATA or DATA-MODEL."""
    name, _, model = variant.partition("-")
    if name not in EPOCHS:
        raise ConfigError(f"`finetune` is on one of {', '.join(EPOCHS)}, and was on `{name}`.")
    in_memory = name.startswith("cifar")
    config = defaults(lr=0.01, rho=0.05, m=512, warmup=500 if in_memory else 100)
    config.model.name = model or "vit_b16"
    config.model.options.dtype = "bfloat16"
    if config.model.name.startswith("vit"):
        config.model.options.update(pool="token", dropout=0.0)
    crop = [f"inception_crop({SIDE})"] if in_memory else []  # records are cropped when decoded
    config.data.update(name=name if in_memory else "records", image_size=SIDE)
    config.data.augment = [*crop, "flip()"]
    config.data.update(mean=(0.5,) * 3, std=(0.5,) * 3)  # as the published weights take images
    config.init_from = "ViT-B_16.npz"
    config.baseline = (
        "pmean_updates(axes) | clip_by_global_norm(1.0)"
        " | sgd(cosine(lr, warmup=warmup), momentum=0.9)"
    )
    config.optimizer = f"per_group(m, sam_perturb(rho)) | {config.baseline}"
    config.update(epochs=EPOCHS[name], batch=512, hessian_examples=0)
    config.update(test_every=5 if in_memory else 20)
    return config
