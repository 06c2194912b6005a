"""Results of measures ↦ JSON values."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def encode(value: Any) -> Any:
    """Named tuples and mappings become objects, arrays lists, and non-finite numbers null."""
    if hasattr(value, "_asdict"):
        fields = value._asdict().items()
        return {name: encode(x) for name, x in fields if x is not None}
    if isinstance(value, Mapping):
        return {str(name): encode(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [encode(x) for x in value]
    if hasattr(value, "__array__"):
        return encode(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
