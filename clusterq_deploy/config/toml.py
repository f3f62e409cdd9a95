"""Settings as a file has them, before they are a configuration."""

import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

from clusterq_deploy.config.presets import Settings
from clusterq_deploy.errors import ConfigError
from clusterq_deploy.run.manifest import CONFIG, MANIFEST

_TOP = "model weights input_size mean std bits first_last keep max_drop cpu fp16 data limit seed device effort"

PLACES: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in _TOP.split()},
    "recipe": ("synthesis", "recipe"),
    "images": ("synthesis", "images"),
    "batch": ("build", "batch"),
    "workspace": ("build", "workspace_bytes"),
    "optimization_level": ("build", "optimization_level"),
    "timing_cache": ("build", "timing_cache"),
    "version_compatible": ("build", "version_compatible"),
    "hardware_compatible": ("build", "hardware_compatible"),
    "batches": ("benchmark", "batches"),
    "threads": ("benchmark", "threads"),
}
"""Where in a `RunConfig` each option of the command line stands, by its name with underscores."""


def read_settings(path: Path) -> Settings:
    """The settings of a TOML file for `make_config`, unchecked but for names and paths.

    A setting may have its option's name, with dashes or underscores, at the top or in its table. Paths are those of the
    file's folder and stay in it; the `run.toml` of a run has absolute ones, which lead where the run's options led.

    Raises:
        ConfigError: it cannot be read, is no TOML, has one setting under two names, or has a path that leads out of its
            folder: by `..`, through a link, or as an absolute one.
    """
    try:
        with path.open("rb") as file:
            settings = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # the parser recurses into nested arrays
        raise ConfigError(f"{path} is no TOML: {error}") from error

    of_run = path.name == CONFIG and (path.parent / MANIFEST).is_file()

    def within(name: str, own: Path) -> Path:
        if own.is_absolute() and of_run:
            return own
        found = path.parent / own
        try:
            leaves = not found.resolve().is_relative_to(path.parent.resolve())
        except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a null byte
            raise ConfigError(f"{name} in {path}: {str(own)!r} is no path: {error}") from error
        if leaves:
            raise ConfigError(
                f"{name} in {path}: {str(own)!r} leads out of the file's folder; give it on the command line"
            )
        return found

    return with_paths(_placed(settings, path), within)


def _placed(settings: Settings, path: Path) -> Settings:
    """Settings of a file in which those that have the names of options stand where a configuration has them."""
    placed = {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}
    for option, place in PLACES.items():
        for holder, name in _spellings(placed, option, place):
            *tables, key = place
            target = placed.setdefault(tables[0], {}) if tables else placed
            if not isinstance(target, dict):
                continue  # no table, which is said when the settings are checked
            if key in target:
                raise ConfigError(f"{name} and {'.'.join(place)} in {path} are one setting; leave one")
            target[key] = holder.pop(name)
    return placed


def _spellings(settings: Settings, option: str, place: tuple[str, ...]) -> Iterator[tuple[Settings, str]]:
    """The tables that hold a setting under another name than its own or at another place, with the name there."""
    inner = settings.get(place[0]) if len(place) > 1 else None
    for holder in (settings, inner):
        for name in (option, option.replace("_", "-")):
            own = name == place[-1] and (holder is inner or len(place) == 1)
            if isinstance(holder, dict) and name in holder and not own:
                yield holder, name


def with_paths(settings: Settings, change: Callable[[str, Path], Path]) -> Settings:
    """Nested settings in which each path, with its name, was changed; what is of another type stays as it is."""
    changed = dict(settings)
    if isinstance(model := settings.get("model"), str):
        file, colon, factory = model.rpartition(":")
        if file.endswith(".py"):
            changed["model"] = f"{change('model', Path(file))}{colon}{factory}"
    if isinstance(build := settings.get("build"), dict):
        changed["build"] = dict(build)
    for table, name in ((changed, "weights"), (changed, "data"), (changed.get("build"), "timing_cache")):
        if isinstance(table, dict) and isinstance(value := table.get(name), str) and value != "none":
            table[name] = str(change(name, Path(value)))
    return changed
