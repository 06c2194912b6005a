"""A traced model ↦ the sites of its parameters: every product, look-up and repetition.

The program is read equation by equation, through its calls, rematerialised parts, custom forward
derivatives and scans. Parameters are followed while they are only moved or cast.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from jax.extend import core

from curvax import compat
from curvax.curvature.kronecker import rules
from curvax.curvature.kronecker.atoms import aligned
from curvax.curvature.kronecker.sites import Bias, Level, Site, factor, repeated, site_of
from curvax.curvature.kronecker.values import Names, Place, Value, is_of_batch

JAXPRS = (core.Jaxpr, core.ClosedJaxpr)
OPAQUE = ("scan", "while", "cond", "custom_vjp", "custom_lin", "shard_map", "pallas")
"""Prefixes of the names of primitives whose programs run otherwise than once, or whose derivatives
are not those of their programs."""


class Found:
    """What a walk collects."""

    def __init__(self, names: Names):
        self.names = names
        self.sites: list[Site] = []
        self.products: dict[Place, int] = {}
        self.odd: dict[int, str] = {}
        """Parameter ↦ the primitive that uses it in another way."""

    def trial(self) -> "Found":
        """A collection whose contents are dropped."""
        return Found(self.names)

    def refuse(self, values: Sequence[Value], how: str) -> list[Value]:
        """Notes that parameters are used in a way that is not followed, and forgets them."""
        for value in values:
            if value.leaf is not None:
                self.odd.setdefault(value.leaf, how)
        return [value.plain() for value in values]


def walk(
    jaxpr: Any,
    values: Sequence[Value],
    found: Found,
    *,
    wanted: Sequence[bool] | None = None,
    place: Place = (),
    levels: tuple[Level, ...] = (),
) -> list[Value]:
    """The values of the results of a program, adding its sites to `found`.

    Args:
        jaxpr: a plain jaxpr.
        values: those of its arguments, without constants.
        found: the collection.
        wanted: which results are used; by default all.
        place: where the program is called.
        levels: the scans around it.
    """
    live = _live(jaxpr, wanted)
    uses = Counter(x for eqn in jaxpr.eqns for x in eqn.invars if not _is_literal(x))
    uses.update(x for x in jaxpr.outvars if not _is_literal(x))
    env = {var: found.names.unknown(var.aval) for var in jaxpr.constvars}
    env |= {var: _used(value, uses[var]) for var, value in zip(jaxpr.invars, values)}
    read = lambda x: found.names.unknown(x.aval) if _is_literal(x) else env[x]
    for number, eqn in enumerate(jaxpr.eqns):
        if not live[number]:
            env.update((var, found.names.unknown(var.aval)) for var in eqn.outvars)
            continue
        given = [read(x) for x in eqn.invars]
        kept = [x in uses for x in eqn.outvars]
        results = _equation(eqn, given, found, kept, (*place, number), levels)
        env.update((x, _used(value, uses[x])) for x, value in zip(eqn.outvars, results))
    return [read(x) for x in jaxpr.outvars]


def _is_literal(x: Any) -> bool:
    return isinstance(x, core.Literal)


def _used(value: Value, times: int) -> Value:
    """A value that is used so many times; only a sole use can be the addition of a bias."""
    return value if times == 1 else value._replace(product=None)


def _live(jaxpr: Any, wanted: Sequence[bool] | None) -> list[bool]:
    """Whether each equation has a result that the wanted ones depend on."""
    wanted = [True] * len(jaxpr.outvars) if wanted is None else wanted
    needed = {x for x, use in zip(jaxpr.outvars, wanted) if use and not _is_literal(x)}
    live = []
    for eqn in reversed(jaxpr.eqns):
        live.append(not needed.isdisjoint(eqn.outvars))
        if live[-1]:
            needed |= {x for x in eqn.invars if not _is_literal(x)}
    return live[::-1]


def _equation(
    eqn: Any,
    values: list[Value],
    found: Found,
    kept: list[bool],
    place: Place,
    levels: tuple[Level, ...],
) -> list[Value]:
    name = eqn.primitive.name
    if name == "scan":
        return _scan(eqn, values, found, place, levels)
    if (body := inlined(eqn)) is not None:
        return walk(body.jaxpr, values, found, wanted=kept, place=place, levels=levels)
    if rules.is_move(eqn):
        results = rules.moved(eqn, values, found.names)
        lost = [v for v, result in zip(values, results) if result.leaf is None]
        found.refuse(lost, name)
        return results
    if compat.bodies(eqn.params):
        values = found.refuse(values, name)
        return rules.results(eqn, values, found.names)
    if name in ("mul", "div") and (scaled := _scaled(eqn, values, found, place, levels)):
        return [scaled]
    site = site_of(eqn, place, values, levels, found.names)
    if site is not None:
        found.products[place] = len(found.sites)
        found.sites.append(site)
        values[site.operand] = values[site.operand].plain()
        result = Value(site.result, product=place)
        _repetitions(eqn, values, found, result, place, levels)
        return [result]
    (first, *_) = results = rules.results(eqn, values, found.names)
    _repetitions(eqn, values, found, first, place, levels)
    if name in ("add", "add_any"):
        _bias(values, found)
    return results


def inlined(eqn: Any) -> core.ClosedJaxpr | None:
    """The program of a call, a rematerialised part or a custom forward derivative."""
    body = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
    if eqn.primitive.name.startswith(OPAQUE) or not isinstance(body, JAXPRS):
        return None
    body = compat.closed(body)
    pairs = (*zip(body.jaxpr.invars, eqn.invars), *zip(body.jaxpr.outvars, eqn.outvars))
    shape = lambda x: getattr(x.aval, "shape", None)
    whole = len(body.jaxpr.invars) == len(eqn.invars)
    return body if whole and all(shape(x) == shape(y) for x, y in pairs) else None


def _scaled(
    eqn: Any, values: list[Value], found: Found, place: Place, levels: tuple[Level, ...]
) -> Value | None:
    """A parameter times an array of its shape, such as the scale of a norm times 1/σ."""
    for n, value in enumerate(values):
        site = factor(eqn, place, n, values, levels)
        if site is not None:
            found.sites.append(site)
            scalar = eqn.invars[1 - n].aval.shape == ()
            number = len(found.sites) - 1
            return value._replace(scale=number, scalar=scalar, product=None)
    return None


def _repetitions(
    eqn: Any, values: list[Value], found: Found, result: Value, place: Place, levels: Any
) -> None:
    """Notes the arguments that are parameters, repeated along the axes of the result."""
    for n, value in enumerate(values):
        if value.leaf is not None:
            found.sites.append(repeated(eqn, place, n, value, result, levels))


def _bias(values: list[Value], found: Found) -> None:
    """Notes the bias of a product where the two are added."""
    for one, other in (values, values[::-1]):
        if one.product is None or other.leaf is None or other.scale is not None:
            continue
        number = found.products[one.product]
        site = found.sites[number]
        pairs = _bias_pairs(site, one, other)
        if pairs is not None and site.bias is None:
            bias = Bias(other.leaf, pairs, other.outer)
            found.sites[number] = site._replace(bias=bias)


def _bias_pairs(site: Site, product: Value, bias: Value) -> Any:
    """Pairs of digits of the kernel and of the bias, if it runs along all of its outputs alone."""
    if bias.outer and [level for level, _ in bias.outer] != [level for level, _ in site.outer]:
        return None
    if len(bias.axes) != len(product.axes) or bool(bias.outer) != bool(site.outer):
        return None
    own = lambda axis: tuple(atom for atom in axis if atom.source == bias.leaf)
    digits = {*site.outputs, *site.stack}
    pairs = []
    for theirs, ours in zip(product.axes, map(own, bias.axes)):
        features = tuple(a for a in theirs if a in digits or a.source == site.leaf)
        if len(features) not in (0, len(theirs)):
            return None
        found = aligned(features, ours)
        if found is None:
            return None
        pairs += found
    for (_, theirs), (_, ours) in zip(site.outer, bias.outer):
        found = aligned(theirs, ours)
        if found is None:
            return None
        pairs += found
    return tuple(pairs)


def _scan(
    eqn: Any, values: list[Value], found: Found, place: Place, levels: tuple[Level, ...]
) -> list[Value]:
    body, (fixed, carried) = compat.closed(eqn.params["jaxpr"]), compat.scan_arguments(eqn)
    values = [value._replace(product=None) for value in values]
    consts, carry, xs = values[:fixed], values[fixed : fixed + carried], values[fixed + carried :]
    carry = found.refuse(carry, "the carry of a scan")
    depth, length, names = len(levels), eqn.params["length"], found.names
    along = next((x.axes[0] for x in xs if is_of_batch(x.axes[0])), names.fresh(length))
    inside = (*levels, Level(length, along))
    sequences = [_sliced(x, depth, found) for x in xs]
    run = lambda carry, into: walk(
        body.jaxpr, [*consts, *carry, *sequences], into, place=place, levels=inside
    )
    for _ in range(2):
        after = run(carry, found.trial())[:carried]
        carry = [
            Value(tuple(names.joined(a, b) for a, b in zip(x.axes, y.axes)))
            for x, y in zip(carry, after)
        ]
    outs = found.refuse(run(carry, found), "the result of a scan")
    return [*outs[:carried], *(Value((along, *out.axes)) for out in outs[carried:])]


def _sliced(value: Value, depth: int, found: Found) -> Value:
    """One element of a sequence that a scan runs along."""
    first, axes = value.axes[0], value.axes[1:]
    if value.leaf is None:
        return Value(axes)
    if any(atom.source != value.leaf for atom in first):
        found.refuse([value], "a scan along an axis that repeats it")
        return Value(axes)
    return value._replace(axes=axes, outer=(*value.outer, (depth, first)), product=None)
