"""Options of Kronecker factors, and what they need of an objective."""

from typing import Any, NamedTuple

from curvax.arithmetic.trees import Tree
from curvax.objective import (
    Objective,
    as_objective,
    check_key,
    require_batch,
    require_likelihood,
    require_model,
)

FISHERS = ("exact", "sampled", "empirical")
SHARINGS = ("expand", "reduce")
BIASES = ("joint", "separate")


class Options(NamedTuple):
    """How factors are made."""

    fisher: str
    sharing: str
    bias: str

    def checked(self, where: str = "kronecker_factors") -> "Options":
        """These options of `where`.

        Raises:
            ValueError: one of them is unknown.
        """
        for name, known in (("fisher", FISHERS), ("sharing", SHARINGS), ("bias", BIASES)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"`{where}({name}=)` is one of {known}, and is {value!r}.")
        return self


def check_draws(fisher: str, labels: Any, key: Any, where: str) -> None:
    """Checks that labels or a key are given if they are needed, and not otherwise.

    Raises:
        ValueError: they are missing, not needed, or both given.
        TypeError: the key is not a typed key.
    """
    given = [name for name, x in (("labels", labels), ("key", key)) if x is not None]
    if fisher != "sampled" and given:
        raise ValueError(
            f"`{where}` draws labels only with `fisher='sampled'`, and received {given} with "
            f"{fisher!r}. Drop them, or pass `fisher='sampled'`."
        )
    if fisher == "sampled" and len(given) != 1:
        raise ValueError(
            f"`{where}` with `fisher='sampled'` takes either `labels` or a `key` to draw them "
            f"with, and received {given or 'neither'}. Pass `key=jax.random.key(0)`, a new one in "
            "every step."
        )
    if key is not None:
        check_key(key, f"`{where}(key=)`")


def required(objective: Any, params: Tree, fisher: str, where: str) -> Objective:
    """The objective, if it has a batch and the model and the likelihood that are needed.

    Raises:
        ValueError: one of them is missing.
    """
    objective = require_batch(as_objective(objective, where, params), where)
    if fisher == "empirical":
        return require_model(objective, f"`{where}`")
    require_likelihood(objective, f"`{where}` with `fisher={fisher!r}`")
    return objective
