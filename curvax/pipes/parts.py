"""The parts of an optimiser: their names, the options they were made with, and what is inside."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import optax

Part = TypeVar("Part", bound=optax.GradientTransformation)


class NamedUpdate:
    """An update function that knows the name of its part.

    Attributes:
        name: as the user wrote it: `hutchinson_diag`, `ema`.
        options: argument ↦ value of the factory, where known.
        parts: the parts of a pipe; () otherwise.
    """

    options: Mapping[str, Any] = {}
    parts: tuple[optax.GradientTransformation, ...] = ()

    def __init__(self, update: Any, name: str):
        self.update, self.name = update, name

    def __call__(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return self.update(updates, state, params, **extra)


def name_of(part: optax.GradientTransformation) -> str:
    """The name of a part in error messages, as the user wrote it: `hutchinson_diag`, `ema`."""
    if isinstance(part.update, NamedUpdate):
        return part.update.name
    return getattr(part.update, "__qualname__", type(part).__name__).split(".")[0]


def options_of(part: optax.GradientTransformation) -> Mapping[str, Any]:
    """The options a part was made with, as `with_options` recorded them; {} if it did not."""
    return part.update.options if isinstance(part.update, NamedUpdate) else {}


def parts_of(part: optax.GradientTransformation) -> tuple[optax.GradientTransformation, ...]:
    """The parts of a pipe; for anything else, the part itself."""
    inner = part.update.parts if isinstance(part.update, NamedUpdate) else ()
    return inner or (part,)


def with_options(part: Part, name: str, options: Mapping[str, Any]) -> Part:
    """The part, with the name of its factory and the options that it was called with.

    A stage and a pipe keep their own name.
    """
    named = isinstance(part.update, NamedUpdate)
    update = copy.copy(part.update) if named else NamedUpdate(part.update, name)
    update.options = options
    return part._replace(update=update)


def walk(part: optax.GradientTransformation) -> Iterator[optax.GradientTransformation]:
    """A part and those among its options, at any depth; of a pipe, its parts."""
    parts = parts_of(part)
    if parts[0] is part:
        yield part
    is_part = lambda x: isinstance(x, optax.GradientTransformation)
    options = jax.tree.leaves(dict(options_of(part)), is_leaf=is_part)
    for each in (*parts, *filter(is_part, options)):
        if each is not part:
            yield from walk(each)
