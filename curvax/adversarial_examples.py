"""A loss ↦ the loss on inputs that an attack has moved within a small ball.

    L_adv(θ) = 1/n Σᵢ max_{‖δᵢ‖ ≤ ε} ℓ(θ, xᵢ + δᵢ, yᵢ)

Perturbations δ are constants for every derivative in θ: at the maximum the gradient of the maximum
is the gradient there (Danskin). Madry et al., arXiv:1706.06083, eq. 2.1; with SAM's maximum over
the parameters around it Chen et al., arXiv:2106.01548, eq. 5.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from curvax import checks
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.devices import axes, meshes
from curvax.objective import Objective, check_key, evaluation, microbatching, pieces
from curvax.objective import require_batch as with_batch
from curvax.objective.microbatching import Parts

Channels = float | Sequence[float]
"""One number, or one for each channel of the last axis."""

NORMS = ("linf", "l2")
_START = "attack_start"
"""The entry of a batch that holds where the attack begins, divided with it into pieces."""


def pgd(
    epsilon: float,
    *,
    steps: int = 10,
    step_size: float | None = None,
    norm: str = "linf",
    random_start: bool = True,
    inputs: str = "image",
    bounds: tuple[float, float] = (0.0, 1.0),
    mean: Channels = 0.0,
    std: Channels = 1.0,
    unroll: bool = False,
) -> Attack:
    """Projected gradient descent, an attack that ascends the loss in the inputs.

        δ ← Π( δ + η sign ∂L/∂x )          "linf",   Π onto |δ| ≤ ε and x + δ in bounds
        δ ← Π( δ + η g / ‖g‖ ), g = ∂L/∂x   "l2",     Π onto ‖δ‖ ≤ ε and x + δ in bounds

    Madry et al., arXiv:1706.06083, section 2.1. With `steps=1, random_start=False` the fast
    gradient sign method (Goodfellow et al., arXiv:1412.6572), with `steps=1` that of fast
    adversarial training (Wong et al., arXiv:2001.03994).

    Args:
        epsilon: ε >= 0, in units of the images before normalisation, 8/255 for example; for "l2"
            the length over all pixels of an image. With 0 the inputs stay what they are.
        steps: gradients in the inputs, at least 1.
        step_size: η > 0; by default 2.5 ε / steps (Madry et al.), and 1.25 ε for one step from a
            random start (Wong et al.), for which 2.5 ε would always end at the corners.
        norm: "linf" or "l2".
        random_start: whether δ starts uniformly in the ball instead of at 0. Needs a key.
        inputs: the key of the batch's inputs, a floating array [n, ...].
        bounds: the lowest and the highest value of an image before normalisation.
        mean, std: of the normalisation (x - mean) / std that the inputs have gone through, a
            number or one for each channel; by default none.
        unroll: whether steps are compiled one after the other instead of as a loop: faster for
            convolutions on a CPU, a larger program elsewhere.

    Returns:
        An `Attack`, to be passed to `adversarial` or called.

    Raises:
        ValueError: ε or η is negative or not finite, `steps` is below 1, or `norm` is unknown.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> loss = lambda w, batch: jnp.mean(batch["image"] @ w)
        >>> batch = {"image": jnp.array([[0.5, 0.95]])}
        >>> attack = curvax.pgd(0.1, random_start=False)
        >>> attack(curvax.Objective(loss, batch), jnp.array([-1.0, 2.0])).round(3).tolist()
        [[-0.10000000149011612, 0.05000000074505806]]
    """
    checks.check_count("pgd", steps=steps)
    _check_length("epsilon", epsilon)
    if step_size is None:
        step_size = 1.25 * epsilon if steps == 1 and random_start else 2.5 * epsilon / steps
    _check_length("step_size", step_size)
    if norm not in NORMS:
        raise ValueError(f"`pgd` takes `norm` as one of {', '.join(NORMS)}, and got {norm!r}.")
    return Attack(
        epsilon, steps, step_size, norm, random_start, inputs, bounds,
        tuple(np.atleast_1d(mean)), tuple(np.atleast_1d(std)), unroll,
    )  # fmt: skip


def _check_length(name: str, value: Any) -> None:
    checks.check_static("pgd", **{name: value})
    if not 0 <= value < math.inf:
        raise ValueError(f"`pgd` takes `{name}` as a finite number, at least 0, and got {value}.")


def adversarial(objective: Objective, attack: Attack, *, key: jax.Array | None = None) -> Objective:
    """The loss under attack: every evaluation first moves the inputs to raise the loss there.

        θ ↦ L(θ, x + δ(θ)),   δ(θ) = attack(L, θ), a constant for derivatives

    Groups, micro-batches and devices attack their own examples, with the same random start for an
    example wherever it lies. With `sam_perturb` both of its passes attack at their own parameters:
    min over θ of max over ‖e‖ ≤ ρ of max over ‖δ‖ ≤ ε, arXiv:2106.01548, eq. 5. A gradient costs
    steps + 1 gradients, SAM twice as many.

    Cheaper variants are compositions. An attack at θ alone, steps + 2 gradients with SAM:

        objective = attack.moved(objective, attack(objective, params))

    One backward pass for the ascent in the parameters and in the inputs, as in the paper, 2
    gradients with SAM; repeated over a batch with `start=delta` this is free adversarial training
    (Shafahi et al., arXiv:1904.12843):

        value, grads, delta = attack.value_and_grad(objective, params)
        updates, state = tx.update(
            grads, state, params, value_fn=attack.moved(objective, delta))

    Args:
        objective: a loss over a batch that is a dictionary.
        attack: `pgd(...)`.
        key: of the random start, a new one each step; by default that of the objective.

    Returns:
        An `Objective` with the same options, for `value_and_grad`, stages and products.

    Raises:
        ValueError: there is no batch, it has no floating entry `inputs`, its values are outside of
            the attack's bounds (not checked under `jit`), or a random start has no key.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, curvax
        >>> margin = lambda w, batch: batch["label"] * (batch["image"] @ w)
        >>> loss = lambda w, batch: jnp.mean(jax.nn.softplus(-margin(w, batch)))
        >>> batch = {"image": jnp.array([[0.2, 0.8], [0.6, 0.4]]), "label": jnp.array([1.0, -1.0])}
        >>> objective = curvax.Objective(loss, batch)
        >>> robust = curvax.adversarial(objective, curvax.pgd(0.1), key=jax.random.key(0))
        >>> w = jnp.array([-1.0, 2.0])
        >>> round(float(objective(w)), 3), round(float(robust(w)), 3)
        (0.509, 0.631)
        >>> tx = curvax.sam(optax.sgd(0.1), rho=0.05)
        >>> value, grads = robust.value_and_grad(w)
        >>> updates, _ = tx.update(grads, tx.init(w), w, value_fn=robust)
    """
    attack.check(objective)
    half = "loss" if objective.model is None else "model"
    inner = getattr(objective, half)

    def attacked(params: Tree, batch: Any, *keys: jax.Array) -> Any:
        clean = {name: x for name, x in batch.items() if name != _START}
        alone = {half: lambda params, batch: inner(params, batch, *keys), "key": None}
        part = pieces.changed(objective, batch=clean, microbatch=None, **alone)
        # One equation of the program, whose outputs are per example, to what reads its aux.
        move = jax.checkpoint(functools.partial(_moved_inputs, attack, part))
        x = lax.stop_gradient(move(lax.stop_gradient(params), clean, batch.get(_START)))
        return inner(params, clean | {attack.inputs: x}, *keys)

    start = attack.start(objective, key)
    batch = objective.batch if start is None else objective.batch | {_START: start}
    return pieces.changed(objective, batch=batch, **{half: attacked})


def _moved_inputs(
    attack: Attack, part: Objective, params: Tree, batch: Any, start: jax.Array | None
) -> jax.Array:
    part = pieces.changed(part, batch=batch)
    return attack.move(part, attack.ascend(part, params, start, attack.steps))


@dataclasses.dataclass(frozen=True)
class Attack:
    """A bounded perturbation δ of the inputs that raises the loss, made by `pgd`.

    Perturbations are arrays [n, ...] shaped like the inputs, in units of the images before
    normalisation and in float32 or wider.

    Attributes:
        epsilon, steps, step_size, norm, random_start, inputs, bounds, mean, std, unroll: as in
            `pgd`.

    Examples:
        >>> import jax.numpy as jnp, curvax
        >>> loss = lambda w, batch: jnp.mean(batch["image"] @ w)
        >>> objective = curvax.Objective(loss, {"image": jnp.array([[0.5, 0.5]])})
        >>> attack, w = curvax.pgd(0.1, random_start=False), jnp.array([-1.0, 2.0])
        >>> delta = attack(objective, w)
        >>> round(float(attack.moved(objective, delta)(w)), 3)
        0.8
    """

    epsilon: float
    steps: int
    step_size: float
    norm: str
    random_start: bool
    inputs: str
    bounds: tuple[float, float]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    unroll: bool

    def __str__(self) -> str:
        return f"PGD-{self.steps}, {self.norm} ε = {self.epsilon:.4g}"

    def __call__(
        self,
        objective: Objective,
        params: Tree,
        *,
        start: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """The perturbation δ of the inputs at these parameters; the batch in micro-batches.

        Args:
            objective: a loss over a batch that is a dictionary.
            params: the point θ.
            start: δ to start from, instead of 0 or a random start.
            key: of the random start; by default that of the objective.

        Returns:
            δ, [n, ...].
        """
        begin = self._begin(objective, start, key)
        ascend = lambda part, begin: _joined(self.ascend(part, params, begin, self.steps))
        found = evaluation.microbatch_mean(objective, ascend, begin, aux=False)
        return lax.stop_gradient(microbatching.finished(found))

    def value_and_grad(
        self,
        objective: Objective,
        params: Tree,
        *,
        start: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[Any, Tree, jax.Array]:
        """The loss, its gradient in θ, and the attack, whose last step shares the backward pass.

        Args:
            objective, params, start, key: as in a call.

        Returns:
            (L, ∇L, δ): the value, with `has_aux` a pair, and the gradient are those at the
            perturbation before the last step.

        Raises:
            ValueError: as in `Objective.value_and_grad`.
        """
        begin = self._begin(objective, start, key)
        here = axes.vary(params, objective.local_axes(params))

        def of(part: Objective, begin: jax.Array) -> Tree:
            delta = self.ascend(part, here, begin, self.steps - 1)
            value = lambda part, both: _value_at(part, both[0], self.inputs, both[1])
            both = (here, self.move(part, delta))
            out, (grads, slope) = evaluation.differentiated(part, objective, both, value)
            return out, grads, _joined(self._step(self._room(part), delta, slope))

        found = evaluation.microbatch_mean(objective, of, begin)
        (value, aux), grads, delta = microbatching.finished(found)
        evaluation.refuse_undecided(aux)
        return ((value, aux) if objective.has_aux else value), grads, lax.stop_gradient(delta)

    def moved(self, objective: Objective, delta: jax.Array) -> Objective:
        """The same loss on the inputs x + δ.

        Args:
            objective: the loss on x.
            delta: δ, [n, ...].

        Returns:
            An `Objective` with the same options.
        """
        return objective.on(objective.batch | {self.inputs: self.move(objective, delta)})

    def move(self, objective: Objective, delta: jax.Array) -> jax.Array:
        """The inputs x + δ / std, typed as the inputs."""
        x = objective.batch[self.inputs]
        return (trees.widen(x) + delta / self._channels(self.std, x)).astype(x.dtype)

    def ascend(
        self, part: Objective, params: Tree, start: jax.Array | None, steps: int
    ) -> jax.Array:
        """δ after some steps on a batch in one piece."""
        room = self._room(part)
        loss = lambda x: _value_at(part, params, self.inputs, x)[0] * part.size
        slope = jax.grad(loss)
        step = lambda delta, _: (self._step(room, delta, slope(self.move(part, delta))), None)
        begin = self._nowhere(part) if start is None else self._projected(room, start)
        return lax.scan(step, begin, None, length=steps, unroll=self.unroll or 1)[0]

    def start(self, objective: Objective, key: jax.Array | None) -> jax.Array | None:
        """A random start for each example, the same on any devices; None where δ starts at 0.

        Raises:
            ValueError: there is no key.
        """
        if not self.random_start or self.epsilon == 0:
            return None
        key = objective.key if key is None else key
        if key is None:
            raise ValueError(
                "`pgd` starts at random, and there is no key. Pass `adversarial(objective, attack, "
                "key=key)` with a new key each step, or use `pgd(..., random_start=False)`."
            )
        check_key(key, "`adversarial(key=)`")
        x = objective.batch[self.inputs]
        draw = functools.partial(self._draw, shape=x.shape[1:], dtype=trees.wide_dtype(x.dtype))
        return jax.vmap(draw)(objective.example_keys(key))

    def check(self, objective: Objective) -> None:
        """Checks the batch that is attacked.

        Raises:
            ValueError: as in `adversarial`.
        """
        batch = with_batch(objective, "pgd").batch
        if not isinstance(batch, dict) or self.inputs not in batch:
            known = f"the entries {', '.join(map(repr, batch))}" if isinstance(batch, dict) else (
                f"a {type(batch).__name__}"
            )  # fmt: skip
            raise ValueError(
                f"`pgd` moves the entry {self.inputs!r} of the batch, and the batch has {known}. "
                "Name the inputs of your model, `pgd(epsilon, inputs=...)`."
            )
        self._check_values(batch[self.inputs])

    def _check_values(self, x: Any) -> None:
        low, high = self.bounds
        if not trees.is_float(x):
            raise ValueError(
                f"`pgd` moves floating inputs between {low} and {high}, and {self.inputs!r} has "
                f"dtype {x.dtype}. Convert the images first, `image.astype(jnp.float32) / 255`."
            )
        if isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
            return
        images = np.asarray(x, float) * np.array(self.std) + np.array(self.mean)
        slack = 1e-3 * (high - low)  # a normalisation and its inverse round
        if images.size and not (images.min() >= low - slack and images.max() <= high + slack):
            raise ValueError(
                f"`pgd` takes ε = {self.epsilon} in units of images from {low} to {high}, and "
                f"{self.inputs!r} has values from {images.min():.3g} to {images.max():.3g}. Give "
                "the normalisation that they have gone through, `pgd(..., mean=, std=)`, or the "
                "range of your data, `pgd(..., bounds=)`."
            )

    def _begin(
        self, objective: Objective, start: jax.Array | None, key: jax.Array | None
    ) -> jax.Array:
        self.check(objective)
        drawn = self.start(objective, key) if start is None else start
        return self._nowhere(objective) if drawn is None else drawn

    def _nowhere(self, objective: Objective) -> jax.Array:
        x = objective.batch[self.inputs]
        zeros = meshes.zeros(jnp.shape(x), trees.wide_dtype(x.dtype), jax.typeof(x))
        return axes.vary(zeros, axes.varying(x))

    def _room(self, objective: Objective) -> tuple[jax.Array, jax.Array]:
        """The lowest and highest δ at which each pixel stays in bounds; 0 is always among them."""
        image = self._images(objective.batch[self.inputs])
        return jnp.minimum(self.bounds[0] - image, 0), jnp.maximum(self.bounds[1] - image, 0)

    def _images(self, x: jax.Array) -> jax.Array:
        """The inputs before normalisation."""
        return trees.widen(x) * self._channels(self.std, x) + self._channels(self.mean, x)

    def _channels(self, values: tuple[float, ...], x: jax.Array) -> np.ndarray:
        number = np.asarray(values, trees.wide_dtype(x.dtype))
        return number.reshape((1,) * (jnp.ndim(x) - 1) + (-1,))

    def _step(
        self, room: tuple[jax.Array, jax.Array], delta: jax.Array, slope: jax.Array
    ) -> jax.Array:
        """One step from δ along ∂L/∂x, projected."""
        g = trees.widen(slope) / self._channels(self.std, slope)
        along = jnp.sign(g) if self.norm == "linf" else jax.vmap(trees.unit)(g)
        return self._projected(room, delta + self.step_size * along)

    def _projected(self, room: tuple[jax.Array, jax.Array], delta: jax.Array) -> jax.Array:
        if self.norm == "linf":
            delta = jnp.clip(delta, -self.epsilon, self.epsilon)
        else:
            delta = jax.vmap(functools.partial(_shortened, self.epsilon))(delta)
        return jnp.clip(delta, *room)

    def _draw(self, key: jax.Array, *, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """A point of the ball, uniformly."""
        if self.norm == "linf":
            return jax.random.uniform(key, shape, dtype, -self.epsilon, self.epsilon)
        of_direction, of_length = jax.random.split(key)
        share = jax.random.uniform(of_length, (), dtype) ** (1 / math.prod(shape))
        return self.epsilon * share * trees.unit(jax.random.normal(of_direction, shape, dtype))


def _shortened(epsilon: float, delta: jax.Array) -> jax.Array:
    return delta * jnp.minimum(1, trees.ratio(epsilon, trees.norm(delta)))


def _value_at(part: Objective, params: Tree, name: str, x: jax.Array) -> tuple[jax.Array, Any]:
    """(L, aux) with the entry `name` of the batch replaced; a model's loss keeps its targets."""
    moved = pieces.changed(part, batch=part.batch | {name: x}, whole=part.whole)
    if part.model is None:
        return evaluation.value_and_aux(moved, params)
    outputs, aux = moved.outputs(params)
    return evaluation.loss_of_outputs(part, outputs), aux


def _joined(x: jax.Array) -> Parts:
    """Values of single examples, concatenated over micro-batches."""
    return Parts([x], ("concat",), itemgetter(0))
