"""A loss over a batch that stages can evaluate, differentiate, divide and scan.

`Objective` has the methods that a user needs. The functions of an objective that are exported here
beside it are for the stages, products and measures of curvax.
"""

from curvax.objective.evaluation import (
    LossAndGradient,
    device_mean,
    group_mean,
    loss_of_outputs,
    map_examples,
    microbatch_mean,
    value_and_aux,
    value_aux_and_grad,
)
from curvax.objective.local_axes import refuse_exchange
from curvax.objective.objective import Objective
from curvax.objective.requirements import (
    as_objective,
    first_part,
    require_batch,
    require_likelihood,
    require_model,
)
from curvax.objective.validation import check_key, refuse_joined

__all__ = [
    "LossAndGradient",
    "Objective",
    "as_objective",
    "check_key",
    "device_mean",
    "first_part",
    "group_mean",
    "loss_of_outputs",
    "map_examples",
    "microbatch_mean",
    "refuse_exchange",
    "refuse_joined",
    "require_batch",
    "require_likelihood",
    "require_model",
    "value_and_aux",
    "value_aux_and_grad",
]
