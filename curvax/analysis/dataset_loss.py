"""A loss over all batches of a loader, for data sets that exceed the memory of a device.

The loop over batches runs on the host, the sums stay on the device. The algorithms of
`curvax.linalg` call it with `jit` disabled, under which JAX runs their loops in Python.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from curvax.analysis.compiling import compiled_once
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.objective import Objective, check_key, value_aux_and_grad

Wrapper = Callable[[Iterable[Tree]], Iterable[Tree]]


class DatasetLoss:
    """Mean loss over all batches of a loader, for the functions of `curvax.analysis`.

        L(θ) = Σ_b w_b L_b(θ) / Σ_b w_b

    The weight of a batch is its number of examples, or its `weight`, so that a smaller last batch
    counts in proportion (and is compiled separately). Each gradient and each curvature product is
    one pass over the data.

        train_loss = DatasetLoss(curvax.categorical("label"), loader, model=predict)
        pairs = top_eigenpairs(train_loss, params, k=5)

    Args:
        loss: the loss of one batch, as in `curvax.Objective`.
        loader: a list of batches, a data loader, or any iterable that starts anew each time, in
            any order.
        model, has_aux, microbatch, weight: as in `curvax.Objective`; the aux is dropped.
        key: a typed key, folded with the number of the batch; the same in each pass.
        progress: True for a progress bar on the terminal (needs rich), or a callable that wraps
            the loader, such as tqdm.

    Raises:
        ValueError: the loader is an iterator, which is exhausted after one pass.
        TypeError: `key` is not a typed key.

    Examples:
        >>> import jax.numpy as jnp
        >>> from curvax import analysis
        >>> loss = lambda w, batch: jnp.mean((batch @ w) ** 2)
        >>> batches = [jnp.ones((4, 2)), jnp.zeros((2, 2))]
        >>> dataset_loss = analysis.DatasetLoss(loss, batches)
        >>> round(float(dataset_loss(jnp.ones(2))), 3)  # (4 · 4 + 2 · 0) / 6
        2.667
    """

    def __init__(
        self,
        loss: Callable[..., Any], loader: Iterable[Tree], *,
        model: Callable[..., Any] | None = None, has_aux: bool = False,
        key: jax.Array | None = None, microbatch: int | None = None,
        weight: Callable[[Tree], Any] | str | None = None, progress: bool | Wrapper = False,
    ):  # fmt: skip
        self.loss, self.loader, self.key, self.progress = loss, loader, key, progress
        self._options: dict[str, Any] = dict(
            model=model, has_aux=has_aux, microbatch=microbatch, weight=weight
        )
        if key is not None:
            check_key(key, "`DatasetLoss(key=)`")
        if isinstance(loader, Iterator):
            raise ValueError(
                "`DatasetLoss` iterates over its loader once for each evaluation, and received a "
                f"`{type(loader).__name__}`, which is exhausted after one pass. Pass an iterable "
                "that starts anew: a list of batches, or the data loader instead of `iter(loader)`."
            )

    def __call__(self, params: Tree) -> jax.Array:
        """L(θ), a scalar in float32 or wider."""
        return self.mean(_value, params)

    def value_and_grad(self, params: Tree) -> tuple[jax.Array, Tree]:
        """(L(θ), ∇L(θ)), the gradient in the dtypes of the parameters."""
        value, grads = self.mean(_value_and_grad, params)
        return value, trees.cast_like(grads, params)

    def mean(self, f: Callable[..., Tree], params: Tree, *arrays: Tree, **options: Any) -> Tree:
        """Weighted mean over the batches of `f(objective, params, *arrays, **options)`.

        Args:
            f: a function of the `Objective` of one batch that returns a tree of arrays; compiled
                once if the same function object is passed each time.
            params: the point θ.
            *arrays: further arguments of the compiled program.
            **options: static arguments.

        Returns:
            A tree like the result of f, in float32 or wider.

        Raises:
            TypeError: `params` or `arrays` are traced.
            ValueError: the loader is empty.
        """
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((params, arrays))):
            raise TypeError(
                "`DatasetLoss` iterates over its loader on the host, and was called while JAX "
                "traces. Call it outside of `jit`, `grad` and `vmap`; inside, use "
                "`curvax.Objective(loss, batch, microbatch=...)`."
            )
        total = None
        with jax.disable_jit(False):
            for objective in self._objectives():
                term = _weighed(objective, params, *arrays, f=f, **options)
                total = term if total is None else _sum(total, term)
            if total is None:
                raise ValueError(
                    "`DatasetLoss` averages over the batches of its loader, and the loader gave "
                    "none. Pass an iterable that is not empty and starts anew at each iteration."
                )
            return _quotient(*total)

    def _objectives(self) -> Iterator[Objective]:
        for number, batch in enumerate(self._batches()):
            key = None if self.key is None else jax.random.fold_in(self.key, number)
            yield Objective(self.loss, batch, key=key, **self._options)

    def _batches(self) -> Iterable[Tree]:
        if callable(self.progress):
            return self.progress(self.loader)
        return _on_terminal(self.loader) if self.progress else self.loader


def _on_terminal(loader: Iterable[Tree]) -> Iterable[Tree]:
    from rich.console import Console
    from rich.progress import track

    console = Console()
    shown = console.is_interactive or console.is_jupyter
    return track(loader, "batches", console=console, transient=True, disable=not shown)


def _value(objective: Objective, params: Tree) -> jax.Array:
    return objective(params)


def _value_and_grad(objective: Objective, params: Tree) -> tuple[jax.Array, Tree]:
    (value, _), grads = value_aux_and_grad(objective, params)
    return value, grads


@compiled_once
def _weighed(
    objective: Objective, params: Tree, *arrays: Tree, f: Callable[..., Tree], **options: Any
) -> tuple[Tree, jax.Array]:
    """(w f, w)"""
    weight = objective.batch_weight()
    w = jnp.asarray(objective.size if weight is None else weight, jnp.result_type(float))
    out = f(objective, params, *arrays, **options)
    return jax.tree.map(lambda x: jnp.where(w == 0, 0, w * trees.widen(x)), out), w


@jax.jit
def _sum(a: Tree, b: Tree) -> Tree:
    return jax.tree.map(jnp.add, a, b)


@jax.jit
def _quotient(total: Tree, weight: jax.Array) -> Tree:
    return jax.tree.map(lambda x: trees.ratio(x, weight.astype(x.dtype)), total)
