"""Configurations of runs: frozen dataclasses, their JSON form, and the hash that names a run.

    @runs.register
    @dataclass(frozen=True)
    class Train:
        lr: float = 0.1
        parent: Pretrain = Pretrain()               # a nested configuration, here itself a run
        root: str = runs.unhashed("")               # recorded, not part of the identity

        def execute(self, run: runs.Run) -> dict: ...

A stored configuration is rebuilt by the name of its class, whose module must have been imported:
`import afdslib.experiments` imports all that this library defines.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from afdslib.base.errors import AFDSError

if TYPE_CHECKING:
    from afdslib.runs.run import Run

__all__ = [
    "RESULTS_VERSION", "Config", "added", "from_json", "id_of", "is_kind_of_run", "known", "needs", "register",
    "run_id", "to_json", "unhashed",
]  # fmt: skip

RESULTS_VERSION = 1
"""Part of every run's identity. Raise it by hand when a change of the code changes the numbers of old runs."""

_hints = functools.cache(typing.get_type_hints)  # which compiles every annotation anew
_registry: dict[str, type] = {}  # filled by the decorator below, as classes are defined

_ConfigClass = TypeVar("_ConfigClass", bound=type)


class Config(Protocol):
    """A frozen dataclass of str, int, float, bool, None, tuples and nested frozen dataclasses that can be executed.

    `execute` returns the metrics (JSON-able; training puts its optimiser steps under "steps").
    It may also define `needs(self) -> Iterable[Config]`; see `needs`.
    """

    def execute(self, run: Run) -> dict[str, Any]: ...


def is_kind_of_run(cls: Any) -> bool:
    """Whether instances of a class can be executed, and are not only parts of a configuration."""
    return dataclasses.is_dataclass(cls) and callable(getattr(cls, "execute", None))


def needs(config: Any) -> list[Any]:
    """The runs that must be finished before this one begins: its own `needs()`, by default the runs in its fields."""
    if callable(own := getattr(config, "needs", None)):
        return [need for need in own() if need is not None]
    values = (getattr(config, field.name) for field in dataclasses.fields(config))
    return [value for value in values if is_kind_of_run(type(value))]


def known(name: Any) -> type | None:
    """The registered class of a name."""
    return _registry.get(name) if isinstance(name, str) else None


def register(cls: _ConfigClass) -> _ConfigClass:
    """Class decorator that lets a stored configuration be rebuilt by its class name; TypeError if that is taken."""
    if not dataclasses.is_dataclass(cls) or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise TypeError(f"{cls.__name__} must be a frozen dataclass to be registered as a configuration")
    other = _registry.setdefault(cls.__name__, cls)
    if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise TypeError(f"a configuration named {cls.__name__} is already registered by {other.__module__}")
    _registry[cls.__name__] = cls  # a reloaded module replaces its own class
    return cls


def unhashed(default: Any) -> Any:
    """A dataclass field that is recorded in `config.json` but is no part of the run's identity (a folder, a device)."""
    return dataclasses.field(default=default, metadata={"hashed": False})


def added(default: Any) -> Any:
    """A dataclass field added after results were published: part of the identity only where it is not its default.

    So the runs that were computed before the field existed keep their names. The default must mean "as before".
    """
    return dataclasses.field(default=default, metadata={"added": True})


def to_json(config: Any, *, hashed_only: bool = False) -> dict[str, Any]:
    """A configuration as JSON: `{"class": name, field: value, ...}`, nested dataclasses alike.

    Integers in fields annotated as float become floats, so `1` and `1.0` are one configuration. `hashed_only` leaves
    out the fields made by `unhashed`, and those made by `added` that have their default.

    Raises:
        TypeError: A field holds a value that has no canonical form.
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"{config!r} is not a configuration (an instance of a frozen dataclass)")
    hints = _hints(type(config))
    encoded: dict[str, Any] = {"class": type(config).__name__}
    for field in dataclasses.fields(config):
        value, where = getattr(config, field.name), f"{type(config).__name__}.{field.name}"
        unnamed = not field.metadata.get("hashed", True) or (field.metadata.get("added") and value == field.default)
        if not (hashed_only and unnamed):
            encoded[field.name] = _encode(value, hints[field.name], where, hashed_only)
    return encoded


def _encode(value: Any, hint: Any, where: str, hashed_only: bool) -> Any:
    options = _options(hint)
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return float(value) if float in options and int not in options else int(value)
    if isinstance(value, float):
        if math.isnan(value):
            raise TypeError(f"{where} is NaN, which never equals itself and so names no configuration")
        return float(value) if math.isfinite(value) else {"float": "inf" if value > 0 else "-inf"}
    if isinstance(value, tuple):
        hints = _item_hints(options, len(value))
        return [_encode(item, hints[i], f"{where}[{i}]", hashed_only) for i, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_json(value, hashed_only=hashed_only)
    raise TypeError(f"{where} is a {type(value).__name__}; use str, int, float, bool, None, tuples and dataclasses")


def from_json(data: dict[str, Any], cls: type | None = None) -> Any:
    """Rebuilds what `to_json` wrote, as `cls` or else the registered class of its name.

    Raises:
        AFDSError: Unknown class or fields.
    """
    name = data.get("class")
    cls = cls or known(name)
    if cls is None:
        raise AFDSError(f"unknown kind of run {name!r}; no module of afdslib that is imported here defines it")
    hints = _hints(cls)
    values = {key: value for key, value in data.items() if key != "class"}
    if unknown := sorted(set(values) - {field.name for field in dataclasses.fields(cls) if field.init}):
        raise AFDSError(f"{name} has no field {unknown[0]!r}; another version of afdslib wrote the configuration")
    try:
        return cls(**{key: _decode(value, hints[key]) for key, value in values.items()})
    except AFDSError:
        raise
    except (TypeError, ValueError) as error:  # a field without a default is missing, or a value is impossible
        raise AFDSError(f"the configuration of a {name} cannot be rebuilt ({error}); start the run anew") from error


def _decode(value: Any, hint: Any) -> Any:
    options = _options(hint)
    if isinstance(value, list):
        hints = _item_hints(options, len(value))
        return tuple(_decode(item, hints[i]) for i, item in enumerate(value))
    if isinstance(value, dict):
        if set(value) == {"float"}:
            return float(value["float"])
        nested = {option.__name__: option for option in options if isinstance(option, type)}
        return from_json(value, nested.get(str(value.get("class"))))
    if isinstance(value, int) and not isinstance(value, bool) and float in options and int not in options:
        return float(value)
    return value


def _options(hint: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation: `int | None` gives (int, NoneType)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(option for arg in typing.get_args(hint) for option in _options(arg))
    return (hint,)


def _item_hints(options: Sequence[Any], length: int) -> Sequence[Any]:
    """The annotation of each item of a tuple: `tuple[int, ...]`, `tuple[int, float]` or a bare `tuple`."""
    for args in (typing.get_args(option) for option in options if typing.get_origin(option) is tuple):
        if len(args) == 2 and args[1] is Ellipsis:
            return [args[0]] * length
        if len(args) == length:
            return args
    return [Any] * length


def run_id(config: Any) -> str:
    """The first 12 hexadecimal digits of the sha256 of class name, all hashed fields and `RESULTS_VERSION`."""
    return id_of(to_json(config, hashed_only=True))


def id_of(data: dict[str, Any]) -> str:
    """`run_id` of what `to_json(config, hashed_only=True)` gives."""
    identity = {"config": data, "version": RESULTS_VERSION}
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:12]
