"""`ep-engine tokenizer` and `tokenize`: token files of every kind of corpus, and every way to give a wrong one."""

import io
import json
import re
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from rich.console import Console
from transformers import AutoTokenizer

from ep_engine import progress
from ep_engine.c2r.profile import token_file
from ep_engine.data import documents, tokenization
from ep_engine.data.corpus import END_OF_TEXT, train_tokenizer
from ep_engine.data.encoder import fitting
from ep_engine.data.tokenization import Reading, Tokenizing
from ep_engine.data.tokens import TokenFile, mask_prefix, write_token_file
from ep_engine.errors import UserError
from ep_engine.resolve import resolve
from tests.run_cases import small_run
from tests.run_files import contents
from tests.texts import VOCABULARY, WORDS, text_model, write_documents

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer([*WORDS] * 3, VOCABULARY, folder)
    return folder


def text_of(prefix: Path, tokenizer: Path) -> list[str]:
    """The documents of a token file, without their ends."""
    tokens, fast = TokenFile(prefix), AutoTokenizer.from_pretrained(tokenizer)
    text = fast.decode(tokens.read(0, tokens.num_tokens))
    assert text.endswith(END_OF_TEXT)
    return text.split(END_OF_TEXT)[:-1]


def test_a_tokenizer_is_learnt_and_used(run: Command, tmp_path: Path) -> None:
    corpus = write_documents(tmp_path / "corpus")
    status, out, err = run("tokenizer", corpus, "--out", tmp_path / "tok", "--vocab-size", 300)
    assert (status, out, err) == (0, f"wrote {tmp_path / 'tok'}: 300 tokens\n", "")
    status, out, err = run("tokenize", corpus, "--tokenizer", tmp_path / "tok", "--out", tmp_path / "text")
    assert (status, err) == (0, "")
    lines = [json.loads(line) for name in "ab" for line in (corpus / f"{name}.jsonl").read_text().splitlines()]
    texts = [record.get("content", record.get("text")) for record in lines]
    assert text_of(tmp_path / "text", tmp_path / "tok") == texts
    tokens = TokenFile(tmp_path / "text")
    assert out.splitlines()[0] == f"wrote {tmp_path / 'text'}: {tokens.num_tokens} tokens, 80 documents"
    assert out.splitlines()[1].endswith(" tokens/s")
    assert sorted(path.name for path in tmp_path.glob("text*")) == ["text.bin", "text.idx", "text.json"]


def test_a_tokenizer_that_runs_out_of_pairs_says_so(run: Command, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("abab")
    (corpus / "b.jsonl").write_text("{")
    command = ("tokenizer", corpus, "--out", tmp_path / "tok", "--vocab-size", 1000)
    status, out, err = run(*command)
    assert (status, out) == (
        0,
        f"wrote {tmp_path / 'tok'}: 259 tokens, fewer than 1000: the text has no more pairs to merge\n",
    )
    assert err.startswith(f"1 documents are malformed and left out:\n  {corpus}/b.jsonl:1: no JSON")
    assert run(*command)[0] == 2
    report = json.loads(run(*command, "--overwrite", "--json")[1])
    assert (report["vocab_size"], report["files"], len(report["malformed"])) == (259, 2, 1)


def test_every_domain_gets_a_token_file(run: Command, tokenizer: Path, tmp_path: Path) -> None:
    for name, words in zip(("en_cc", "github"), WORDS, strict=False):
        (tmp_path / "raw" / name).mkdir(parents=True)
        parquet.write_table(pa.table({"content": [words, words]}), tmp_path / "raw" / name / "a.parquet")
    out = tmp_path / "out"
    status, report, _ = run("tokenize", tmp_path / "raw", "--domains", "--tokenizer", tokenizer, "--out", out, "--json")
    assert status == 0
    assert {Path(file["prefix"]).name: file["num_documents"] for file in json.loads(report)["files"]} == {
        "en_cc": 2,
        "github": 2,
    }
    assert text_of(out / "github", tokenizer) == [WORDS[1]] * 2
    assert json.loads(report)["tokens"] == sum(TokenFile(out / name).num_tokens for name in ("en_cc", "github"))
    assert json.loads(report)["tokens_per_second"] > 0


def test_malformed_lines_are_counted_and_listed(run: Command, tokenizer: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join('{"text": "river"}\n{"text"\n{"text": ""}\n' for _ in range(8)))
    command = ("tokenize", file, "--tokenizer", tokenizer, "--out", tmp_path / "t")
    status, out, err = run(*command)
    assert status == 0
    assert out.splitlines()[0].endswith("8 documents, 8 empty ones left out")
    head, *some = err.splitlines()
    assert head == f"8 documents are malformed and left out, all in {tmp_path / 't'}.malformed:"
    assert [line.split(": ")[0] for line in some] == [f"  {file}:{n}" for n in (2, 5, 8, 11, 14)]
    listed = (tmp_path / "t.malformed").read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == [f"{file}:{n}" for n in range(2, 25, 3)]
    report = json.loads(run(*command, "--overwrite", "--json")[1])["files"][0]
    assert (report["num_malformed"], report["num_empty"], len(report["malformed"])) == (8, 8, 5)
    file.write_text('{"text": "river"}\n')
    assert run(*command, "--overwrite")[2] == ""
    assert not (tmp_path / "t.malformed").exists()


def test_any_number_of_processes_writes_the_same(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_documents(tmp_path / "corpus")
    with (corpus / "a.jsonl").open("a") as file:
        file.write("not this\n")
    monkeypatch.setattr(documents, "_BYTES_PER_BLOCK", 500)
    monkeypatch.setattr(tokenization, "_BYTES_PER_PROCESS", 1)
    files = documents.document_files([corpus])
    seen: list[list[tuple[int, int]]] = []
    for processes in (1, 2):
        advances: list[tuple[int, int]] = []
        tokenizing = Tokenizing(Reading(tokenizer=tokenizer, processes=processes))
        found = tokenizing.write(files, tmp_path / f"by{processes}", lambda *done, to=advances: to.append(done))
        assert advances[-1] == (sum(file.stat().st_size for file in files), found.num_tokens)
        seen.append(advances)
    assert seen[0] == seen[1]
    for suffix in ("bin", "idx", "malformed"):
        assert (tmp_path / f"by1.{suffix}").read_bytes() == (tmp_path / f"by2.{suffix}").read_bytes()


def test_memory_does_not_grow_with_the_corpus(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_BYTES_PER_BLOCK", 1 << 15)
    tokenizing = Tokenizing(Reading(tokenizer=tokenizer))
    line = json.dumps({"text": " ".join(WORDS) * 20}) + "\n"
    peaks = []
    for count in (100, 100, 1000):  # the first for what is made once
        (tmp_path / "a.jsonl").write_text(line * count)
        tracemalloc.start()
        tokenizing.write([tmp_path / "a.jsonl"], tmp_path / "t")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Megatron's index is written at the end: a list of lengths, and arrays made of it, for 900 more documents
    assert peaks[2] < peaks[1] + 900 * 200
    assert peaks[2] < len(line) * 1000 / 2


def test_texts_cannot_end_themselves_and_begin_where_asked(run: Command, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"one {END_OF_TEXT}\ntwo\n")
    begun = tmp_path / "begun"
    shutil.copytree(tokenizer, begun)
    config = json.loads((begun / "tokenizer_config.json").read_text())
    (begun / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "a"}))
    command = ("tokenize", tmp_path / "a.txt", "--lines", "--out", tmp_path / "t", "--tokenizer")
    assert run(*command, begun, "--bos")[0] == 0
    tokens = TokenFile(tmp_path / "t")
    ids, first = tokens.read(0, tokens.num_tokens).tolist(), AutoTokenizer.from_pretrained(begun).bos_token_id
    assert (tokens.num_documents, ids.count(0), ids[0], ids[tokens.document_ends[0]]) == (2, 2, first, first)
    status, _, err = run(*command, tokenizer, "--bos", "--overwrite")
    assert (status, err) == (2, f"tokenizer {tokenizer} names no bos_token; leave --bos out, or add one to it\n")


def write_records(path: Path) -> Path:
    """Four records, of which the third and the fourth lack something."""
    records: list[Any] = [
        {"instruction": "river?", "output": "stream"},
        {"instruction": "engine?", "input": "motor", "output": "wheel"},
        {"instruction": "no answer"},
        {"instruction": "empty", "output": ""},
    ]
    path.write_text(json.dumps(records))
    return path


def test_of_conversations_only_responses_are_learnt(run: Command, tokenizer: Path, tmp_path: Path) -> None:
    file, out = write_records(tmp_path / "sft.json"), tmp_path / "sft"
    command = ("tokenize", file, "--format", "alpaca", "--tokenizer", tokenizer, "--out", out)
    status, words, err = run(*command, "--template", "vicuna")
    assert status == 0
    assert err.splitlines()[0] == f"2 documents are malformed and left out, all in {out}.malformed:"
    tokens = TokenFile(out)
    assert tokens.mask is not None
    ids, mask = tokens.read(0, tokens.num_tokens), tokens.mask.read(0, tokens.num_tokens)
    fast = AutoTokenizer.from_pretrained(tokenizer)
    end = END_OF_TEXT
    assert fast.decode(ids) == f" USER: river? ASSISTANT: stream{end} USER: engine?\nmotor ASSISTANT: wheel{end}"
    assert fast.decode(ids[mask == 1]).replace(" ", "") == f"stream{end}wheel{end}"
    assert f"{tokens.num_tokens} tokens, {mask.sum()} of them responses, 2 documents" in words
    assert tokens.mask.document_ends.tolist() == tokens.document_ends.tolist()
    # a text of the same name takes the mask away
    (tmp_path / "a.txt").write_text("river")
    assert run("tokenize", tmp_path / "a.txt", "--tokenizer", tokenizer, "--out", out, "--overwrite")[0] == 0
    assert TokenFile(out).mask is None
    assert not list(tmp_path.glob(f"{mask_prefix(out).name}*"))


def test_a_tokenizers_own_template_is_taken(run: Command, tokenizer: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(tokenizer, own)
    (own / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role[0] + ':' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    file, out = write_records(tmp_path / "sft.json"), tmp_path / "sft"
    assert run("tokenize", file, "--format", "alpaca", "--tokenizer", own, "--out", out)[0] == 0
    tokens = TokenFile(out)
    assert tokens.mask is not None
    learnt = tokens.mask.read(0, tokens.num_tokens) == 1
    text = AutoTokenizer.from_pretrained(own).decode(tokens.read(0, tokens.num_tokens)[learnt])
    assert text == f"stream{END_OF_TEXT}wheel{END_OF_TEXT}"
    assert tokens.read(0, tokens.num_tokens).tolist().count(0) == 4  # the template's special tokens are special


def test_ids_of_another_vocabulary_are_no_tokens_of_a_checkpoint(run: Command, tmp_path: Path) -> None:
    from checkpoint_tools.convert import convert

    model = tmp_path / "engine"
    convert(text_model(tmp_path), model)
    corpus = write_documents(tmp_path / "corpus")
    train_tokenizer([*WORDS[:2]] * 3, VOCABULARY - 5, tmp_path / "other")
    train_tokenizer([*WORDS, "more of these words"] * 3, VOCABULARY + 3, tmp_path / "larger")
    command = ("tokenize", corpus, "--out", tmp_path / "t", "--checkpoint", model, "--tokenizer")
    status, _, err = run(*command, tmp_path / "larger")
    assert (status, err.count("\n")) == (2, 1)
    assert err.endswith(
        f"has ids up to 302, checkpoint {model} has a vocabulary of 300; use the tokenizer that the model was "
        "made for\n"
    )
    status, _, err = run(*command, tmp_path / "other")
    assert (status, err.count("\n")) == (2, 1)
    assert f"other (295 tokens) is not that of checkpoint {model} (300): " in err
    assert err.endswith(f" tokens or ids differ; use {model}/tokenizer\n")
    assert not list(tmp_path.glob("t.*"))
    assert run(*command, tmp_path / "model")[0] == 0

    # the same of a run, and of what reads a token file for a checkpoint
    write_token_file(tmp_path / "text", [np.arange(400) % 290], VOCABULARY)
    (tmp_path / "text.json").write_text('{"tokenizer": "elsewhere", "vocabulary": "0"}')
    data = {"train": str(tmp_path / "text"), "heldout": None, "heldout_batches": 16}
    tokenizer = {**data, "tokenizer": str(tmp_path / "other")}
    with pytest.raises(UserError, match=rf"other \(295 tokens\) is not that of checkpoint {model} \(300\)"):
        resolve(small_run(tmp_path, "run", model={"checkpoint": str(model)}, data=tokenizer), 1)
    made = rf"^token file {tmp_path}/text.bin was made with another vocabulary \(elsewhere\) than that of {model}/tok"
    status, _, err = run("evaluate", model, "--tokens", tmp_path / "text")
    assert (status, err.count("\n")) == (2, 1)
    assert re.match(made, err)
    with pytest.raises(UserError, match=made), token_file(model, None, tmp_path / "text", 10, seed=0):
        pass


def test_a_tokenizer_in_the_files_of_its_kind_is_taken(run: Command, tokenizer: Path, tmp_path: Path) -> None:
    """vocab.json and merges.txt, of which transformers makes a tokenizer.json."""
    made, own = json.loads((tokenizer / "tokenizer.json").read_text())["model"], tmp_path / "own"
    own.mkdir()
    (own / "vocab.json").write_text(json.dumps(made["vocab"]))
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in made["merges"])
    (own / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs))
    (own / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}')
    corpus = write_documents(tmp_path / "corpus")
    for name, folder in (("a", tokenizer), ("b", own)):
        assert run("tokenize", corpus, "--tokenizer", folder, "--out", tmp_path / name)[0] == 0
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4), st.integers(2, 30))
def test_a_conversation_keeps_whole_turns_or_shares_of_the_first(turns: list[tuple[int, int]], most: int) -> None:
    mask = np.concatenate([np.repeat([0, 1], turn) for turn in turns]).astype(np.uint8)
    kept = np.arange(len(mask))[fitting(mask, most)]
    s, t = turns[0]
    if s + t > most:
        target = max(int(most * t / (s + t)), 1)
        assert kept.tolist() == [*range(most - target), *range(s, s + target)]
    else:
        ends = np.cumsum([sum(turn) for turn in turns])
        assert kept.tolist() == list(range(ends[ends <= most].max()))


def test_long_conversations_are_cut_where_asked(run: Command, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "river " * 40, "output": "stream " * 20}]))
    command = ("tokenize", tmp_path / "a.json", "--format", "alpaca", "--template", "vicuna", "--tokenizer", tokenizer)
    assert run(*command, "--out", tmp_path / "t", "--max-length", 24)[0] == 0
    tokens = TokenFile(tmp_path / "t")
    assert tokens.mask is not None
    assert tokens.num_tokens == 24
    learnt = tokens.mask.read(0, 24)
    assert 0 < learnt.sum() < 12
    assert learnt[-1] == 1
    status, _, err = run("tokenize", tmp_path / "a.json", "--max-length", 24, *command[-2:], "--out", tmp_path / "u")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("--max-length 24 is for conversations, texts are cut into rows; leave it out, or give --form")


def test_progress_tells_tokens_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=120)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    with progress.token_bar("text", 1000) as advance:
        time.sleep(0.05)
        advance(500, 400)
        time.sleep(0.2)  # a bar is drawn ten times a second
    speeds = re.findall(r"([\d,]+) tokens/s", shown.getvalue())
    assert speeds
    assert 500 < int(speeds[-1].replace(",", "")) <= 8000


REFUSALS: dict[str, tuple[str, str]] = {
    "no corpus": ("tokenize {out}/none", r"^corpus .*/none does not exist; give files or folders of documents\n$"),
    "an empty folder": ("tokenize {out}/empty", r"^corpus .*/empty holds 0 files that end in \.jsonl, "),
    "nothing but empty lines": (
        "tokenize {out}/blank.jsonl",
        r"^corpus .*/blank\.jsonl gives 0 documents: 1 are empty and 0 malformed; correct them, or give others\n$",
    ),
    "nothing that can be read": (
        "tokenize {out}/bad.jsonl",
        r"gives 0 documents: 0 are empty and 2 malformed \(the first is .*/bad\.jsonl:1: no JSON .*\); correct them",
    ),
    "a template that drops responses": (
        "tokenize {out}/sft.json --format alpaca --template {out}/drops.jinja",
        r"gives 0 documents: .* 4 malformed \(the first is .*/sft\.json:1: the template drops the response\); correct",
    ),
    "no template": (
        "tokenize {out}/sft.json --format alpaca",
        r"^tokenizer .* has no chat template; name one with --template: default, vicuna, deepseek or a \.jinja file\n$",
    ),
    "a template for texts": ("tokenize {out}/a.txt --template vicuna", r"^--template vicuna has no effect on texts"),
    "an unknown format": ("tokenize {out}/a.txt --format csv", r"'--format'.*csv"),
    "domains of files": ("tokenize {out}/a.txt --domains", r"^--domains wants one folder of folders, got .*/a\.txt"),
    "an output that is there": ("tokenize {out}/a.txt --out {out}/old", r"^output .*/old\.bin exists; choose another"),
    "no tokenizer": (
        "tokenize {out}/a.txt --tokenizer {out}/empty",
        r"^tokenizer folder .*/empty holds none of tokenizer\.json, ",
    ),
    "no checkpoint": ("tokenize {out}/a.txt --checkpoint {out}/empty", r"/empty holds no engine checkpoint"),
    "too few tokens": ("tokenizer {out}/a.txt --vocab-size 9", r"^vocab_size \(9\) must be at least 257"),
    "a tokenizer of nothing": ("tokenizer {out}/blank.txt --vocab-size 300", r"^corpus .*/blank\.txt holds 0 texts"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_tokenised_is_one_sentence(name: str, run: Command, tokenizer: Path, tmp_path: Path) -> None:
    line, sentence = REFUSALS[name]
    (tmp_path / "empty").mkdir()
    for file, text in (
        ("a.txt", "river"),
        ("blank.jsonl", '\n{"text": ""}\n'),
        ("blank.txt", ""),
        ("bad.jsonl", "{\n3\n"),
        ("drops.jinja", "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"),
        ("old.bin", "kept"),
    ):
        (tmp_path / file).write_text(text)
    write_records(tmp_path / "sft.json")
    before = contents(tmp_path)
    command, *arguments = line.format(out=tmp_path).split()
    defaults = {"--out": tmp_path / "new"} | ({"--tokenizer": tokenizer} if command == "tokenize" else {})
    given = [x for key, value in defaults.items() if key not in arguments for x in (key, value)]
    status, out, err = run(command, *arguments, *given)
    assert (status, out, err.count("\n")) == (2, "", 1)
    with pytest.raises(ValueError, match=sentence):
        raise ValueError(err)
    assert contents(tmp_path) == before


def test_ids_fit_the_file_and_come_back(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("river stream")
    found = Tokenizing(Reading(tokenizer=tokenizer)).write([tmp_path / "a.txt"], tmp_path / "t")
    tokens = TokenFile(tmp_path / "t", vocab_size=VOCABULARY)
    assert found.num_tokens == tokens.num_tokens
    assert (tmp_path / "t.bin").stat().st_size == 2 * tokens.num_tokens
    assert np.array_equal(tokens.documents(0, tokens.num_tokens), np.zeros(tokens.num_tokens))
