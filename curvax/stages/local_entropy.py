"""Entropy-SGD's stage: the gradient of the local entropy, by Langevin dynamics around θ.

F(θ; γ) = log ∫ exp(-L(x) - γ/2 ‖θ - x‖²) dx,    -∇F(θ; γ) = γ (θ - <x>)
"""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.arithmetic.typing import Key, Sampler, ScalarOrSchedule, ValueFn
from curvax.devices import axes, meshes
from curvax.devices.axes import AxisNames
from curvax.hyperparameters import injectable
from curvax.linalg.probes import gaussian_probe
from curvax.objective import Objective, as_objective, require_batch, value_aux_and_grad
from curvax.pipes import initial, order
from curvax.pipes.diagnostics import Flags, Metrics, metrics_of, no_metrics
from curvax.pipes.signal import Signal, Stage, at, stage
from curvax.pipes.state_keys import DrawingKey


class LocalEntropyState(NamedTuple):
    step: jax.Array
    """t, int32 scalar."""
    key: jax.Array
    """The data of the key of the noise, uint32."""
    measured: Flags
    figures: Metrics
    """`scope` γ and `distance` ‖θ - μ‖."""


@injectable
def local_entropy(
    scope: ScalarOrSchedule,
    *,
    steps: int = 20,
    rate: ScalarOrSchedule = 0.1,
    noise: ScalarOrSchedule = 1e-4,
    decay: ScalarOrSchedule = 0.75,
    momentum: ScalarOrSchedule = 0.9,
    split_batch: bool = False,
    sync_over: AxisNames = None,
    sampler: Sampler = gaussian_probe,
    key: Key = 0,
) -> Stage:
    """Replaces the gradient by θ - μ, that of the negative local entropy up to its factor γ.

        v ← β v + ∇L(x),    d = ∇L(x) + β v + γ (x - θ)
        x ← x - η' d + √η' ε N(0, I),    μ ← (1 - α) μ + α x        L times from x = μ = θ, v = 0

    Langevin dynamics explore the loss around θ, and μ estimates the mean <x> of a Gibbs
    distribution that prefers wide valleys. Chaudhari et al., Entropy-SGD, arXiv:1611.01838,
    Algorithm 1, with the Nesterov momentum β and the defaults of the authors' code. As there the
    update has no factor γ: `sgd(1.0)` behind this stage moves θ to μ, and
    `optax.scale_by_schedule(scope)` gives γ (θ - μ). The pull γ (x - θ) has no momentum, so that
    with β a walk ends where one without would at the scope (1 - β) γ. A step costs L gradients, the
    first of which is the one given to `update`.

    Under pmap or shard_map each device walks on its own part of the batch, with the same noise, and
    `pmean_updates` averages the ends.

    Args:
        scope: γ >= 0, a number or a schedule: the force that holds x near θ, which needs η' γ < 2.
            The scoping of the paper, γ₀ (1 + γ₁)ᵗ, is `optax.exponential_decay(γ₀, 1, 1 + γ₁)`.
        steps: L, the number of inner steps.
        rate: η' >= 0, their learning rate.
        noise: ε >= 0, the size of the noise.
        decay: 1 - α in [0, 1), what an inner step keeps of μ; 0 takes the last x, and the paper has
            0.25.
        momentum: β in [0, 1), of ∇L in the inner loop; 0 is Algorithm 1.
        split_batch: whether inner step l takes the l-th of L pieces of the batch, in place of the
            whole batch. A step then costs one gradient, and the given one is not used.
        sync_over: device axes to average the inner gradients over, for one walk shared by all
            devices, as on the whole batch, at L all-reduces.
        sampler: `(key, tree) -> noise` of unit covariance. Normal numbers for each parameter in
            each inner step cost 0.2 of a gradient of a dense network on 256 examples; `rademacher`
            draws signs, for 0.01.
        key: typed key or seed of the noise.

    Returns:
        A stage that needs `value_fn`. It sets `updates`; `gradient`, `value` and `aux` stay those
        at θ. All inner steps on the whole batch see the same dropout key, each piece its own. Its
        metrics are `scope` and `distance` ‖θ - μ‖.

    Raises:
        ValueError, TypeError: an option is out of range, or is traced where it must be static; in
            `update`, L does not divide the batch of `split_batch`.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> loss = lambda w: 0.5 * jnp.sum(w**2)
        >>> tx = curvax.local_entropy(0.1, steps=5, noise=0.0, momentum=0.0) | optax.sgd(1.0)
        >>> w = jnp.array([3.0, 4.0])
        >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, value_fn=loss)
        >>> [round(float(x), 3) for x in updates]
        [-0.688, -0.918]
        >>> round(float(curvax.diagnostics(state)["distance"]), 3)
        1.147

    Differences from the authors' code (ucla-vision/entropy-sgd, in Lua and in Python):
        1. They draw a new mini-batch for every inner gradient. Here it is the batch of the step, or
           a piece of it.
        2. They compute one more gradient, at θ, for the reported loss alone.
        3. Their noise is √(2 η') ε, and that of Algorithm 1, as here, √η' ε.
        4. γ is a schedule of t = 0, 1, …. In Lua t starts at 1; in Python it is never raised, so
           that γ stays γ₀.
        5. Their weight decay is part of the inner gradient; here it is a term of the loss. That of
           the outer step, and its momentum (in Python), are the base's.
    """
    options, drawing = _Numbers(scope, rate, noise, decay, momentum), DrawingKey(key)
    _check_options(steps, options)
    checks.check_sampler("local_entropy", sampler)

    def init(params: Tree) -> LocalEntropyState:
        trees.require_floating(params, "local_entropy")
        metrics = no_metrics("scope", "distance")
        return LocalEntropyState(jnp.zeros((), jnp.int32), drawing.initial(), *metrics)

    def rule(
        signal: Signal,
        state: LocalEntropyState,
        params: Tree,
        *,
        value_fn: ValueFn | None = None,
        **extra: Any,
    ) -> tuple[Signal, LocalEntropyState]:
        del extra
        objective = as_objective(value_fn, "local_entropy", params)
        local = order.local_axes_of_gradient(signal, objective, params, "local_entropy")
        sync = axes.bound(sync_over, where="`local_entropy(sync_over=)`")
        own = local - set(sync)
        key = jax.random.fold_in(drawing.of(state.key), state.step)
        now = options.at(state.step)
        walk = _Walk(objective, axes.vary(params, own), now, sampler, key, sync)
        chain = (
            walk.over_pieces(steps) if split_batch else walk.from_gradient(signal.updates, steps)
        )
        away = trees.add_scaled(walk.center, -1, chain.mean)
        along = tuple(axis for axis in axes.manual() if axis in own)
        metrics = metrics_of({"scope": now.scope, "distance": trees.norm(away)}, along)
        signal = signal._replace(
            updates=trees.cast_like(away, signal.updates), local=own,
            averaged=signal.averaged.union(sync),
        )  # fmt: skip
        return signal, state._replace(step=state.step + 1, **metrics._asdict())

    init = initial.telling(init, moves=(_every_leaf, _FROZEN))
    return stage(init, rule, replaces_gradient=True)


_FROZEN = (
    "`local_entropy` moves parameters in its inner loop that a later part of the pipe keeps fixed: "
    "{leaves}. The other parameters then take the mean of a walk of all. Leave them out by "
    '`curvax.partition({{"train": stages, "freeze": optax.set_to_zero()}}, labels)`.'
)


def _every_leaf(params: Tree) -> list[bool]:
    return [True] * len(jax.tree.leaves(params))


class _Numbers(NamedTuple):
    """Options of the walk, which may be schedules."""

    scope: Any
    rate: Any
    noise: Any
    decay: Any
    momentum: Any

    def at(self, step: jax.Array) -> _Numbers:
        return _Numbers(*(at(number, step) for number in self))


def _check_options(steps: int, options: _Numbers) -> None:
    checks.check_count("local_entropy", steps=steps)
    for name in ("scope", "rate", "noise"):
        checks.check_range(name, getattr(options, name), 0, jnp.inf, stage="local_entropy")
    for name in ("decay", "momentum"):
        checks.check_decay(name, getattr(options, name), stage="local_entropy")
    scope, rate = options.scope, options.rate
    known = isinstance(scope, numbers.Real) and isinstance(rate, numbers.Real)
    if known and scope * rate >= 2:
        raise ValueError(
            "`local_entropy` pulls x to θ by the factor 1 - rate·scope in each inner step, which "
            f"alone diverges with rate={rate} and scope={scope}. Choose rate·scope below 2."
        )


class _Chain(NamedTuple):
    """Trees like the parameters, in float32 or wider."""

    point: Tree
    """x"""
    mean: Tree
    """μ"""
    velocity: Tree
    """v"""


class _Walk(NamedTuple):
    """Langevin dynamics around θ, with the numbers of one step of the optimiser."""

    objective: Objective
    params: Tree
    at: _Numbers
    sampler: Sampler
    key: jax.Array
    sync: tuple[str, ...]

    @property
    def center(self) -> Tree:
        """θ in float32 or wider."""
        return trees.wide(self.params)

    def from_gradient(self, gradient: Tree, steps: int) -> _Chain:
        """The end of inner steps on the whole batch, of which the first takes a known gradient."""
        first = self._moved(self._start(), self._synced(self.objective, gradient), 0)

        def step(chain: _Chain, number: jax.Array) -> tuple[_Chain, None]:
            return self._moved(chain, self._gradient(self.objective, chain), number), None

        return first if steps == 1 else lax.scan(step, first, jnp.arange(1, steps))[0]

    def over_pieces(self, steps: int) -> _Chain:
        """The end of inner steps on a piece of the batch each."""
        pieces = _in_pieces(self.objective, steps)

        def step(chain: _Chain, numbered: tuple[jax.Array, Tree]) -> tuple[_Chain, None]:
            number, batch = numbered
            piece = self.objective.piece(batch, number, steps)
            return self._moved(chain, self._gradient(piece, chain), number), None

        return lax.scan(step, self._start(), (jnp.arange(steps), pieces))[0]

    def _start(self) -> _Chain:
        theta = self.center
        return _Chain(theta, theta, jax.tree.map(jnp.zeros_like, theta))

    def _gradient(self, objective: Objective, chain: _Chain) -> Tree:
        point = trees.cast_like(chain.point, self.params)
        return self._synced(objective, value_aux_and_grad(objective, point)[1])

    def _synced(self, objective: Objective, gradient: Tree) -> Tree:
        return trees.wide(axes.mean(gradient, self.sync, objective.batch_weight()))

    def _moved(self, chain: _Chain, gradient: Tree, number: Any) -> _Chain:
        """The chain after an inner step with this gradient."""
        x, mean, v = chain
        v = trees.add_scaled(gradient, self.at.momentum, v)
        ahead = trees.add_scaled(gradient, self.at.momentum, v)
        drift = trees.add_scaled(ahead, self.at.scope, trees.add_scaled(x, -1, self.center))
        x = self._heated(trees.add_scaled(x, -self.at.rate, drift), number)
        new = trees.add_scaled(mean, 1 - self.at.decay, trees.add_scaled(x, -1, mean))
        return _Chain(x, new, v)

    def _heated(self, x: Tree, number: Any) -> Tree:
        """x + √η' ε z, with the same z on all devices."""
        noise = self.at.noise
        if isinstance(noise, numbers.Real) and noise == 0:
            return x
        z = self.sampler(jax.random.fold_in(self.key, number), x)
        return trees.add_scaled(x, jnp.sqrt(self.at.rate) * noise, meshes.laid_like(z, x))


def _in_pieces(objective: Objective, steps: int) -> Tree:
    """The batch in as many pieces, leaves [steps, n/steps, ...].

    Raises:
        ValueError: there is no batch, or `steps` does not divide it.
    """
    size = require_batch(objective, "local_entropy(split_batch=True)").size
    if size % steps:
        raise ValueError(
            f"`local_entropy(steps={steps}, split_batch=True)` divides the batch into {steps} "
            f"pieces, and it has {size} examples. Choose a number of steps that divides it."
        )
    pieces = objective.groups(size // steps, "`local_entropy(split_batch=True)`")
    return meshes.arranged(pieces, meshes.within(pieces))
