"""Options that several commands have, of `ep-engine` and of `python -m checkpoint_tools`."""

from pathlib import Path
from typing import Annotated

import typer

Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace a non-empty output")]
Resume = Annotated[bool, typer.Option("--resume", help="go on with what an interrupted run left")]
Json = Annotated[bool, typer.Option("--json", help="report as JSON on stdout")]
Timeout = Annotated[float, typer.Option(min=1, help="seconds after which a silent rank is given up")]
Corpus = Annotated[list[Path], typer.Option(help=".jsonl and .txt files, or folders of them")]
