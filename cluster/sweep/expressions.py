"""`${...}` in a sweep's settings: arithmetic over what a row has, and nothing else."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from trainer.config import ConfigError

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "round": round,
    "floor": math.floor,
    "ceil": math.ceil,
    "min": min,
    "max": max,
    "abs": abs,
    "sqrt": math.sqrt,
    "exp": math.exp,
    "log": math.log,
    "log2": math.log2,
    "log10": math.log10,
}


def is_expression(value: Any) -> bool:
    """Whether a setting is computed: a word of the form `${...}`."""
    return isinstance(value, str) and value.startswith("${") and value.endswith("}")


def names(text: str) -> set[str]:
    """The names that an expression reads, dotted ones whole.

    Raises:
        ConfigError: it is no expression.
    """
    found: set[str] = set()

    def collect(node: ast.AST) -> None:
        name = _dotted(node)
        if name is not None:
            found.add(name)
            return
        children = ast.iter_child_nodes(node) if not isinstance(node, ast.Call) else iter(node.args)
        for child in children:
            collect(child)

    collect(_parse(text))
    return found


def evaluate(text: str, look_up: Callable[[str], Any]) -> Any:
    """The value of `${...}`; `look_up(name)` gives that of a name.

    Numbers, names, + - * / // % **, parentheses and round, floor, ceil, min, max, abs, sqrt, exp, log, log2, log10.

    Raises:
        ConfigError: anything else, or arithmetic that has no result.
    """
    try:
        value = _value(_parse(text), look_up)
    except (ArithmeticError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{text}: {error}") from error
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{text}: gives {value}")
    return value


def _parse(text: str) -> ast.expr:
    try:
        return ast.parse(text[2:-1].strip(), mode="eval").body
    except (SyntaxError, RecursionError) as error:
        raise ConfigError(f"{text}: is no arithmetic; write it as in ${{round(budget / 6 / parameters)}}") from error


def _value(node: ast.expr, look_up: Callable[[str], Any]) -> Any:
    name = _dotted(node)
    if name is not None:
        return look_up(name)
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand, look_up)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, look_up), _value(node.right, look_up)
        if isinstance(node.op, ast.Pow):
            return math.pow(left, right)  # in floats: whole numbers could grow for ever
        if type(node.op) in _BINARY:
            return _BINARY[type(node.op)](left, right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if node.func.id not in _FUNCTIONS:
            raise ConfigError(f"no function '{node.func.id}'; there are {', '.join(_FUNCTIONS)}")
        return _FUNCTIONS[node.func.id](*(_value(argument, look_up) for argument in node.args))
    raise ConfigError(f"'{ast.unparse(node)}' is no arithmetic")


def _dotted(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = _dotted(node.value)
        return None if head is None else f"{head}.{node.attr}"
    return None


def ordered(settings: Mapping[str, Any]) -> list[str]:
    """The computed settings, each after those that it reads.

    Raises:
        ConfigError: they need each other.
    """
    waiting = {key: names(value) for key, value in settings.items() if is_expression(value)}
    done: list[str] = []
    while waiting:
        ready = [key for key, needs in waiting.items() if not needs & waiting.keys()]
        if not ready:
            raise ConfigError(f"settings {', '.join(sorted(waiting))} need each other; break the circle")
        for key in ready:
            done.append(key)
            del waiting[key]
    return done
