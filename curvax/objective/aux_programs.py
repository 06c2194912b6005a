"""Finds where a function reduces its examples, from traces on a piece and on the whole batch.

An axis whose size differs between the two traces is an axis of examples. A sum or a maximum over it
is a value that pieces contribute to; the rest of the program is evaluated on the reduced values,
with the sizes of the whole batch.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

INLINED = ("jit", "pjit", "closed_call", "core_call")
OPAQUE = ("checkpoint", "remat2", "remat", "custom_jvp_call", "custom_vjp_call", "scan")
REDUCTIONS = {
    "reduce_sum": "sum", "reduce_max": "max", "reduce_or": "max", "reduce_min": "min",
    "reduce_and": "min",
}  # fmt: skip
SCATTERS = {"scatter-add": "sum", "scatter_add": "sum", "scatter_max": "max", "scatter_min": "min"}
SCANNED = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
LINEAR = (
    "add", "sub", "add_any", "neg", "convert_element_type", "reshape", "broadcast_in_dim",
    "squeeze", "expand_dims", "copy", "copy_p", "transpose", "concatenate", "reduce_sum", "slice",
    "stop_gradient", "optimization_barrier", "pvary", "pcast",
)  # fmt: skip
PRODUCTS = ("mul", "dot_general")

Place = tuple[int, int, int]
"""(number of an equation in the trace of the piece, in that of the whole, index of its output)"""

Root = tuple[str, int, int, int]
"""(reduction, *place) of a reduced value, or ("input", number, 0, 0) of an input."""

SHAPES = ("reshape", "squeeze", "expand_dims", "broadcast_in_dim")
"""Primitives that JAX may omit when a piece is a single example."""


class Unalike(Exception):
    """The two traces differ in more than the sizes of their arrays."""


class Info(NamedTuple):
    """What the analysis knows about one value of the program."""

    axis: int | None = None
    """The axis of examples, if the value has one."""
    dep: bool = False
    """Whether it depends on the examples."""
    bad: str | None = None
    """Why the value on the whole batch does not follow from those on the pieces."""
    centred: bool = False
    """Whether per-example values were combined with a statistic of their piece."""
    linear: bool = True
    """Whether it is a linear function of reduced values."""
    running: bool = False
    """Whether it adds a new statistic to an old array, as batch norm's running averages do."""
    param: bool = False
    """Whether it depends on parameters or on arrays that the function closes over."""
    zero: bool = False
    """Whether it is an array of zeros."""
    sized: bool = False
    """Whether it is a constant that depends on the number of examples, such as 1/n."""
    roots: frozenset[Root] = frozenset()
    """The inputs and reduced values from which the whole batch's value is computed."""


def read(piece: Any, whole: Any, inputs: list[Info]) -> list[Info]:
    """What is known of the outputs of a function, from its traces on a piece and on the whole.

    Args:
        piece, whole: closed jaxprs.
        inputs: what is known of their inputs, constants first.

    Raises:
        Unalike: the traces differ in more than the sizes of their arrays.
    """
    return _walk(opened(piece)[0], opened(whole)[0], inputs, Numbers())


class Numbers:
    """Counters of the equations of both traces."""

    def __init__(self) -> None:
        self.piece, self.whole = itertools.count(), itertools.count()


def _pairs(piece: Any, whole: Any, numbers: Numbers) -> Iterator[tuple[Any, Any]]:
    """Pairs the equations of both traces, skipping those that only the whole batch needs.

    Raises:
        Unalike: the traces differ in more than shapes.
    """
    ahead = iter(whole.eqns)
    for a in piece.eqns:
        b = next(ahead, None)
        while b is not None and a.primitive.name != b.primitive.name in SHAPES:
            next(numbers.whole)
            b = next(ahead, None)
        if b is None or a.primitive.name != b.primitive.name or len(a.outvars) != len(b.outvars):
            raise Unalike
        yield a, b
    if any(True for _ in ahead):
        raise Unalike


def _walk(piece: Any, whole: Any, inputs: list[Info], numbers: Numbers) -> list[Info]:
    env: dict[Any, Info] = dict(zip(piece.invars, inputs))
    known = lambda x: Info() if isinstance(x, core.Literal) else env[x]
    for a, b in _pairs(piece, whole, numbers):
        infos, inner = [known(x) for x in a.invars], body(a)
        infos = [
            Info(sized=True) if _differ(x, y) else info
            for info, x, y in zip(infos, a.invars, b.invars, strict=True)
        ]
        if inner is not None:
            held = [Info(param=True)] * len(inner[1])
            outs = _walk(inner[0], opened(called(b))[0], held + infos, numbers)
        else:
            outs = _equation(a, b, infos, (next(numbers.piece), next(numbers.whole)))
        env.update(zip(a.outvars, outs))
    return [known(x) for x in piece.outvars]


def body(eqn: Any) -> tuple[Any, list[Any]] | None:
    """(program, constants) of a call that is analysed as part of its caller, else None.

    The constants are the first inputs of the program.
    """
    return opened(called(eqn)) if eqn.primitive.name in INLINED else None


def called(eqn: Any) -> Any:
    return eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))


def opened(closed: Any) -> tuple[Any, list[Any]]:
    """(program, constants), where the constants are the first inputs of the program."""
    if not hasattr(closed, "consts"):
        return _Program(closed.invars, closed.outvars, closed.eqns), []
    inner = closed.jaxpr
    return _Program([*inner.constvars, *inner.invars], inner.outvars, inner.eqns), closed.consts


class _Program(NamedTuple):
    invars: list[Any]
    outvars: list[Any]
    eqns: list[Any]


def _equation(a: Any, b: Any, infos: list[Info], number: tuple[int, int]) -> list[Info]:
    """What is known of the outputs of an equation."""
    if a.primitive.name in OPAQUE and any(i.dep for i in infos):
        inside = _inside(a, b, infos)
    else:
        inside = [None] * len(a.outvars)
    return [
        _output(a, x, y, infos, (*number, k), within)
        for k, (x, y, within) in enumerate(zip(a.outvars, b.outvars, inside))
    ]


def _output(eqn: Any, x: Any, y: Any, infos: list[Info], place: Place, within: Info | None) -> Info:
    before, after = x.aval.shape, y.aval.shape
    if len(before) != len(after):
        raise Unalike
    scaled = [d for d, (m, n) in enumerate(zip(before, after)) if m != n]
    dep = any(i.dep for i in infos)
    bad = next((i.bad for i in infos if i.bad), None)
    roots = frozenset().union(*(i.roots for i in infos))
    param, sized = any(i.param for i in infos), any(i.sized for i in infos)
    if not dep:
        zero = eqn.primitive.name == "broadcast_in_dim" and _is_zero(eqn.invars[0], infos[0])
        axis = scaled[0] if scaled else None
        return Info(axis, param=param, zero=zero, sized=sized, roots=roots)
    centred = any(i.centred or (i.dep and i.axis is None) for i in infos)
    if scaled:
        if any(i.param and not i.dep for i in infos):
            centred = False
        bad = bad or (None if len(scaled) == 1 else "a table of examples by examples")
        bad = bad or ("a number of examples before they are reduced" if sized else None)
        bad = bad or _mixed(eqn, infos, scaled[0])
        return Info(scaled[0], True, bad, centred, roots=roots, param=param)
    if any(i.axis is not None for i in infos):
        bad = bad or ("a number of examples where they are reduced" if sized else None)
        return _reduced(eqn, infos, place, bad, within)
    return _after(eqn, x, infos, bad, roots, param)


def _differ(x: Any, y: Any) -> bool:
    """Whether a floating constant differs between the two traces."""
    if not (isinstance(x, core.Literal) and isinstance(y, core.Literal)):
        return False
    return isinstance(x.val, float | np.floating | np.ndarray) and bool(np.any(x.val != y.val))


def _is_zero(x: Any, info: Info) -> bool:
    return info.zero or (isinstance(x, core.Literal) and x.val == 0)


def _reduced(
    eqn: Any, infos: list[Info], place: Place, bad: str | None, within: Info | None
) -> Info:
    """What is known of an output that has lost the axis of examples."""
    name = eqn.primitive.name
    kind = REDUCTIONS.get(name)
    if name == "dot_general":
        kind = "sum"
    if name in SCATTERS and infos[0].axis is None and not infos[0].dep:
        kind = SCATTERS[name] if infos[0].zero else None
    centred = any(i.centred for i in infos)
    if within is not None and not within.dep:
        return Info(param=True, roots=frozenset({("last", *place)}))
    if within is not None and within.running and not within.bad:
        return Info(dep=True, running=True, roots=frozenset({("mean", *place)}))
    if kind is None or bad:
        return Info(dep=True, bad=bad or f"`{name}` over the examples")
    return Info(dep=True, centred=centred, roots=frozenset({(kind, *place)}))


def _after(
    eqn: Any, x: Any, infos: list[Info], bad: str | None, roots: frozenset[Root], param: bool
) -> Info:
    """What is known of an output computed from reduced values."""
    name, moving = eqn.primitive.name, [i for i in infos if i.dep]
    linear = all(i.linear for i in moving) and (
        name in LINEAR
        or (name in PRODUCTS and len(moving) == 1)
        or (name == "div" and infos[0].dep and not infos[1].dep)
    )
    running = name in LINEAR + PRODUCTS and any(i.running for i in moving)
    if name in ("add", "sub", "add_any") and len(x.aval.shape) > 0:
        running |= any(i.param and not i.dep for i in infos)
    centred = any(i.centred for i in moving)
    return Info(None, True, bad, centred, linear, running, param, roots=roots)


def _mixed(eqn: Any, infos: list[Info], axis: int) -> str | None:
    """Why the examples of an output are not those of the inputs in the same order, or None."""
    pairs = zip(eqn.invars, infos)
    if any(info.axis is not None and _mixes(eqn, x, info.axis, axis) for x, info in pairs):
        return f"`{eqn.primitive.name}` along the examples"
    return None


def _mixes(eqn: Any, x: Any, axis: int, out: int) -> bool:
    """Whether an equation mixes or reorders examples, which lie along `axis` of x and `out`."""
    name, params, shape = eqn.primitive.name, eqn.params, x.aval.shape
    after = eqn.outvars[0].aval.shape
    if name in ("sort", "concatenate"):
        return params["dimension"] == axis
    if name in SCANNED:
        return params["axis"] == axis
    if name == "rev":
        return axis in params["dimensions"]
    if name == "reshape":
        return math.prod(shape[:axis]) != math.prod(after[:out])
    if name in ("slice", "pad", "split", "dynamic_slice"):
        return after[out] != shape[axis]
    if name == "gather" and x is eqn.invars[0]:
        whole = params["slice_sizes"][axis] == shape[axis]
        return axis not in params["dimension_numbers"].operand_batching_dims and not whole
    if name.startswith("scatter") and x is eqn.invars[0]:
        return axis in params["dimension_numbers"].scatter_dims_to_operand_dims
    return name == "scan" and axis == 0 and _is_scanned(eqn, x)


def _is_scanned(eqn: Any, x: Any) -> bool:
    """Whether a scan iterates over the first axis of an input."""
    inner = opened(eqn.params["jaxpr"])[0].invars
    pairs = zip(reversed(inner), reversed(eqn.invars))
    return any(other is x and u.aval.shape != x.aval.shape for u, other in pairs)


def _inside(a: Any, b: Any, infos: list[Info]) -> list[Info | None]:
    """What is known of the outputs of a call that is evaluated as one equation."""
    nothing: list[Info | None] = [None] * len(a.outvars)
    programs = [called(a), called(b)]
    if any(p is None for p in programs):
        return nothing
    (piece, consts), (whole, _) = map(opened, programs)
    given = [Info(param=True)] * len(consts) + infos
    if len(given) != len(piece.invars):
        return nothing
    if a.primitive.name == "scan":
        outer = [*[None] * len(consts), *a.invars]
        given = [
            i._replace(axis=i.axis - 1)
            if i.axis and v is not None and u.aval.shape != v.aval.shape
            else i
            for i, u, v in zip(given, piece.invars, outer)
        ]
    try:
        found: list[Info | None] = list(_walk(piece, whole, given, Numbers()))
    except Unalike:
        return nothing
    return found


Run = Callable[[int, Any, list[Any]], list[Any]]
"""(number, equation, inputs) ↦ outputs"""


def evaluated(closed: Any, inputs: list[Any], run: Run) -> list[Any]:
    """The outputs of a program whose equations are evaluated by `run`; constants come first."""
    return _evaluated(opened(closed)[0], inputs, run, itertools.count())


def _evaluated(program: _Program, inputs: list[Any], run: Run, number: Iterator[int]) -> list[Any]:
    env = dict(zip(program.invars, inputs))
    value = lambda x: x.val if isinstance(x, core.Literal) else env[x]
    for eqn in program.eqns:
        values, inner = [value(x) for x in eqn.invars], body(eqn)
        if inner is not None:
            outs = _evaluated(inner[0], [*inner[1], *values], run, number)
        else:
            outs = run(next(number), eqn, values)
        env.update(zip(eqn.outvars, outs))
    return [value(x) for x in program.outvars]
