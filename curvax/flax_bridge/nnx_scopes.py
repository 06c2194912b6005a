"""Named scopes for nnx: a function of a module ↦ the function with `jax.named_scope` per module.

Linen names what a module computes by the path of the module, which profilers and `curvax.analysis`
use; nnx does not.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from curvax import compat

Path = tuple[str, ...]


def named_modules(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a function of an nnx module with every module in a named scope, as linen does.

        predict, params = nnx_loss(model, named_modules(lambda model, batch: model(batch["x"])))
        objective = curvax.Objective(curvax.categorical("y"), batch, model=predict, has_aux=True)
        curvax.analysis.active_fraction(objective, params)

    Inside `nnx.scan` or `nnx.vmap`, which create modules of their own, a module has the name of the
    only module of its class in the model, or else of its class.

    Args:
        fn: a function whose first argument is the module.

    Returns:
        The function, with the same arguments and results.

    Examples:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from curvax.flax_bridge import named_modules
        >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> named_modules(lambda model, x: model(x))(model, jnp.ones((4, 3))).shape
        (4, 2)
    """

    @functools.wraps(fn)
    def call(model: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        with _scoped(_Names(model)):
            return fn(model, *args, **kwargs)

    return call


class _Names:
    """The path of each module, including those that a transformation creates."""

    def __init__(self, model: nnx.Module):
        self.paths: dict[int, Path] = {}
        self.modules: list[nnx.Module] = []  # Referenced, so that no id is reused.
        self.inside: list[Path] = [()]
        self._add(model, ())
        self.classes = {type(module) for module in self.modules}

    def _add(self, model: nnx.Module, base: Path) -> None:
        for path, module in compat.iter_modules(model):
            self.modules.append(module)
            self.paths[id(module)] = (*base, *map(str, path))

    def path(self, module: nnx.Module) -> Path:
        if id(module) not in self.paths:
            alike = {self.paths[id(m)] for m in self.modules if type(m) is type(module)}
            self._add(module, alike.pop() if len(alike) == 1 else (type(module).__name__,))
        return self.paths[id(module)]

    @contextlib.contextmanager
    def scope(self, module: nnx.Module) -> Iterator[None]:
        """The scope of a module, relative to the scope of its caller."""
        path, outer = self.path(module), self.inside[-1]
        own = path[len(outer) :] if path[: len(outer)] == outer else path
        self.inside.append(path)
        try:
            with jax.named_scope("/".join(own)) if own else contextlib.nullcontext():
                yield
        finally:
            self.inside.pop()


@contextlib.contextmanager
def _scoped(names: _Names) -> Iterator[None]:
    """Calls of the classes of these modules enter the scope of the module."""
    own = {cls: vars(cls).get("__call__") for cls in names.classes if callable(cls.__call__)}

    def scoped(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapper(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
            with names.scope(self):
                return call(self, *args, **kwargs)

        return wrapper

    try:
        for cls in own:
            cls.__call__ = scoped(cls.__call__)  # type: ignore[method-assign]
        yield
    finally:
        for cls, call in own.items():
            if call is None:
                del cls.__call__
            else:
                cls.__call__ = call  # type: ignore[method-assign]
