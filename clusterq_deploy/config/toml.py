"""Settings as nested tables, before they are checked: read from a file, merged, with their paths."""

import tomllib
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from clusterq_deploy.errors import ConfigError
from clusterq_deploy.run.manifest import CONFIG, MANIFEST

Settings = dict[str, Any]

_OPTIONS = {
    "": "model weights input_size mean std bits first_last keep max_drop cpu fp16 data limit seed device effort",
    "synthesis": "recipe images",
    "build": "batch optimization_level timing_cache version_compatible hardware_compatible same_capability build_route "
    "rtx",
    "benchmark": "batches threads",
}
PLACES: dict[str, tuple[str, ...]] = {
    "workspace": ("build", "workspace_bytes"),
    **{name: (table, name) if table else (name,) for table, names in _OPTIONS.items() for name in names.split()},
}
"""The place of each option's setting in a `RunConfig`, by the option's name with underscores."""


def read_settings(path: Path) -> Settings:
    """Return the settings of a TOML file for `make_config`. Only names and paths are checked.

    A setting may have its option's name, with dashes or underscores, at the top or in its table. Paths are relative to
    the file's folder and stay in it; only the `run.toml` of a run has absolute ones.

    Raises:
        ConfigError: it cannot be read, is not TOML, has one setting under two names, or has a path out of its folder.
    """
    try:
        with path.open("rb") as file:
            settings = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # the parser recurses into nested arrays
        raise ConfigError(f"{path} is not TOML: {error}") from error

    of_run = path.name == CONFIG and (path.parent / MANIFEST).is_file()

    def inside(name: str, value: Path) -> Path:
        if of_run and value.is_absolute():
            return value
        target = path.parent / value
        parts = accumulate(str(target).split(":"), "{}:{}".format)  # weights may be FILE:KEY
        try:
            outside = not all(Path(part).resolve().is_relative_to(path.parent.resolve()) for part in parts)
        except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a null byte
            raise ConfigError(f"{name} in {path}: {str(value)!r} is not a path: {error}") from error
        if outside:
            raise ConfigError(
                f"{name} in {path}: {str(value)!r} leads out of the file's folder; give it on the command line"
            )
        return target

    return with_paths(_with_options_placed(settings, path), inside)


def _with_options_placed(settings: Settings, path: Path) -> Settings:
    """Return a file's settings, with those that have an option's name moved to that option's place."""
    tables = {name: settings[name] for name in _OPTIONS if name in settings}
    if not all(isinstance(table, dict) for table in tables.values()):
        return settings  # `make_config` reports it
    items: dict[tuple[str, ...], Any] = {(key,): value for key, value in settings.items() if key not in tables}
    items |= {(name, key): value for name, table in tables.items() for key, value in table.items()}
    placed: Settings = {}
    names: dict[tuple[str, ...], str] = {}
    for written, value in items.items():
        place = PLACES.get(written[-1].replace("-", "_"), written)
        if written[:-1] not in ((), place[:-1]):
            place = written  # an option's name in the table of another stage
        name = ".".join(written)
        if names.setdefault(place, name) != name:
            raise ConfigError(f"{names[place]} and {name} in {path} are one setting; leave one")
        put(placed, place, value)
    return placed


def put(settings: Settings, place: tuple[str, ...], value: Any) -> None:
    """Set one of nested settings."""
    *tables, name = place
    for table in tables:
        settings = settings.setdefault(table, {})
    settings[name] = value


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> Settings:
    """Return two nested tables as one; values of `above` replace those of `below`."""
    tables = [key for key in above if isinstance(above[key], Mapping) and isinstance(below.get(key), Mapping)]
    return {**below, **above, **{key: merged(below[key], above[key]) for key in tables}}


def with_paths(settings: Settings, change: Callable[[str, Path], Path]) -> Settings:
    """Return nested settings with each path replaced by `change(name, path)`."""
    changed = dict(settings)
    if isinstance(model := settings.get("model"), str):
        file, colon, factory = model.rpartition(":")
        if file.endswith(".py"):
            changed["model"] = f"{change('model', Path(file))}{colon}{factory}"
        elif model.endswith(".pt2"):
            changed["model"] = str(change("model", Path(model)))
    if isinstance(build := settings.get("build"), dict):
        changed["build"] = dict(build)
    for table, name in ((changed, "weights"), (changed, "data"), (changed.get("build"), "timing_cache")):
        if isinstance(table, dict) and isinstance(value := table.get(name), str) and value != "none":
            table[name] = str(change(name, Path(value)))
    return changed
