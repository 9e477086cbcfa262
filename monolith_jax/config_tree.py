"""Bindings to a tree of frozen dataclasses, and back to text. Knows nothing of files.

In: bindings (scope, config, field) -> value with the place where each was written, and the classes that may be bound. Out: the
built root, every value checked against its annotation, or a `ValueError` that names the place, the binding, what was expected
and got, and the nearest valid name. `to_text` writes a built tree so that reading it gives an equal tree.

Scopes are gin's: `@user/TableConfig()` reads `TableConfig.*` first and `user/TableConfig.*` over it, and a reference without a
scope keeps the scope that it is built in.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args, get_origin


@dataclass(frozen=True, slots=True)
class Reference:
    """`@scope/Name()` in a value: the config `Name`, built in `scope`."""

    scope: str
    name: str
    called: bool
    """Whether the parentheses were there."""


@dataclass(frozen=True, slots=True)
class Macro:
    """`%NAME` in a value: whatever `NAME = value` says."""

    name: str


class Key(typing.NamedTuple):
    """What a binding binds. A macro is a `config` with an empty `field`."""

    scope: str
    config: str
    field: str

    def __str__(self) -> str:
        """Returns the key as it is written in a file."""
        return f"{self.scope}/" * bool(self.scope) + self.config + f".{self.field}" * bool(self.field)


@dataclass(frozen=True, slots=True)
class Binding:
    """One value and the place where it was written."""

    value: Any
    place: str
    """`configs/quickstart.gin:12`, or `override 'TrainConfig.steps=100'`."""


@dataclass(frozen=True, slots=True)
class _Context:
    configs: Mapping[str, type]
    bindings: Mapping[Key, Binding]
    used: set[Key] = field(default_factory=set)


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns a half sentence that names the entry of `valid` most like `name`, or nothing where there is none."""
    found = difflib.get_close_matches(name, sorted(valid), n=1, cutoff=0.0)
    return f"; the nearest valid name is {found[0]}" if found else ""


def build_tree(root: type, configs: Sequence[type], bindings: Mapping[Key, Binding]) -> Any:
    """Builds `root` and all that it refers to.

    Args:
      root: The dataclass at the top.
      configs: The frozen dataclasses that bindings may name, `root` may be left out.
      bindings: The last binding of each key.

    Returns:
      An instance of `root`, its values checked and converted (an int for a float becomes one, a list a tuple).

    Raises:
      ValueError: A name that does not exist, a value of the wrong type, a required field left out, a binding that nothing uses.
    """
    context = _Context({config.__name__: config for config in (*configs, root)}, bindings)
    for key, binding in bindings.items():
        _check_name(context, key, binding)
    tree = _build(context, root.__name__, "", "no binding refers to it", ())
    unused = [key for key in bindings if key not in context.used]
    if unused:
        more = f"; also unused: {', '.join(str(key) for key in unused[1:6])}" if len(unused) > 1 else ""
        raise ValueError(f"{bindings[unused[0]].place}: {unused[0]} is bound but never used{_unused(context, unused[0])}{more}")
    return tree


def _unused(context: _Context, key: Key) -> str:
    """Says what a binding that nothing used may have been meant for."""
    if not key.field or any(known.config == key.config for known in context.used):
        return nearest(str(key), (str(known) for known in context.used))
    holders = [
        f"{name}.{known}"
        for name, config in context.configs.items()
        for known in _fields(config)
        if context.configs[key.config] in _parts(_hints(config)[known])
    ]
    return f": nothing refers to @{key.config}(), which {' or '.join(holders) or 'no field'} takes"


def _parts(hint: Any) -> Iterator[Any]:
    yield hint
    for one in get_args(hint):
        yield from _parts(one)


def _check_name(context: _Context, key: Key, binding: Binding) -> None:
    if not key.field:
        if key.config in context.configs:
            raise ValueError(f"{binding.place}: {key} is a config; bind one of its fields, as in {key}.field = value")
        return
    config = context.configs.get(key.config)
    if config is None:
        where = nearest(key.config, context.configs)
        raise ValueError(f"{binding.place}: {key}: there is no config named {key.config}{where}")
    if key.field not in _fields(config):
        where = nearest(f"{key.config}.{key.field}", [f"{key.config}.{known}" for known in _fields(config)])
        others = [name for name, one in context.configs.items() if key.field in _fields(one)]
        where += f"; {key.field} is a field of {', '.join(others[:3])}" * bool(others)
        raise ValueError(f"{binding.place}: {key}: {key.config} has no field named {key.field}{where}")


def _build(context: _Context, name: str, scope: str, place: str, within: tuple[str, ...]) -> Any:
    """Builds one config; `place` is where it was referred to, `within` what is being built around it."""
    config = context.configs.get(name)
    if config is None:
        raise ValueError(f"{place}: @{name}(): there is no config named {name}{nearest(name, context.configs)}")
    written = f"{scope}/{name}" if scope else name
    if written in within:
        raise ValueError(f"{place}: {' -> '.join((*within, written))} refers to itself")
    chosen: dict[str, tuple[Key, Binding]] = {}
    parts = scope.split("/") if scope else []
    for outer in ["", *("/".join(parts[: end + 1]) for end in range(len(parts)))]:
        for key in (Key(outer, name, known) for known in _fields(config)):
            if key in context.bindings:
                context.used.add(key)
                chosen[key.field] = (key, context.bindings[key])
    values = {}
    for known, (key, binding) in chosen.items():
        value = _resolve(context, binding.value, scope, binding.place, (*within, written))
        values[known] = _converted(value, _hints(config)[known], f"{binding.place}: {key}")
    missing = [one.name for one in _fields(config).values() if one.name not in values and not _has_default(one)]
    if missing:
        form = f"{written}.{missing[0]} = <{describe(_hints(config)[missing[0]])}>"
        raise ValueError(f"{place}: {written} needs a value for {', '.join(missing)}: write {form}")
    try:
        return config(**values)
    except ValueError as error:
        # The config's own check speaks of a field: point at the line that set it, else at the reference.
        told = [f"{one.place}: {key}" for known, (key, one) in chosen.items() if known in str(error)]
        raise ValueError(f"{told[0] if told else f'{place}: {written}'}: {error}") from error


def _resolve(context: _Context, value: Any, scope: str, place: str, within: tuple[str, ...]) -> Any:
    """Replaces references and macros inside `value`; lists become tuples, since a config is hashable."""
    match value:
        case Reference(called=False):
            raise ValueError(f"{place}: @{value.name} is the class; write @{value.name}() for the config")
        case Reference():
            return _build(context, value.name, value.scope or scope, place, within)
        case Macro():
            key = Key("", value.name, "")
            if key not in context.bindings:
                macros = [known.config for known in context.bindings if not known.field]
                how = f"write {value.name} = <value> in a file or give --gin.{value.name}=<value>"
                raise ValueError(f"{place}: macro {value.name} has no value: {how}{nearest(value.name, macros)}")
            if f"%{value.name}" in within:
                raise ValueError(f"{place}: macro {value.name} refers to itself")
            context.used.add(key)
            macro = context.bindings[key]
            return _resolve(context, macro.value, scope, macro.place, (*within, f"%{value.name}"))
        case list() | tuple():
            return tuple(_resolve(context, one, scope, place, within) for one in value)
        case dict():
            return {one: _resolve(context, held, scope, place, within) for one, held in value.items()}
        case _:
            return value


def _fields(config: type) -> dict[str, dataclasses.Field[Any]]:
    return {one.name: one for one in dataclasses.fields(config) if one.init}


def _has_default(one: dataclasses.Field[Any]) -> bool:
    return one.default is not dataclasses.MISSING or one.default_factory is not dataclasses.MISSING


@functools.cache
def _hints(config: type) -> dict[str, Any]:
    return typing.get_type_hints(config)


def describe(hint: Any) -> str:
    """Returns an annotation as a person writes it: `float`, `str | None`, `tuple[int, ...]`, `'sum' | 'mean'`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " | ".join(describe(one) for one in arguments)
    if origin is Literal:
        return " | ".join(repr(one) for one in arguments)
    if hint is type(None):
        return "None"
    if hint is Ellipsis:
        return "..."
    if origin is not None:
        return f"{origin.__name__}[{', '.join(describe(one) for one in arguments)}]"
    return getattr(hint, "__name__", str(hint))


class _Mismatch(Exception):
    """A value does not have its annotated type."""


def _converted(value: Any, hint: Any, place: str) -> Any:
    """Returns `value` as `hint` wants it, or raises ValueError with both sides."""
    try:
        return _convert(value, hint)
    except _Mismatch:
        got = type(value).__name__ if dataclasses.is_dataclass(value) else f"{value!r} ({type(value).__name__})"
        names = get_args(hint) if get_origin(hint) is Literal else ()
        near = nearest(value, [one for one in names if isinstance(one, str)]) if isinstance(value, str) else ""
        raise ValueError(f"{place}: expected {describe(hint)}, got {got}{near}") from None


def _convert(value: Any, hint: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments)
    if origin is Literal:
        accepted = any(type(value) is type(one) and value == one for one in arguments)
        return _require(accepted, value)
    if origin is tuple or hint is tuple:
        return _convert_tuple(value, arguments)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        _require(isinstance(value, dict), value)
        return {_convert(key, arguments[0]): _convert(one, arguments[1]) for key, one in value.items()}
    if hint is float:
        # A whole number is a fine float; True is not a number.
        return float(_require(type(value) in (int, float), value))
    if hint in (int, bool, str, type(None)):
        return _require(type(value) is hint, value)
    return _require(isinstance(value, hint), value)


def _convert_union(value: Any, choices: Sequence[Any]) -> Any:
    # First the member of just this type, so that 1 stays an int under `float | int`.
    for hint in sorted(choices, key=lambda one: one is not type(value)):
        try:
            return _convert(value, hint)
        except _Mismatch:
            continue
    raise _Mismatch


def _convert_tuple(value: Any, hints: tuple[Any, ...]) -> tuple[Any, ...]:
    _require(isinstance(value, tuple), value)
    if not hints:
        return value
    if len(hints) == 2 and hints[1] is Ellipsis:
        return tuple(_convert(one, hints[0]) for one in value)
    _require(len(value) == len(hints), value)
    return tuple(_convert(one, hint) for one, hint in zip(value, hints, strict=True))


def _require(accepted: bool, value: Any) -> Any:
    if not accepted:
        raise _Mismatch
    return value


def to_text(tree: Any) -> str:
    """Writes a built tree as bindings, every field of every config, the root first.

    Raises:
      ValueError: A value that no file can hold (not a number, text, truth value, None, tuple, dict or config).
    """
    scopes: dict[tuple[type, str], str] = {}
    found = _instances(tree, "")
    for config in {type(one) for one, _ in found}:
        same = [(one, hint) for one, hint in found if type(one) is config]
        taken: set[str] = set()
        for index, (one, hint) in enumerate(same):
            name = getattr(one, "name", None)
            label = name if isinstance(name, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) else f"{hint}_{index}"
            while label in taken:
                label += "_"
            taken.add(label)
            scopes[config, repr(one)] = f"{label}/" if len(same) > 1 else ""
    blocks = []
    for one, _ in found:
        prefix = scopes[type(one), repr(one)] + type(one).__name__
        lines = [f"{prefix}.{known} = {value_text(getattr(one, known), scopes)}" for known in _fields(type(one))]
        blocks.append("\n".join(lines))
    return "\n\n".join(block for block in blocks if block) + "\n"


def _instances(value: Any, hint: str) -> list[tuple[Any, str]]:
    """Returns each different config in the tree with the field that holds it, outermost first."""
    if dataclasses.is_dataclass(value):
        held = [_instances(getattr(value, known), known) for known in _fields(type(value))]
        found = [(value, hint), *(one for many in held for one in many)]
    elif isinstance(value, tuple | dict):
        inner = value.values() if isinstance(value, dict) else value
        found = [one for held in inner for one in _instances(held, hint)]
    else:
        found = []
    return list({(type(one), repr(one)): (one, name) for one, name in reversed(found)}.values())[::-1]


def value_text(value: Any, scopes: Mapping[tuple[type, str], str], indent: str = "    ") -> str:
    """Writes one value; `scopes` gives `scope/` or nothing for (class, repr) of each config that it may hold."""
    if dataclasses.is_dataclass(value):
        return f"@{scopes.get((type(value), repr(value)), '')}{type(value).__name__}()"
    if isinstance(value, tuple | dict):
        inside = indent + "    "
        if isinstance(value, dict):
            parts = [f"{value_text(key, scopes)}: {value_text(one, scopes, inside)}" for key, one in value.items()]
            opening, closing = "{", "}"
        else:
            parts = [value_text(one, scopes, inside) for one in value]
            opening, closing = "(", ",)" if len(parts) == 1 else ")"
        flat = f"{opening}{', '.join(parts)}{closing}"
        if len(flat) <= 100 and "\n" not in flat:
            return flat
        return f"{opening}\n" + "".join(f"{indent}{part},\n" for part in parts) + f"{indent[4:]}{closing.lstrip(',')}"
    if type(value) is float and math.isinf(value):
        return "1e999" if value > 0 else "-1e999"  # the grammar has no word for infinity, and this reads as it
    if value is None or type(value) in (bool, int, str) or (type(value) is float and value == value):
        return repr(value)
    raise ValueError(f"{value!r} ({type(value).__name__}) cannot be written into a config file")
