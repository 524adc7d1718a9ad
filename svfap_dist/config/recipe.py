"""Recipes: TOML files, their overrides, and the errors for what is wrong in them.

A recipe is a TOML file whose tables are the sections of `config.Config`; what it leaves out keeps
its default. Bundled recipes (launch/recipes) are known by name. Overrides `section.key=value` win
over the file; a value is read as TOML, and as plain text where it is not TOML, so
`data.url=s3://bucket/x` needs no quotes.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from svfap_dist import bundled
from svfap_dist.config import Config
from svfap_dist.errors import ConfigError


def load(recipe: str, overrides: Iterable[str] = ()) -> Config:
    """The configuration of a recipe (a path or a bundled name) with `a.b=c` overrides.

    Raises: ConfigError naming the key, the value and the remedy.
    """
    tables = _read(recipe)
    for override in overrides:
        _apply(tables, override)
    return from_tables(tables, where=recipe)


def names() -> list[str]:
    """Names of the bundled recipes."""
    return sorted(path.stem for path in bundled.folder("launch/recipes").glob("*.toml"))


def from_tables(tables: dict[str, Any], where: str) -> Config:
    """Check nested tables against `Config`."""
    try:
        # By way of JSON: strict mode then takes arrays for tuples, still no number for a string.
        return Config.model_validate_json(json.dumps(tables, default=str))
    except ValidationError as error:
        raise _explain(error, where) from error


def dumps(config: Config) -> str:
    """The resolved configuration as TOML; `load` of it gives an equal `Config`."""
    lines: list[str] = []
    for section, values in config:
        if values is None:
            continue
        lines.append(f"[{section}]")
        # JSON's strings, numbers, booleans and arrays are TOML's too.
        lines += [
            f"{name} = {json.dumps(value)}"
            for name, value in values.model_dump(mode="json").items()
            if value is not None
        ]
        lines.append("")
    return "\n".join(lines)


def _read(recipe: str) -> dict[str, Any]:
    path = Path(recipe)
    if path.suffix != ".toml":
        known = names()
        if recipe not in known:
            raise ConfigError(
                "No such recipe",
                where=recipe,
                found=f"neither a .toml file nor one of the bundled recipes {', '.join(known)}",
                do=_nearest(recipe, known) or "give the path of a .toml file or a bundled name",
            )
        path = bundled.folder("launch/recipes") / f"{recipe}.toml"
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            "Cannot read the recipe",
            where=str(path),
            found=error.strerror or "",
            do="check the path",
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            "Recipe is not valid TOML", where=str(path), found=str(error), do="correct that line"
        ) from error


def _apply(tables: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    section, dot, name = key.partition(".")
    if not (separator and dot and section and name):
        raise ConfigError(
            "Unreadable override",
            where=override,
            found="not of the form section.key=value",
            do="write e.g. train.max_steps=100",
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    table = tables.setdefault(section, {})
    if isinstance(table, dict):
        table[name] = value


def _explain(error: ValidationError, where: str) -> ConfigError:
    """One error for the first thing pydantic complains about."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        siblings = _fields_beside(first["loc"])
        advice = _nearest(str(first["loc"][-1]), siblings) or f"known here: {', '.join(siblings)}"
        return ConfigError(
            "Unknown key", where=f"{key} in {where}", found=f"{key} = {first['input']!r}", do=advice
        )
    # Of a rule over several keys the input is the whole section, and its message names the keys.
    found = "values that do not go together" if isinstance(first["input"], dict) else None
    return ConfigError(
        "Wrong value",
        where=f"{key or 'the sections'} in {where}",
        found=found or f"{first['input']!r}",
        do=first["msg"].removeprefix("Value error, "),
    )


def _fields_beside(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Config
    for part in location[:-1]:
        annotation = model.model_fields[str(part)].annotation
        models = [annotation, *get_args(annotation)]  # a section may be `X | None`
        (model,) = (m for m in models if isinstance(m, type) and issubclass(m, BaseModel))
    return sorted(model.model_fields)


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}?" if close else ""
