"""Read recipes: TOML files, the recipes they extend, overrides, and the errors in them.

In: a recipe's path or bundled name (launch/recipes) and overrides. Out: a `Config`. The tables of a
recipe are the sections of `Config`; an omitted field keeps its default, or the value of the recipe
that `extends` names. Overrides `section.key=value` win over the file; a value is read as TOML, or
as plain text where it is not TOML, so `data.url=s3://bucket/x` needs no quotes. Keys and values
that were renamed are still understood, with a warning.
"""

from __future__ import annotations

import json
import logging
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from svfap_dist import bundled
from svfap_dist.config.config import Config
from svfap_dist.config.sections import TaskConfig
from svfap_dist.errors import ConfigError, nearest
from svfap_dist.storage import refuse_credentials
from svfap_dist.text_file import SAVE_AS_UTF8, decode_text

log = logging.getLogger(__name__)

_RENAMED_KEYS = {"data.colours": "colors"}
_RENAMED_VALUES = [("data.region", "centre", "center")]
# Values of keys that stored recipes of older runs lack, where the default is another one today.
_VALUES_BEFORE = {"data.order_version": 1}


def load(recipe: str, overrides: Iterable[str] = ()) -> Config:
    """Return the configuration of a recipe.

    Args:
        recipe: Path of a .toml file, or a bundled name.
        overrides: Texts `section.key=value`; later ones win.

    Raises:
        ConfigError: Naming the key, the value and the remedy.
    """
    overrides = list(overrides)
    for number, override in enumerate(overrides, start=1):
        refuse_credentials(override, f"override {number}")
    tables = _read(recipe)
    for override in overrides:
        _merge(tables, _with_new_names(_parse(override), override))
    return from_tables(tables, where=recipe)


def names() -> list[str]:
    """Return the names of the bundled recipes."""
    return sorted(path.stem for path in bundled.folder("launch/recipes").glob("*.toml"))


def from_tables(tables: dict[str, Any], where: str) -> Config:
    """Return the configuration in nested tables, such as an old run's config.toml.

    Args:
        tables: Values by section and key; old names of keys are understood.
        where: Their place, for errors.

    Raises:
        ConfigError: If a key is unknown, a value wrong, or values exclude each other.
    """
    tables = _with_new_names(tables, where)
    for section, values in tables.items():
        inner = values.items() if isinstance(values, dict) else ()
        if nested := [name for name, value in inner if isinstance(value, dict)]:
            found, advice = "a table", "a section has values only; see the bundled recipes"
            raise ConfigError("Wrong value", f"{section}.{nested[0]} in {where}", found, advice)
    for key, text in _texts(tables):
        refuse_credentials(text, f"{key} in {where}")
        if not text.isascii() and (bad := text.encode(errors="backslashreplace").decode()) != text:
            title, advice = "Text is not UTF-8", "rename the file or folder"
            raise ConfigError(title, f"{key} in {where}", bad, advice)
    try:
        # Through JSON: strict mode then takes arrays for tuples, still no number for a string.
        text = json.dumps(tables, default=str)
        return _with_one_source(Config.model_validate_json(text))
    except ValidationError as error:
        raise explain(error, where) from error


def _with_one_source(config: Config) -> Config:
    """Return a recipe whose only source, if it has just one, is data.url: the same run."""
    data = config.data
    if len(data.sources) != 1:
        return config
    (source,) = data.sources
    own = {"url": source.url, "region": source.region or data.region}
    one = {**own, "kind": source.kind or data.kind, "sources": ()}
    return config.model_copy(update={"data": data.model_copy(update=one)})


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield key and text of all texts in nested tables."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _texts(part, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part, key)
    elif isinstance(value, str):
        yield key, value


def from_stored(tables: dict[str, Any], where: str) -> Config:
    """Return the resolved configuration that a run has stored.

    A key that did not exist then has the value that the run was computed with.

    Args:
        tables: Values by section and key.
        where: Their place, for errors.

    Raises:
        ConfigError: As for `from_tables`.
    """
    before: dict[str, Any] = {}
    for key, value in _VALUES_BEFORE.items():
        section, _, name = key.partition(".")
        before.setdefault(section, {})[name] = value
    return from_tables(_merge(before, tables), where)


def dumps(config: Config) -> str:
    """Return the resolved configuration as TOML; `load` of it gives an equal `Config`.

    Args:
        config: The configuration.
    """
    lines: list[str] = []
    for section, values in config:
        if values is None:
            continue
        lines.append(f"[{section}]")
        # What an open task leaves out follows from the data: a default in its place would count.
        is_open = isinstance(values, TaskConfig) and values.kind == "auto"
        lines += [
            f"{name} = {_as_toml(value)}"
            for name, value in values.model_dump(mode="json", exclude_unset=is_open).items()
            if value is not None
        ]
        lines.append("")
    return "\n".join(lines)


def _as_toml(value: Any) -> str:
    """Return a value; JSON's strings, numbers, booleans and arrays are TOML's too."""
    if isinstance(value, list):
        return f"[{', '.join(map(_as_toml, value))}]"
    if isinstance(value, dict):
        pairs = [f"{name} = {_as_toml(each)}" for name, each in value.items() if each is not None]
        return f"{{{', '.join(pairs)}}}"
    return json.dumps(value)


def _read(recipe: str, extended_by: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the tables of a recipe, merged over those of the recipe it extends."""
    path = Path(recipe)
    if path.suffix != ".toml":
        known = names()
        if recipe not in known:
            where = extended_by[-1] if extended_by else recipe
            found = f"{recipe} is neither a .toml file nor a bundled recipe"
            advice = f"{nearest(recipe, known)} (or give the path of a .toml file)"
            raise ConfigError("No such recipe", where, found, advice)
        path = bundled.folder("launch/recipes") / f"{recipe}.toml"
    place = str(path.resolve())
    if place in extended_by:
        title, found = "Recipes extend each other in a cycle", " -> ".join((*extended_by, place))
        raise ConfigError(title, extended_by[0], found, "remove `extends` from one of them")
    try:
        text = decode_text(path.read_bytes())
    except OSError as error:
        where = f"extends in {extended_by[-1]}" if extended_by else str(path)
        found = f"{path}: {error.strerror}"
        raise ConfigError("Cannot read the recipe", where, found, "check the path") from error
    except ValueError as error:
        title = "Recipe is not UTF-8 text"
        raise ConfigError(title, str(path), str(error), SAVE_AS_UTF8) from error
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # the former also for numbers of 5,000 digits
        title, advice = "Recipe is not valid TOML", "correct that line"
        raise ConfigError(title, str(path), str(error), advice) from error
    tables = _with_new_names(tables, str(path))
    base = tables.pop("extends", None)
    if base is None:
        return tables
    if not isinstance(base, str):
        advice = "give the name of a bundled recipe, or a path relative to this one"
        raise ConfigError("Wrong value", f"extends in {path}", repr(base), advice)
    if base.endswith(".toml"):
        base = str(path.parent / base)
    return _merge(_read(base, (*extended_by, place)), tables)


def _merge(tables: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Put the values of `over` into `tables`, key by key, and return it."""
    for section, values in over.items():
        below = tables.get(section)
        if isinstance(below, dict) and isinstance(values, dict):
            below |= values
        else:
            tables[section] = values
    return tables


def _parse(override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    section, dot, name = key.partition(".")
    if not (separator and dot and section and name):
        found, advice = "not of the form section.key=value", "write e.g. train.max_steps=100"
        raise ConfigError("Unreadable override", override, found, advice)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    return {section: {name: value}}


def _with_new_names(tables: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the tables with renamed keys and values under their new names."""
    tables = {key: dict(t) if isinstance(t, dict) else t for key, t in tables.items()}
    for key, new in _RENAMED_KEYS.items():
        section, _, old = key.partition(".")
        values = tables.get(section)
        if isinstance(values, dict) and old in values:
            if new in values:
                found = f"{key} and {section}.{new}, which is its new name"
                raise ConfigError("Setting is given twice", where, found, f"remove {key}")
            values[new] = values.pop(old)
            _warn_renamed(key, f"{section}.{new}")
    for key, old, new in _RENAMED_VALUES:
        section, _, name = key.partition(".")
        values = tables.get(section)
        if isinstance(values, dict) and values.get(name) == old:
            values[name] = new
            _warn_renamed(f'{key} = "{old}"', f'{key} = "{new}"')
    return tables


def _warn_renamed(old: str, new: str) -> None:
    """Warn of an old name, once per command: a run reads its recipe several times."""
    log.warning("%s is now called %s; the old name still works", old, new, extra={"once": True})


def explain(
    error: ValidationError, where: str, model: type[BaseModel] = Config, prefix: str = ""
) -> ConfigError:
    """Return our error for the first of pydantic's.

    Args:
        error: Error of pydantic.
        where: The file or URL read.
        model: The model it was read as.
        prefix: Prefix of keys, such as "model.".
    """
    first = error.errors()[0]
    key = prefix + ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        advice = nearest(str(first["loc"][-1]), _fields_beside(model, first["loc"]))
        found = f"{key} = {first['input']!r}"
        return ConfigError("Unknown key", f"{key} in {where}", found, advice)
    if first["type"] == "missing":
        title, advice = "Missing required setting", f"give it a value: {key}=..."
        return ConfigError(title, f"{key} in {where}", "no value", advice)
    # For a rule over several keys the input is the whole section, and its message names the keys.
    is_rule = isinstance(first["input"], dict)
    found = "values that do not fit each other" if is_rule else repr(first["input"])
    advice = first["msg"].removeprefix("Value error, ")
    if first["type"] == "tuple_type":
        advice = f"""give a list, in a shell as '{key}=["A", "B"]' or '{key}=[1, 2]'"""
    return ConfigError("Wrong value", f"{key or 'the sections'} in {where}", found, advice)


def _fields_beside(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location[:-1]:
        if isinstance(part, int):  # an entry of a list of tables
            continue
        annotation = model.model_fields[str(part)].annotation
        models = [annotation, *get_args(annotation)]  # `X | None`, or a tuple of X
        (model,) = (m for m in models if isinstance(m, type) and issubclass(m, BaseModel))
    return sorted(model.model_fields)
