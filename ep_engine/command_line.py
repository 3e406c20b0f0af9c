"""How every command ends: a report on stdout, one sentence on stderr, and an exit status."""

import json
import sys
from typing import Any, NoReturn

import typer
from typer.exceptions import TyperException

from ep_engine.errors import Fault, UserError
from ep_engine.mesh import World


def exit_with_sentence(command: typer.Typer) -> NoReturn:
    """Run a command line and exit: status 2 for what the user got wrong, 1 for a fault, each with one sentence.

    Of several ranks the first speaks for all where all have the same to say.
    """
    rank, everywhere = World.from_environment().rank, True
    try:
        sys.exit(command(standalone_mode=False))
    except TyperException as error:
        status, sentence = error.exit_code, f"{error.format_message().rstrip('.')}; see --help"
    except UserError as error:
        status, sentence = error.exit_status, str(error)
    except Fault as error:
        status, sentence, everywhere = error.exit_status, str(error), error.everywhere
    except OSError as error:
        status, sentence = 1, f"{error.filename or 'the operating system'}: {error.strerror or error}"
    except (typer.Abort, KeyboardInterrupt):
        status, sentence = 130, "interrupted; nothing was written"
    if rank == 0 or not everywhere:
        typer.echo(" ".join(sentence.split()), err=True)
    sys.exit(status)


def print_json(value: dict[str, Any]) -> None:
    """The report of a command under `--json`: nothing else goes to stdout."""
    typer.echo(json.dumps(value, indent=1))
