"""The `clusterq` command. Heavy imports happen inside command bodies, so that `--help` is fast."""

import ctypes
import errno
import io
import logging
import os
import sys
from typing import Any

import click

from cli import commands

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG}


class _UserError(click.ClickException):
    """An error that the user can fix: one line, exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"Error: {self.message}", err=True)


class _Group(click.Group):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the options of the tool itself; print an error in them as one line."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise _usage_error(error) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; print an error that the user can fix as one line."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            raise _usage_error(error) from error
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if message := _explanation(error):
                raise _UserError(message) from error
            raise


def _usage_error(error: click.UsageError) -> _UserError:
    """Return a usage error as one line; for an option of the tool itself after a command, say where it belongs."""
    path, message = error.ctx.command_path if error.ctx else "clusterq", error.format_message()
    if isinstance(error, click.NoSuchOption) and error.ctx and (parent := error.ctx.parent):
        name, command = error.option_name, error.ctx.info_name
        if any(name in param.opts for param in parent.command.params):
            message = f"No such option {name!r} of {command}: it comes before the command, clusterq {name} {command}"
    return _UserError(f"{message} (see {path} --help)")


def _explanation(error: Exception) -> str | None:
    """Return the message of an error that the user can fix, in one line; None for an error in the program."""
    from calib.support.errors import ClusterQError

    text = " ".join(str(error).split())
    code = error.errno if isinstance(error, OSError) else None
    if isinstance(error, ClusterQError) or code in _DISK_ERRORS:
        return text
    out_of_memory = code == errno.ENOMEM  # for example if a process cannot be started
    if isinstance(error, MemoryError | RuntimeError):
        from clusterq_deploy.oom import is_out_of_memory

        out_of_memory = is_out_of_memory(error)
    if not out_of_memory:
        return None
    return f"not enough memory; end other programs, or use a machine with more ({text or 'MemoryError'})"


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory, on Linux.

    By default it returns large blocks to the kernel, and every training step on a CPU requests them again, page by
    page, which is a third of its time.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _set_up_logging(verbose: bool) -> None:
    """Log warnings to stderr, and more with --verbose; without it not TensorRT's log, as our errors contain its own."""
    handler = logging.StreamHandler()
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", handlers=[handler])
    else:
        handler.addFilter(lambda record: record.name != "clusterq_deploy.runtimes.tensorrt.gpu")
        logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="clusterq-deploy", prog_name="clusterq")
@click.option("-v", "--verbose", is_flag=True, help="Log what the library does.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@click.pass_context
def main(ctx: click.Context, verbose: bool, quiet: bool) -> None:
    """INT8 and INT4 deployables of a pretrained CNN, without its training data.

    `clusterq run MODEL` does everything; the other commands are its stages, each on the files of earlier stages.
    """
    ctx.obj = {"quiet": quiet}
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as in runtimes.runners, also for the doctor
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="surrogateescape")  # a path may not be UTF-8
    _keep_freed_memory()
    _set_up_logging(verbose)


for command in commands.ALL:
    main.add_command(command)
