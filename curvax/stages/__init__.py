"""The verbs: estimate, smooth, precondition, perturb, project, average, restrict."""

from curvax.stages.averaging import per_group, pmean_updates
from curvax.stages.estimation import hutchinson_diag
from curvax.stages.perturbation import sam_perturb
from curvax.stages.preconditioning import scale_by_power
from curvax.stages.projection import gsam_project, keep_orthogonal, penalize_gap
from curvax.stages.restriction import partition, restrict
from curvax.stages.smoothing import ema_rms, every, spatial_average

__all__ = [
    "ema_rms",
    "every",
    "gsam_project",
    "hutchinson_diag",
    "keep_orthogonal",
    "partition",
    "penalize_gap",
    "per_group",
    "pmean_updates",
    "restrict",
    "sam_perturb",
    "scale_by_power",
    "spatial_average",
]
