"""The help texts in docs/commands.md: `python tests/commands_page.py --write` writes them there.

A text stands between `<!-- help: NAME -->` and `<!-- end -->`; what stands elsewhere is written by hand. Texts are made
from the commands themselves, not from what click prints of them, whose form differs between click's versions.
"""

import inspect
import re
import sys
import textwrap
from pathlib import Path

import click

from cli.main import main

PAGE = Path(__file__).parents[1] / "docs/commands.md"
_BLOCK = re.compile(r"<!-- help: (.*?) -->\n.*?<!-- end -->", re.S)


def help_block(name: str) -> str:
    """Return what a command's --help says, as Markdown with its markers; `clusterq` is the whole tool's."""
    command = main.commands[name.split()[1]] if " " in name else main
    arguments = [_usage(param) for param in command.params if isinstance(param, click.Argument)]
    usage = "clusterq [OPTIONS] COMMAND" if command is main else " ".join([name, *arguments, "[OPTIONS]"])
    lines = [f"<!-- help: {name} -->", f"`{usage}`", ""]
    for paragraph in inspect.cleandoc(str(command.help)).split("\n\n"):
        lines += [textwrap.fill(" ".join(paragraph.split()), 118, break_on_hyphens=False), ""]
    rows = [(_names(param), str(param.help)) for param in command.params if isinstance(param, click.Option)]
    lines += ["| option | does |", "|---|---|"]
    lines += [f"| `{_cell(names)}` | {_cell(text)} |" for names, text in rows]
    return "\n".join([*lines, "<!-- end -->"])


def _usage(argument: click.Argument) -> str:
    text = argument.metavar or str(argument.name).upper()
    return text if argument.required else f"[{text}]"


def _names(option: click.Option) -> str:
    """How an option is given: its names, and what its value is like."""
    names = ", ".join(option.opts)
    if option.is_flag:
        return names
    kind = option.type
    return f"{names} {option.metavar or ('|'.join(kind.choices) if isinstance(kind, click.Choice) else _value(kind))}"


def _value(kind: click.ParamType) -> str:
    if isinstance(kind, click.FloatRange):
        return f"{kind.min:g}..{kind.max:g}"
    return "N" if isinstance(kind, click.IntRange) else "PATH"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def refreshed(text: str) -> str:
    """Return the page with every help text as it is now."""
    return _BLOCK.sub(lambda found: help_block(found[1]), text)


def documented(text: str) -> list[str]:
    """Return the commands that have a block."""
    return _BLOCK.findall(text)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("usage: python tests/commands_page.py --write")
    PAGE.write_text(refreshed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
