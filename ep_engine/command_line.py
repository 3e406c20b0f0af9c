"""How every command ends: a report on stdout, one sentence on stderr, and an exit status."""

import json
import sys
import time
from typing import Any, NoReturn

import typer
from typer.exceptions import TyperException

from ep_engine.errors import Fault, UserError
from ep_engine.mesh import World

_FIRST_RANK_SPEAKS_S = 10.0  # ranks start seconds apart
_INTERRUPTED, _INTERRUPTION = 130, "interrupted; what stood before still stands"


def exit_with_sentence(command: typer.Typer) -> NoReturn:
    """Run a command line and exit: status 2 for what the user got wrong, 1 for a fault, each with one sentence.

    Where all ranks have the same to say, the first says it: torchrun stops the others as soon as it has exited.
    """
    rank, everywhere = World.from_environment().rank, True
    try:
        status, sentence = int(command(standalone_mode=False) or 0), ""
        if status == _INTERRUPTED:  # typer turns Ctrl-C into this status
            sentence = _INTERRUPTION
    except TyperException as error:
        words = error.format_message().rstrip(".").replace("Value error, ", "")
        status, sentence = error.exit_code, f"{words}; see --help"
    except UserError as error:
        status, sentence = error.exit_status, str(error)
    except Fault as error:
        status, sentence, everywhere = error.exit_status, str(error), error.everywhere
    except OSError as error:
        status, sentence = 1, f"{error.filename or 'the operating system'}: {error.strerror or error}"
    except (typer.Abort, KeyboardInterrupt):
        status, sentence = _INTERRUPTED, _INTERRUPTION
    if not sentence:
        sys.exit(status)
    if rank > 0 and everywhere:
        time.sleep(_FIRST_RANK_SPEAKS_S)  # still here: the first rank has nothing to say
    typer.echo(" ".join(sentence.split()), err=True)
    sys.exit(status)


def print_json(value: dict[str, Any]) -> None:
    """The report of a command under `--json`: nothing else goes to stdout."""
    typer.echo(json.dumps(value, indent=1))


def report(values: dict[str, Any], as_json: bool, sentence: str) -> None:
    """What a command found: its values under `--json`, else the sentence."""
    if as_json:
        print_json(values)
    else:
        typer.echo(sentence)
