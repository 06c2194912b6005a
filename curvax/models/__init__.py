"""The papers' models in Flax linen, by name: `build("vit_s16", classes=1000)`.

Every model is called as `model(x, train=False)`; dropout and stochastic depth draw from
`rngs={"dropout": key}`, batch norm keeps `batch_stats`. Image classifiers take floats (N, H, W, C)
and are named `resnet<depth>`, `wrn<depth>_<width>` for any wide ResNet, and `vit_` or `mixer_` with
the size (S, B, or tiny for 8×8 digits) and the patch. `mlp` takes anything and `autoencoder` gives
back what it took, both in floats (N, ...); `lm_tiny` is a language model on integers (N, T).
"""

import re
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from flax import linen as nn

from curvax.models.language import LanguageModel
from curvax.models.mixer import MlpMixer
from curvax.models.perceptron import Autoencoder, Perceptron
from curvax.models.resnet import ResNet
from curvax.models.vit import VisionTransformer
from curvax.models.wide_resnet import WideResNet

__all__ = [
    "Autoencoder",
    "LanguageModel",
    "MlpMixer",
    "Perceptron",
    "ResNet",
    "VisionTransformer",
    "WideResNet",
    "build",
    "names",
]

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
    found["lm_tiny"] = LanguageModel, {"width": 64, "depth": 2, "heads": 4, "mlp_width": 256}
    found["mlp"] = Perceptron, {"widths": (128, 64)}
    found["autoencoder"] = Autoencoder, {"widths": (1000, 500, 250), "code": 30}
    found["autoencoder_tiny"] = Autoencoder, {"widths": (128, 64), "code": 16}
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


def build(name: str, classes: int | None = None, **options: Any) -> nn.Module:
    """A model by name.

    Args:
        name: one of `names()`, or any `wrn<depth>_<width>`.
        classes: number of logits, or of a regression's targets; none for an autoencoder.
        **options: attributes of the model's class to set, such as `norm="group"`, `scan=False`,
            `dropout=0.1`, `head_bias=-10.0`.

    Raises:
        ValueError: an unknown name, an option out of its range, or `classes` missing or in excess.
        TypeError: an option that the model does not have.
    """
    module, settings = _recipe(name)
    known = {field.name for field in fields(module)} - {"parent", "name"}
    if ("classes" in known) is (classes is None):
        raise ValueError(
            "An autoencoder's outputs are shaped like its inputs, and any other model has "
            f"`classes` outputs. `{name}` was built with {classes}: take another model, or another "
            "task for it."
        )
    head = {} if classes is None else {"classes": classes}
    known -= head.keys()
    for option in options:
        if option not in known:
            raise TypeError(
                f"The model `{name}` has no option `{option}`. {_near(option, known)} It has "
                f"{', '.join(sorted(known))}."
            )
    # A model is hashed, as a static argument, and a list that was JSON is not.
    frozen = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return module(**head, **{**settings, **frozen})


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
