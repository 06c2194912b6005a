"""A jaxpr ↦ the equations in it that compute an activation function or a softmax.

ReLU, SiLU and others are calls by name. JAX inlines GELU and softmax, which are recognised by their
form: x times a sigmoid of x, and an exponential over its own sum.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend import core

UNITS = (
    "relu", "relu6", "leaky_relu", "elu", "celu", "selu", "silu", "swish", "mish", "hard_silu",
    "hard_swish", "squareplus",
)  # fmt: skip
"""Functions of `jax.nn` that appear as named calls in a jaxpr."""
SIGMOIDS = {"tanh": "gelu", "erf": "gelu", "erfc": "gelu", "logistic": "silu"}
"""The primitive σ in x σ(x), and the name of that activation."""
ELEMENTWISE = (
    "add", "sub", "mul", "div", "neg", "integer_pow", "pow", "square", "exp", "copy", "copy_p",
    "convert_element_type", *SIGMOIDS,
)  # fmt: skip
RESHAPED = ("broadcast_in_dim", "reshape", "convert_element_type", "transpose")


class Found(NamedTuple):
    """An activation or softmax in a jaxpr."""

    kind: str
    """`relu`, `gelu`, …, or `softmax`."""
    before: Any
    """The input variable: the pre-activation."""
    after: Any
    """The output variable."""


class _Origin(NamedTuple):
    """The variable `root` that a value is an elementwise function of, and the sigmoid in it."""

    root: Any
    sigmoid: str | None = None


def recognised(jaxpr: core.Jaxpr) -> dict[int, Found]:
    """`{number of the equation: Found}`, without the bodies of nested jaxprs."""
    return dict(_calls(jaxpr)) | dict(_gated(jaxpr)) | dict(_softmaxes(jaxpr))


def _calls(jaxpr: core.Jaxpr) -> Iterator[tuple[int, Found]]:
    for n, eqn in enumerate(jaxpr.eqns):
        if eqn.params.get("name") in UNITS:
            yield n, Found(eqn.params["name"], eqn.invars[0], eqn.outvars[0])


def _gated(jaxpr: core.Jaxpr) -> Iterator[tuple[int, Found]]:
    """x σ(c x), for any factor c."""
    origins: dict[Any, _Origin] = {}
    for n, eqn in enumerate(jaxpr.eqns):
        name = eqn.primitive.name
        if name not in ELEMENTWISE:
            continue
        given = [origins.get(x, _Origin(x)) for x in eqn.invars if isinstance(x, core.Var)]
        if len({origin.root for origin in given}) != 1:
            continue
        root, sigmoids = given[0].root, [origin.sigmoid for origin in given]
        gates = [s for s in sigmoids if s]
        if name == "mul" and len(given) == 2 and len(gates) == 1:
            yield n, Found(SIGMOIDS[gates[0]], root, eqn.outvars[0])
        else:
            sigmoid = name if name in SIGMOIDS else next(iter(gates), None)
            origins[eqn.outvars[0]] = _Origin(root, sigmoid)


def _softmaxes(jaxpr: core.Jaxpr) -> Iterator[tuple[int, Found]]:
    """exp(x) / Σ exp(x)."""
    exponents: dict[Any, Any] = {}
    sums: dict[Any, Any] = {}
    for n, eqn in enumerate(jaxpr.eqns):
        name, x, out = eqn.primitive.name, eqn.invars[0] if eqn.invars else None, eqn.outvars[0]
        if name == "exp":
            exponents[out] = x
        elif name == "reduce_sum" and isinstance(x, core.Var) and x in exponents:
            sums[out] = x
        elif name in RESHAPED and isinstance(x, core.Var) and x in sums:
            sums[out] = sums[x]
        elif name == "div" and isinstance(x, core.Var) and x in sums.values():
            by = eqn.invars[1]
            if isinstance(by, core.Var) and sums.get(by) is x:
                yield n, Found("softmax", exponents[x], out)
