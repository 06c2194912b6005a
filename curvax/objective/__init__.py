"""A loss over a batch that stages can evaluate, differentiate, divide and scan."""

from curvax.objective.objective import Objective
from curvax.objective.requirements import (
    as_objective,
    require_batch,
    require_likelihood,
    require_model,
)
from curvax.objective.validation import check_key, refuse_joined

__all__ = [
    "Objective",
    "as_objective",
    "check_key",
    "refuse_joined",
    "require_batch",
    "require_likelihood",
    "require_model",
]
