"""The diagonal of the Fisher matrix in the eigenbasis of its Kronecker factors, as in E-KFAC."""

from typing import Any

import jax
import jax.numpy as jnp

from curvax import checks
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Key, ValueFn
from curvax.curvature.kronecker.corrected import corrections
from curvax.devices.axes import AxisNames
from curvax.hyperparameters import injectable
from curvax.objective import as_objective
from curvax.pipes.signal import Signal, Stage, stage
from curvax.pipes.state_keys import DrawingKey
from curvax.stages.estimation.diagonal_stage import part_and_axes
from curvax.stages.estimation.gradient_sharing import DrawState


@injectable
def fisher_eigenvalues(
    key: Key = 0, *, fraction: float = 1.0, mean_over: AxisNames = None
) -> Stage:
    """Computes the diagonal of the Fisher matrix in the eigenbasis of its Kronecker factors.

        D = E[(Q_Gᵀ g Q_A)²]

    over the gradients g of single examples, with labels as those of the factors: drawn behind
    `fisher_kronecker`, expected behind `gauss_newton_kronecker`, observed behind
    `empirical_fisher_kronecker`. Of all diagonal matrices in this basis, D is nearest to the Fisher
    matrix. Parameters without factors keep the diagonal that came with these. It costs a forward
    and a backward pass, and two products of activations with the eigenvectors. George et al.,
    E-KFAC, arXiv:1806.03884, section 3.

    Args:
        key: typed PRNG key, or seed, of drawn labels; that of `fisher_kronecker` draws the same.
        fraction: fraction of the batch in (0, 1], its first examples, that is used.
        mean_over: device axis, or tuple of axes, to average over; `()` keeps that of each device.

    Returns:
        A stage that sets `diagonal`, inside `in_eigenbasis`. It needs `value_fn=` an `Objective`
        with `model=` and a likelihood.

    Raises:
        ValueError: an option is out of range; in `update`, it is not inside `in_eigenbasis`, or the
            loss is local to a device axis and `mean_over` is missing.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> batch = {"x": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "y": jnp.array([[1.0], [2.0]])}
        >>> predict = lambda w, batch: batch["x"] @ w
        >>> objective = curvax.Objective(curvax.gaussian("y"), batch, model=predict)
        >>> corrected = curvax.in_eigenbasis(curvax.fisher_eigenvalues())
        >>> step = curvax.gauss_newton_kronecker() | corrected | curvax.solve(curvax.kronecker())
        >>> w = jnp.zeros((2, 1))
        >>> _, grads = objective.value_and_grad(w)
        >>> updates, state = step.update(grads, step.init(w), w, value_fn=objective)
        >>> [round(float(x), 3) for x in updates[:, 0]]  # linear regression is solved in one step
        [-1.0, -1.0]
    """
    name = "fisher_eigenvalues"
    checks.check_fraction(fraction, name)
    drawing = DrawingKey(key)

    def rule(
        signal: Signal,
        state: DrawState,
        params: Tree,
        *,
        value_fn: ValueFn | None = None,
        eigenbasis: Any = None,
        **extra: Any,
    ) -> tuple[Signal, DrawState]:
        del params, value_fn, extra
        if eigenbasis is None:
            raise ValueError(
                "`fisher_eigenvalues` estimates the eigenvalues of Kronecker factors, and goes "
                "inside `in_eigenbasis`: `fisher_kronecker(like) | ema_mean(0.95) | "
                "in_eigenbasis(fisher_eigenvalues())`."
            )
        basis, objective, point = eigenbasis
        objective = as_objective(objective, name, point)
        here, _, _ = part_and_axes(signal, objective, point, fraction, mean_over, name)
        drawn = basis.structure.options.fisher == "sampled"
        draw = jax.random.fold_in(drawing.of(state.key), state.step) if drawn else None
        corrected = corrections(basis, here, point, None, draw, mean_over, name)
        diagonal = corrected.diagonal(signal.updates)
        return signal._replace(diagonal=diagonal), state._replace(step=state.step + 1)

    return stage(lambda params: DrawState(drawing.initial(), jnp.zeros((), jnp.int32)), rule)
