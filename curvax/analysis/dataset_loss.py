"""A loss over a whole data set, batch by batch from a loader: what no device holds at once.

The sums lie on the device, the loop over batches runs on the host. The loops of `curvax.linalg`
around it are JAX's own, which are Python's where jit is disabled.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from curvax.analysis.evaluation.compiling import compiled_once
from curvax.arithmetic import trees
from curvax.arithmetic.trees import Tree
from curvax.objective import Objective, check_key

Wrapper = Callable[[Iterable[Tree]], Iterable[Tree]]


class Sweep:
    """The loss over all batches of a loader, for the functions of `curvax.analysis`.

        L(θ) = Σ_b w_b L_b(θ) / Σ_b w_b

    A batch weighs as many examples as it has, or its `weight`, so a shorter last one counts for
    what it is (and compiles once more). Each gradient and each product is one pass over the data.

        sweep = Sweep(curvax.categorical("label"), loader, model=predict)
        pairs = top_eigenpairs(sweep, params, k=5)

    Args:
        loss: as `Objective` takes it, with `model`, `has_aux` (the aux is dropped), `microbatch`
            and `weight`.
        loader: the batches, in an order that does not matter, all of them at each iteration: a
            list, a data loader, any iterable that starts anew.
        key: a typed key, folded with the number of the batch; the same at each pass.
        progress: True for a bar on the terminal (needs rich), or a callable around the loader,
            such as tqdm.

    Raises:
        ValueError: the loader is an iterator, which ends with its first pass.
        TypeError: `key` is no typed key.
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        loader: Iterable[Tree],
        *,
        model: Callable[..., Any] | None = None,
        has_aux: bool = False,
        key: jax.Array | None = None,
        microbatch: int | None = None,
        weight: Callable[[Tree], Any] | str | None = None,
        progress: bool | Wrapper = False,
    ):
        self.loss, self.loader, self.key, self.progress = loss, loader, key, progress
        self._options: dict[str, Any] = dict(
            model=model, has_aux=has_aux, microbatch=microbatch, weight=weight
        )
        if key is not None:
            check_key(key, "`Sweep(key=)`")
        if isinstance(loader, Iterator):
            raise ValueError(
                "`Sweep` goes through its loader again and again, and was given a "
                f"`{type(loader).__name__}`, which ends with its first pass. Pass what makes it "
                "anew each time: a list of batches, or a data loader instead of `iter(loader)`."
            )

    def __call__(self, params: Tree) -> jax.Array:
        """L(θ), a scalar in float32 or wider."""
        return self.mean(_value, params)

    def value_and_grad(self, params: Tree) -> tuple[jax.Array, Tree]:
        """(L(θ), ∇L(θ))"""
        value, grads = self.mean(_value_and_grad, params)
        return value, trees.cast_like(grads, params)

    def mean(self, f: Callable[..., Tree], params: Tree, *arrays: Tree, **options: Any) -> Tree:
        """The mean over batches, by weight, of `f(objective, params, *arrays, **options)`.

        Args:
            f: of the objective on one batch; compiled once if it is always the same function.
            params: the point.
            *arrays: handed on.
            **options: static, handed on.

        Returns:
            What f returns, in float32 or wider.

        Raises:
            TypeError: something here is traced.
            ValueError: the loader is empty.
        """
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((params, arrays))):
            raise TypeError(
                "A `Sweep` goes through its loader on the host, and was called while JAX traces. "
                "Call it outside of `jit`, `grad` and `vmap`; inside, use `curvax.Objective(loss, "
                "batch, microbatch=...)`."
            )
        total = None
        with jax.disable_jit(False):
            for objective in self._objectives():
                term = _weighed(objective, params, *arrays, f=f, **options)
                total = term if total is None else _sum(total, term)
            if total is None:
                raise ValueError(
                    "`Sweep` averages over the batches of its loader, and the loader gave none. "
                    "Pass what starts anew at each iteration, and is not empty."
                )
            return _quotient(*total)

    def _objectives(self) -> Iterator[Objective]:
        for number, batch in enumerate(self._tracked()):
            key = None if self.key is None else jax.random.fold_in(self.key, number)
            yield Objective(self.loss, batch, key=key, **self._options)

    def _tracked(self) -> Iterable[Tree]:
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
    (value, _), grads = objective._value_aux_and_grad(params)
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
