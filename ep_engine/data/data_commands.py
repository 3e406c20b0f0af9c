"""The commands that make token files: `ep-engine tokenizer | tokenize`."""

import os
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from ep_engine.command_line import report
from ep_engine.command_options import Json, Overwrite
from ep_engine.data.conversations import Format


def tokenizer_command(
    corpus: Annotated[list[Path], typer.Argument(help=".jsonl, .json, .parquet and .txt files, or folders of them")],
    out: Annotated[Path, typer.Option(help="Hugging Face tokenizer folder to write")],
    vocab_size: Annotated[int, typer.Option(help="tokens, the 256 bytes and end-of-text among them")],
    lines: Annotated[bool, typer.Option("--lines", help="every line of a .txt file is a document")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train a byte-level BPE tokenizer on text."""
    from ep_engine.data.corpus import train_tokenizer
    from ep_engine.data.documents import document_files, texts
    from ep_engine.errors import UserError
    from ep_engine.output import check_output_folder

    check_output_folder(out, overwrite=overwrite)
    files, malformed = document_files(corpus), list[str]()
    documents = texts(files, malformed, lines=lines)
    if (first := next(documents, None)) is None:
        raise UserError(f"corpus {', '.join(map(str, corpus))} holds 0 texts to learn from; give some")
    size = train_tokenizer(chain((first,), documents), vocab_size, out, overwrite=overwrite)
    _tell_malformed(len(malformed), malformed[:5], None)
    found = {"written": str(out), "vocab_size": size, "files": len(files), "malformed": malformed}
    fewer = "" if size == vocab_size else f", fewer than {vocab_size}: the text has no more pairs to merge"
    report(found, as_json, f"wrote {out}: {size} tokens{fewer}")


def tokenize_command(
    corpus: Annotated[list[Path], typer.Argument(help=".jsonl, .json, .parquet and .txt files, or folders of them")],
    tokenizer: Annotated[Path, typer.Option(help="Hugging Face tokenizer folder")],
    out: Annotated[Path, typer.Option(help="token file to write, named without suffix; with --domains their folder")],
    domains: Annotated[bool, typer.Option("--domains", help="a token file for every folder in the one given")] = False,
    kind: Annotated[Format, typer.Option("--format", help="what a document is")] = "text",
    template: Annotated[
        str | None, typer.Option(help="of conversations: default, vicuna, deepseek, a .jinja file [the tokenizer's]")
    ] = None,
    bos: Annotated[bool, typer.Option("--bos", help="begin every document with the tokenizer's first token")] = False,
    lines: Annotated[bool, typer.Option("--lines", help="every line of a .txt file is a document")] = False,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="tokens of a conversation; more are cut, of question and response [any]")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="refuse a tokenizer that is not that model's")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="that tokenise [one for every core]")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Turn documents into token files in Megatron's format; of conversations only responses are to be learnt."""
    import time

    from ep_engine.data.documents import document_files
    from ep_engine.data.documents import domains as domains_in
    from ep_engine.data.tokenization import Reading, Tokenizing
    from ep_engine.data.vocabulary import check_tokenizer
    from ep_engine.errors import UserError
    from ep_engine.output import check_output_file
    from ep_engine.progress import token_bar

    if domains and (len(corpus) != 1 or not corpus[0].is_dir()):
        raise UserError(f"--domains wants one folder of folders, got {', '.join(map(str, corpus))}; give that")
    files = {out / name: f for name, f in domains_in(corpus[0]).items()} if domains else {out: document_files(corpus)}
    for prefix in files:
        check_output_file(Path(f"{prefix}.bin"), overwrite=overwrite)
    count = processes or len(os.sched_getaffinity(0))
    reading = Reading(
        tokenizer=tokenizer,
        format=kind,
        template=template,
        bos=bos,
        lines=lines,
        processes=count,
        max_length=max_length,
    )
    tokenizing, began = Tokenizing(reading), time.perf_counter()
    if checkpoint is not None:
        check_tokenizer(tokenizer, tokenizing.vocabulary, checkpoint)
    found = []
    for prefix, some in files.items():
        with token_bar(prefix.name, sum(file.stat().st_size for file in some)) as advance:
            found.append(tokenizing.write(some, prefix, advance))
        _tell_malformed(found[-1].num_malformed, found[-1].malformed, Path(f"{prefix}.malformed"))
    seconds, tokens = time.perf_counter() - began, sum(one.num_tokens for one in found)
    told = {"files": [one.report() for one in found], "tokens": tokens, "tokens_per_second": tokens / seconds}
    report(told, as_json, "\n".join([*(one.sentence() for one in found), f"{tokens / seconds:,.0f} tokens/s"]))


def _tell_malformed(count: int, some: list[str], listing: Path | None) -> None:
    if count:
        where = "" if listing is None else f", all in {listing}"
        typer.echo(f"{count} documents are malformed and left out{where}:", err=True)
        for line in some:
            typer.echo(f"  {line}", err=True)
