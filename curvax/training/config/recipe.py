"""Optimisers as text: `sam_perturb(0.2) | gsam_project(0.4) | adamw(cosine(1e-3, warmup=10))`.

    text  = call ('|' call)*
    value = literal | number '/' number | [value, ...] | name | call | text

The text is parsed as a Python expression and evaluated node by node, never by `eval`. It can call
curvax's public names and `matrix_axes`, the functions of Optax and `optax.contrib` annotated as
returning a transformation, the functions of `optax.schedules`, the schedules of `run_schedules`,
and names that the caller adds. Every error has a caret under its node. Parsed by hand, since a
general evaluator would accept arbitrary code.
"""

import ast
import difflib
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import optax

import curvax
from curvax.parameter_roles.matrix_axes import matrix_axes
from curvax.pipes.parts import with_options
from curvax.training.config import run_schedules
from curvax.training.runtime.errors import ConfigError

_NO_NAMES: Mapping[str, Any] = types.MappingProxyType({})
_NOT_FROM_OPTAX = frozenset({"differentially_private_aggregate", "dpsgd", "sophia"})
"""Transformations that the training step has no input for: the gradients of single examples, and
the arguments of Optax's estimator, for which curvax has `sophia_g` and `sophia_h`."""
_LITERALS = (bool, int, float, str, types.NoneType)


def parse(
    text: str, *, steps: int | None = None, names: Mapping[str, Any] = _NO_NAMES
) -> optax.GradientTransformationExtraArgs:
    """Parses the text of an optimiser.

        parse("sam_perturb(rho) | sgd(cosine(0.1), momentum=0.9)", steps=100, names={"rho": 0.05})

    Args:
        text: parts joined by `|`, on one line or several.
        steps: length of the run, for `cosine`, `linear`, `constant` and `step_decay`.
        names: further names that the text may use; they take precedence over all others.

    Raises:
        ConfigError: an unknown name or argument (the message has near matches), an expression
            that is not a call, a literal or a list, or an error raised by a factory.
    """
    reader = _Reader(text, {**vocabulary(steps), **names})
    return reader.pipe(reader.tree())


def read(text: str, names: Mapping[str, Any]) -> Any:
    """The value of any text of this grammar, which may use `names` only.

    Raises:
        ConfigError: as in `parse`.
    """
    reader = _Reader(text, names)
    return reader.value(reader.tree())


def vocabulary(steps: int | None = None) -> dict[str, Any]:
    """All names that a text may use; curvax's take precedence over Optax's."""
    stretched = (
        run_schedules.cosine,
        run_schedules.linear,
        run_schedules.constant,
        run_schedules.step_decay,
    )
    renamed = curvax.RENAMED.items()
    return {
        **_optax_names(),
        **{f.__name__: functools.partial(f, steps=steps) for f in stretched},
        "matrix_axes": matrix_axes,
        **{name: getattr(curvax, name) for name in curvax.__all__},
        **{old: getattr(curvax, new) for old, new in renamed if new in curvax.__all__},
    }


@functools.cache
def _optax_names() -> Mapping[str, Any]:
    schedules = {name: f for name, f in vars(optax.schedules).items() if inspect.isfunction(f)}
    modules = vars(optax.contrib) | vars(optax)
    parts = {name: f for name, f in modules.items() if _returns_transformation(f)}
    public = {name: f for name, f in (schedules | parts).items() if not name.startswith("_")}
    taken = {name: f for name, f in public.items() if name not in _NOT_FROM_OPTAX}
    return types.MappingProxyType(taken)


def _returns_transformation(f: Any) -> bool:
    if not inspect.isfunction(f):
        return False
    returned = inspect.signature(f).return_annotation
    return inspect.isclass(returned) and issubclass(returned, optax.GradientTransformation)


class _Reader:
    """Evaluates the nodes of one text, given its vocabulary."""

    def __init__(self, text: str, names: Mapping[str, Any]):
        self.text = text
        self.names = names
        self.start = len(text) - len(text.lstrip())
        self.source = text[self.start :].replace("\n", " ").rstrip()

    def tree(self) -> ast.expr:
        if not self.source:
            self.fail(0, "A method's text is empty. Write at least one part, as `sgd(0.1)`.")
        try:
            return ast.parse(self.source, mode="eval").body
        except SyntaxError as error:
            place = (error.offset or len(self.source) + 1) - 1
            self.fail(place, f"A method's text consists of calls joined by `|`: {error.msg}.")

    def pipe(self, node: ast.expr) -> Any:
        parts = [self.part(operand) for operand in _operands(node)]
        return self.build(node, curvax.pipe, *parts)

    def part(self, node: ast.expr) -> optax.GradientTransformation:
        value = self.value(node)
        if isinstance(value, optax.GradientTransformation):
            return value
        written = ast.unparse(node)
        if isinstance(node, ast.Name) and callable(value):
            self.fail(node, f"`{written}` is a function, not a part: write `{written}(...)`.")
        self.fail(
            node,
            f"Parts joined by `|` are gradient transformations, and `{written}` gives "
            f"{type(value).__name__}. Write a stage or an optimiser here, as `adamw(1e-3)`.",
        )

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.BinOp(op=ast.BitOr()):
                return self.pipe(node)
            case ast.Call(func=ast.Name(id=name)):
                return self.call(node, name)
            case ast.Name(id=name):
                return self.look_up(node, name)
            case ast.Constant(value=value) if isinstance(value, _LITERALS):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return -value
            case ast.BinOp(
                ast.Constant(value=int() | float() as value),
                ast.Div(),
                ast.Constant(value=int() | float() as parts),
            ) if parts:
                return value / parts
            case ast.List(elts=items):
                return [self.value(item) for item in items]
            case ast.Tuple(elts=items):
                return tuple(self.value(item) for item in items)
            case ast.Dict(keys=keys, values=values) if all(keys):
                return {self.value(k): self.value(v) for k, v in zip(keys, values) if k is not None}
        self.fail(
            node,
            "A method's text has calls joined by `|`, with literals, lists, names and further "
            f"calls as arguments. `{ast.unparse(node)}` is none of these{_hint(node)}.",
        )

    def call(self, node: ast.Call, name: str) -> Any:
        factory = self.look_up(node.func, name)
        if not callable(factory):
            self.fail(node, f"`{name}` is the value {factory!r}, which cannot be called.")
        self.check_keywords(node, name, factory)
        positional = [self.value(argument) for argument in node.args]
        named = {keyword.arg: self.value(keyword.value) for keyword in node.keywords if keyword.arg}
        built = self.build(node, factory, *positional, **named)
        if not isinstance(built, optax.GradientTransformation):
            return built
        # `Signature.bind` itself: that of curvax's factories wraps static options.
        signature = inspect.signature(factory)
        options = inspect.Signature.bind(signature, *positional, **named).arguments
        return with_options(built, name, options)

    def check_keywords(self, node: ast.Call, name: str, factory: Callable[..., Any]) -> None:
        parameters = inspect.signature(factory).parameters
        accepts_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        written = [keyword.arg for keyword in node.keywords]
        for index, keyword in enumerate(node.keywords):
            if keyword.arg is None:
                self.fail(keyword.value, "`**` is not supported. Write the arguments by name.")
            if keyword.arg in written[:index]:
                self.fail(keyword, f"`{name}` is given its argument `{keyword.arg}` twice.")
            if keyword.arg not in parameters and not accepts_any:
                message = f"`{name}` has no argument `{keyword.arg}`"
                self.fail(keyword, message + near(keyword.arg, parameters))

    def look_up(self, node: ast.expr, name: str) -> Any:
        if name not in self.names:
            self.fail(node, f"Unknown name `{name}`{near(name, self.names)}")
        return self.names[name]

    def build(self, node: ast.expr, factory: Callable[..., Any], *args: Any, **named: Any) -> Any:
        try:
            return factory(*args, **named)
        except Exception as error:
            self.fail(node, str(error) or type(error).__name__, error)

    def fail(self, at: Any, message: str, cause: Exception | None = None) -> NoReturn:
        raise ConfigError(f"{message}\n{self.caret(at)}") from cause

    def caret(self, at: ast.expr | ast.keyword | int) -> str:
        """The line of the text around a node, with a caret below it."""
        if not isinstance(at, int):
            at = len(self.source.encode()[: at.col_offset].decode())
        before = self.text[: self.start + at]
        line = self.text.split("\n")[before.count("\n")]
        return f"    {line}\n    {' ' * len(before.rpartition(chr(10))[2])}^"


def outline(text: str) -> str:
    """The names of a method's parts: `sam_perturb(0.2) | adamw(1e-3)` ↦ `sam_perturb | adamw`."""
    return _outline(_Reader(text, {}).tree())


def outlines(texts: Sequence[str]) -> list[str]:
    """The outlines of several methods, with the arguments in which equal ones differ.

    `sam_perturb(0.1) | adamw(1e-3)` and `sam_perturb(0.2) | adamw(1e-3)` ↦
    `sam_perturb(0.1) | adamw` and `sam_perturb(0.2) | adamw`.
    """
    trees = [_Reader(text, {}).tree() for text in texts]
    names = list(map(_outline, trees))
    found = list(names)
    for name in {name for name in names if names.count(name) > 1}:
        alike = [i for i, own in enumerate(names) if own == name]
        for i, told in zip(alike, _differences([trees[i] for i in alike])):
            found[i] = told
    return found


def with_argument(text: str, factory: str, **argument: Any) -> str:
    """The text with a keyword argument added to every call of a factory that lacks it.

        with_argument("per_group(8, stages) | sgd(0.1)", "per_group", sequential=True)

    The text itself if nothing changes.

    Raises:
        ConfigError: the text cannot be parsed.
    """
    ((name, value),) = argument.items()
    tree, changes = _Reader(text, {}).tree(), False
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=called)) if called == factory:
                if all(keyword.arg != name for keyword in node.keywords):
                    node.keywords.append(ast.keyword(name, ast.Constant(value)))
                    changes = True
    return ast.unparse(tree) if changes else text


def _outline(tree: ast.expr) -> str:
    return " | ".join(map(_name, _operands(tree)))


def _name(node: ast.expr) -> str:
    return ast.unparse(node.func if isinstance(node, ast.Call) else node)


def _differences(nodes: Sequence[ast.expr]) -> list[str]:
    """Texts of expressions, with those arguments alone in which they differ."""
    pipes = [_operands(node) for node in nodes]
    if len(pipes[0]) > 1 and len({len(pipe) for pipe in pipes}) == 1:
        parts = [_differences(column) for column in zip(*pipes)]
        return [" | ".join(own) for own in zip(*parts)]
    if len({_name(node) for node in nodes}) > 1 or not isinstance(nodes[0], ast.Call):
        return [ast.unparse(node) for node in nodes]
    calls = [_arguments(node) for node in nodes]
    told: list[list[str]] = [[] for _ in nodes]
    for key in dict.fromkeys(key for call in calls for key in call):
        values = [call.get(key) for call in calls]
        if len({ast.unparse(x) if x else None for x in values}) == 1:
            continue
        both = [x for x in values if x is not None]
        texts = iter(_differences(both) if len(both) == len(nodes) else map(ast.unparse, both))
        for own, x in zip(told, values):
            if x is not None:
                own.append(next(texts) if isinstance(key, int) else f"{key}={next(texts)}")
    return [_name(node) + (f"({', '.join(own)})" if own else "") for node, own in zip(nodes, told)]


def _arguments(call: ast.expr) -> dict[int | str, ast.expr]:
    """The arguments of a call by their places and names."""
    assert isinstance(call, ast.Call)
    found: dict[int | str, ast.expr] = dict(enumerate(call.args))
    return found | {keyword.arg or "**": keyword.value for keyword in call.keywords}


def _operands(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_operands(node.left), *_operands(node.right)]
    return [node]


def near(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: similar names, if there are any."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f". Did you mean {' or '.join(f'`{c}`' for c in close)}?" if close else "."


def _hint(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f": write `{node.attr}` without what stands before it"
    if isinstance(node, ast.Call):
        return f": call a plain name instead of `{ast.unparse(node.func)}`"
    return ""
