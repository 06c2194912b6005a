"""The papers' image classifiers in Flax linen, by name: `build("vit_s16", classes=1000)`.

Every model is called as `model(x, train=False)` on floats (N, H, W, C); dropout and stochastic
depth draw from `rngs={"dropout": key}`, batch norm keeps `batch_stats`. Names are
`resnet<depth>`, `wrn<depth>_<width>` for any wide ResNet, and `vit_` or `mixer_` with the size
(S, B, or tiny for 8×8 digits) and the patch.
"""

import re
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from flax import linen as nn

from curvax.models.mixer import MlpMixer
from curvax.models.resnet import ResNet
from curvax.models.vit import VisionTransformer
from curvax.models.wide_resnet import WideResNet

__all__ = ["MlpMixer", "ResNet", "VisionTransformer", "WideResNet", "build", "names"]

Recipe = tuple[type[nn.Module], dict[str, Any]]

WIDE = re.compile(r"wrn(\d+)_(\d+)")
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
    tiny = {"patch": 2, "width": 64, "depth": 4}
    found["vit_tiny"] = VisionTransformer, {**tiny, "heads": 4, "mlp_width": 128}
    found["mixer_tiny"] = MlpMixer, {**tiny, "token_width": 32, "channel_width": 128}
    for size in ("s", "b"):
        for patch in (32, 16):
            found[f"vit_{size}{patch}"] = VisionTransformer, {**VIT[size], "patch": patch}
        for patch in (32, 16, 8):
            found[f"mixer_{size}{patch}"] = MlpMixer, {**MIXER[size], "patch": patch}
    return found


RECIPES = _recipes()


def names() -> tuple[str, ...]:
    """The names that `build` knows; `wrn<depth>_<width>` works for other depths and widths too."""
    return tuple(RECIPES)


def build(name: str, classes: int, **options: Any) -> nn.Module:
    """A model by name.

    Args:
        name: one of `names()`, or any `wrn<depth>_<width>`.
        classes: number of logits.
        **options: attributes of the model's class to set, such as `norm="group"`, `scan=False`,
            `dropout=0.1`, `head_bias=-10.0`.

    Raises:
        ValueError: an unknown name, or an option out of its range.
        TypeError: an option that the model does not have.
    """
    module, settings = _recipe(name)
    known = {field.name for field in fields(module)} - {"classes", "parent", "name"}
    for option in options:
        if option not in known:
            raise TypeError(
                f"The model `{name}` has no option `{option}`. {_near(option, known)} It has "
                f"{', '.join(sorted(known))}."
            )
    return module(classes=classes, **{**settings, **options})


def _recipe(name: str) -> Recipe:
    if name in RECIPES:
        return RECIPES[name]
    if wide := WIDE.fullmatch(name):
        return WideResNet, {"depth": int(wide[1]), "widen": int(wide[2])}
    raise ValueError(
        f"There is no model `{name}`. {_near(name, names())} Known are {', '.join(names())} and "
        "any `wrn<depth>_<width>`."
    )


def _near(word: str, words: Any) -> str:
    near = get_close_matches(word, words)
    return f"Did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else ""
