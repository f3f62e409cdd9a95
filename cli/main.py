"""The `clusterq` command. Heavy imports happen inside command bodies, so that `--help` answers at once."""

import errno
import os
from typing import Any

import click

from cli import commands

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_OUT_OF_MEMORY = "the memory does not suffice; end what else uses it, or use a machine with more"
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG}


class _UserError(click.ClickException):
    """An error that the user can mend: one line, exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"Error: {self.message}", err=True)


class _Group(click.Group):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does it; an error in the options of the tool itself is one line too."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise _usage_error(error) from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does it; near matches for a misspelled name, which click has from 8.4 on only."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-") and not ctx.resilient_parsing:
            from difflib import get_close_matches

            near = get_close_matches(name.lower(), self.list_commands(ctx), n=1)
            raise click.UsageError(f"no command {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""), ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OSError as error:
            if error.errno in _DISK or _is_ours(error):
                raise _UserError(_one_line(error)) from error
            if error.errno == errno.ENOMEM:  # of another process that cannot be started, for one
                raise _UserError(f"{_OUT_OF_MEMORY} ({_one_line(error)})") from error
            raise
        except click.UsageError as error:
            raise _usage_error(error) from error
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if _is_ours(error):
                raise _UserError(_one_line(error)) from error
            if isinstance(error, MemoryError | RuntimeError) and _is_of_memory(error):
                raise _UserError(f"{_OUT_OF_MEMORY} ({_one_line(error) or 'MemoryError'})") from error
            raise


def _usage_error(error: click.UsageError) -> _UserError:
    """A wrong call in a line; of an option of the tool itself that stands behind a command it says where it goes."""
    path, message = error.ctx.command_path if error.ctx else "clusterq", error.format_message()
    if isinstance(error, click.NoSuchOption) and error.ctx and (parent := error.ctx.parent):
        own = {name for param in parent.command.params for name in param.opts}
        if error.option_name in own:
            name, command = error.option_name, error.ctx.info_name
            message = f"No such option {name!r} of {command}: it stands before the command, clusterq {name} {command}"
    return _UserError(f"{message} (see {path} --help)")


def _is_of_memory(error: Exception) -> bool:
    from clusterq_deploy.oom import is_out_of_memory

    return is_out_of_memory(error)


def _is_ours(error: Exception) -> bool:
    from calib.support.errors import ClusterQError

    return isinstance(error, ClusterQError)


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed: by default large maps go back to the kernel, and every training step on a CPU
    takes them anew, page by page, which is a third of its time. No effect elsewhere.
    """
    import ctypes
    import sys

    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _print_any_path() -> None:
    """Let stdout take paths that are not UTF-8, as the bytes that they are."""
    import io
    import sys

    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="surrogateescape")


def _set_up_logging(verbose: bool) -> None:
    """Warnings go to stderr, with --verbose more; without it not TensorRT's log, whose errors are in our messages."""
    import logging

    handler = logging.StreamHandler()
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", handlers=[handler])
    else:
        handler.addFilter(lambda record: record.name != "clusterq_deploy.runtimes.tensorrt.gpu")
        logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="clusterq-deploy", prog_name="clusterq")
@click.option("-v", "--verbose", is_flag=True, help="Log what the library does.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@click.pass_context
def main(ctx: click.Context, verbose: bool, quiet: bool) -> None:
    """INT8 and INT4 deployables of a pretrained CNN, without its training data.

    `clusterq run MODEL` does everything; the other commands are its stages, each on the files that the one
    before wrote.
    """
    ctx.obj = {"quiet": quiet}
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as in runtimes.runners, for the doctor too
    _keep_freed_memory()
    _print_any_path()
    _set_up_logging(verbose)


for command in commands.ALL:
    main.add_command(command)
