"""The `pageferry` command."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from typer.main import get_command

from pageferry import __version__
from pageferry.cli import demo, guests, migrations, resolve
from pageferry.cli.options import DEFAULT_ADDRESS, Connection
from pageferry.cli.output import print_error
from pageferry.errors import FerryError, Reason

if TYPE_CHECKING:
    from collections.abc import Sequence

ERROR: Final = 2
"""Exit status of usage errors, and of calls that failed."""

app = typer.Typer(
    name="pageferry",
    help="Move running guests between hosts. Exit status: 0 done, 1 a migration or a check failed, 2 any other error.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo")(demo.demo)
app.command("preflight")(guests.preflight)
app.command("register")(guests.register)
app.command("unregister")(guests.unregister)
app.command("migrate")(migrations.migrate)
app.command("list")(migrations.list_all)
app.command("show")(migrations.show)
app.command("watch")(migrations.watch)
app.command("cancel")(migrations.cancel)
app.command("resume")(migrations.resume)
app.command("resolve")(resolve.resolve)
app.command("limits")(migrations.limits)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pageferry {__version__}")
        raise typer.Exit


@app.callback()
def connect(
    context: typer.Context,
    address: Annotated[
        str,
        typer.Option(
            envvar="PAGEFERRY_ADDRESS", metavar="ADDRESS", help="The sidecar: HOST:PORT or unix:/absolute/path."
        ),
    ] = DEFAULT_ADDRESS,
    insecure: Annotated[
        bool, typer.Option("--insecure", envvar="PAGEFERRY_INSECURE", help="No TLS; for sidecars of this host only.")
    ] = False,
    ca: Annotated[Path | None, typer.Option(envvar="PAGEFERRY_CA", help="PEM file of the CA to trust.")] = None,
    certificate: Annotated[
        Path | None, typer.Option(envvar="PAGEFERRY_CERTIFICATE", help="PEM file of this client's certificate.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option(envvar="PAGEFERRY_KEY", help="PEM file of the certificate's private key.")
    ] = None,
    server_name: Annotated[
        str | None,
        typer.Option(
            envvar="PAGEFERRY_SERVER_NAME", metavar="NAME", help="Name in the sidecar's certificate. Default: its host."
        ),
    ] = None,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the release and exit.")
    ] = False,
) -> None:
    """Remember how to reach the sidecar; nothing is connected yet."""
    context.obj = Connection(address, insecure, ca, certificate, key, server_name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, with the arguments of this process when None, and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows another, and the command goes on.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        status = get_command(app).main(args=given or ["--help"], prog_name="pageferry", standalone_mode=False)
    except FerryError as error:
        print_error(error)
        return ERROR
    except typer.TyperException as error:
        return _usage(error)
    return status if isinstance(status, int) else 0


def _usage(error: typer.TyperException) -> int:
    message = error.format_message()
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "pageferry"
    print_error(FerryError(Reason.INVALID_ARGUMENT, f"{message.rstrip('.')}; see `{command} --help`"))
    return ERROR


if __name__ == "__main__":
    sys.exit(main())
