"""The models of the papers in Flax linen, by name: `build("vit_s16", classes=1000)`.

    resnet<depth>, wrn<depth>_<width>    images, floats (N, H, W, C)
    pyramidnet<depth>_<alpha>, shakeshake<depth>_<width>, efficientnet_b<0 to 7>
    vit_<size><patch>, mixer_<...>       images; sizes s and b, or tiny for 8×8 digits
    mlp, autoencoder                     floats (N, ...), flattened
    lm_tiny                              integers (N, T)
    dlrm, dlrm_tiny                      floats (N, D + T): numbers, then categories

Models are called as `model(x, train=False)`. Dropout, stochastic depth, ShakeDrop and Shake-Shake
draw from `rngs={"dropout": key}`; batch norm keeps `batch_stats`.
"""

import re
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from flax import linen as nn

from curvax.models.efficientnet import SCALINGS, EfficientNet
from curvax.models.language import LanguageModel
from curvax.models.mixer import MlpMixer
from curvax.models.perceptron import Autoencoder, Perceptron
from curvax.models.projection import ProjectionNet
from curvax.models.pyramidnet import PyramidNet
from curvax.models.recommender import Recommender
from curvax.models.resnet import ResNet
from curvax.models.shake_shake import ShakeShake
from curvax.models.vit import VisionTransformer
from curvax.models.wide_resnet import WideResNet

__all__ = [
    "Autoencoder",
    "EfficientNet",
    "LanguageModel",
    "MlpMixer",
    "Perceptron",
    "ProjectionNet",
    "PyramidNet",
    "Recommender",
    "ResNet",
    "ShakeShake",
    "VisionTransformer",
    "WideResNet",
    "build",
    "names",
]

Recipe = tuple[type[nn.Module], dict[str, Any]]

NUMBERED = (
    (re.compile(r"wrn(\d+)_(\d+)"), WideResNet, ("depth", "widen")),
    (re.compile(r"pyramidnet(\d+)_(\d+)"), PyramidNet, ("depth", "alpha")),
    (re.compile(r"shakeshake(\d+)_(\d+)"), ShakeShake, ("depth", "width")),
)
"""Families whose names hold two numbers."""
IMAGENET = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}
VIT = {
    "s": {"width": 384, "depth": 12, "heads": 6, "mlp_width": 1536, "dropout": 0.1},
    "b": {"width": 768, "depth": 12, "heads": 12, "mlp_width": 3072, "dropout": 0.1},
}
MIXER = {
    "s": {"width": 512, "depth": 8, "token_width": 256, "channel_width": 2048},
    "b": {"width": 768, "depth": 12, "token_width": 384, "channel_width": 3072},
}


def _recipes() -> dict[str, Recipe]:
    found: dict[str, Recipe] = {}
    for depth in (8, 14, 20, 32, 44, 56, 110):
        found[f"resnet{depth}"] = ResNet, {"sizes": ((depth - 2) // 6,) * 3, "width": 16}
    for depth, (sizes, bottleneck) in IMAGENET.items():
        settings = {"sizes": sizes, "width": 64, "imagenet": True, "bottleneck": bottleneck}
        found[f"resnet{depth}"] = ResNet, settings
    for depth in (28, 40):
        found[f"wrn{depth}_10"] = WideResNet, {"depth": depth, "widen": 10}
    found["pyramidnet272_200"] = PyramidNet, {"depth": 272, "alpha": 200}
    found["shakeshake26_96"] = ShakeShake, {"depth": 26, "width": 96}
    for size, scaling in SCALINGS.items():
        factors = {name: getattr(scaling, name) for name in ("width", "depth", "dropout")}
        found[f"efficientnet_{size}"] = EfficientNet, factors
    tiny = {"patch": 2, "width": 64, "depth": 4}
    found["vit_tiny"] = VisionTransformer, {**tiny, "heads": 4, "mlp_width": 128}
    found["mixer_tiny"] = MlpMixer, {**tiny, "token_width": 32, "channel_width": 128}
    found["lm_tiny"] = LanguageModel, {"width": 64, "depth": 2, "heads": 4, "mlp_width": 256}
    found["mlp"] = Perceptron, {"widths": (128, 64)}
    found["autoencoder"] = Autoencoder, {"widths": (1000, 500, 250), "code": 30}
    found["autoencoder_tiny"] = Autoencoder, {"widths": (128, 64), "code": 16}
    found["dlrm"] = Recommender, {"width": 16, "bottom": (512, 256, 64), "top": (512, 256)}
    found["dlrm_tiny"] = Recommender, {"width": 16, "bottom": (64, 32), "top": (64, 32)}
    for size in ("s", "b"):
        for patch in (32, 16):
            found[f"vit_{size}{patch}"] = VisionTransformer, {**VIT[size], "patch": patch}
        for patch in (32, 16, 8):
            found[f"mixer_{size}{patch}"] = MlpMixer, {**MIXER[size], "patch": patch}
    return found


RECIPES = _recipes()


def names() -> tuple[str, ...]:
    """Returns the names that `build` knows, apart from those with other numbers in `wrn28_10`,
    `pyramidnet272_200` and `shakeshake26_96`."""
    return tuple(RECIPES)


def build(name: str, classes: int | None = None, **options: Any) -> nn.Module:
    """Builds a model by name.

    Args:
        name: one of `names()`, or any `wrn<depth>_<width>`, `pyramidnet<depth>_<alpha>` or
            `shakeshake<depth>_<width>`.
        classes: number of logits or of regression targets; 0 for the representation in front of the
            head; None for an autoencoder.
        **options: attributes of the model's class, such as `norm="group"`, `scan=False`,
            `dropout=0.1` or `head_bias=-10.0`.

    Returns:
        A Flax linen module, called as `model(x, train=False)`.

    Raises:
        ValueError: an unknown name, an option out of range, or `classes` missing or in excess.
        TypeError: an option that the model does not have.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from curvax import models
        >>> model = models.build("mlp", classes=10)
        >>> variables = model.init(jax.random.key(0), jnp.ones((2, 8, 8)))
        >>> model.apply(variables, jnp.ones((2, 8, 8))).shape
        (2, 10)
    """
    module, settings = _recipe(name)
    known = {field.name for field in fields(module)} - {"parent", "name"}
    if ("classes" in known) is (classes is None):
        raise ValueError(
            "An autoencoder takes no `classes`, since its outputs have the shape of its inputs; "
            f"every other model needs them. `{name}` was built with {classes}. Choose another "
            "model or another task."
        )
    head = {} if classes is None else {"classes": classes}
    known -= head.keys()
    for option in options:
        if option not in known:
            raise TypeError(
                f"The model `{name}` has no option `{option}`. {_near(option, known)} It has "
                f"{', '.join(sorted(known))}."
            )
    # Modules are hashed as static arguments of `jit`, and lists from JSON have no hash.
    frozen = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return module(**head, **{**settings, **frozen})


def _recipe(name: str) -> Recipe:
    if name in RECIPES:
        return RECIPES[name]
    for pattern, family, options in NUMBERED:
        if match := pattern.fullmatch(name):
            return family, dict(zip(options, map(int, match.groups()), strict=True))
    raise ValueError(
        f"There is no model `{name}`. {_near(name, names())} Known names are "
        f"{', '.join(names())}, and any `wrn<depth>_<width>`, `pyramidnet<depth>_<alpha>` or "
        "`shakeshake<depth>_<width>`."
    )


def _near(word: str, words: Any) -> str:
    near = get_close_matches(word, words)
    return f"Did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else ""
