"""Training on several domains and on whole documents: what is read, how weights follow, and where a run goes on."""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from checkpoint_tools.convert import convert
from ep_engine.checkpoint import newest, read_manifest
from ep_engine.config import RunConfig, load_config, to_toml
from ep_engine.data.batches import IGNORED, PADDING, rows_of
from ep_engine.data.blend import updated_weights
from ep_engine.data.tokens import TokenFile, write_masked_token_file, write_token_file
from ep_engine.resolve import resolve
from tests.distributed import run_ranks
from tests.run_cases import VOCAB, losses, moe_model, small_run, train_here
from tests.run_files import contents
from tests.small_models import dense_folder

Command = Callable[..., tuple[int, str, str]]
REFERENCES = {"near": 3.0, "far": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files of two domains, one easy to learn and one of noise, each with held-out text; a MoE model; chats."""
    folder = tmp_path_factory.mktemp("domains")
    draw = np.random.default_rng(0)
    for name, num_near, num_far in (("train", 2000, 500), ("heldout", 600, 600)):
        write_token_file(folder / f"near-{name}", [np.cumsum(draw.integers(-1, 3, num_near)) % VOCAB], VOCAB)
        write_token_file(folder / f"far-{name}", [draw.integers(0, VOCAB, num_far)], VOCAB)
    moe_model(folder)
    for name, longest in (("chats", 24), ("pleas", 12)):
        chats = []
        for _ in range(60):
            ids = np.cumsum(draw.integers(-1, 3, draw.integers(2, longest))) % VOCAB
            chats.append((ids, (np.arange(len(ids)) >= len(ids) // 2).astype(np.uint8)))
        write_masked_token_file(folder / name, chats, VOCAB)
    return folder


def files_of(folder: Path, kind: str) -> dict[str, str]:
    return {name: str(folder / f"{name}-{kind}") for name in REFERENCES}


def two_domains(folder: Path, name: str, *, data: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    given = {"train": files_of(folder, "train"), "heldout": files_of(folder, "heldout"), "heldout_batches": 2}
    weights = {"weights": {"near": 0.7, "far": 0.3}}
    return small_run(folder, name, data=given | weights | (data or {}), **sections)


def dynamic(folder: Path, name: str, **sections: Any) -> RunConfig:
    data = {"dynamic_weights": "sheared_llama", "reference_losses": REFERENCES, "heldout_every": 2}
    return two_domains(folder, name, data=data, **sections)


def lines(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.output.folder / "metrics.jsonl").read_text().splitlines()]


def place_in_data(config: RunConfig) -> dict[str, Any]:
    checkpoint = newest(config.output.folder)
    assert checkpoint is not None
    place: dict[str, Any] = read_manifest(checkpoint)["training"]["data"]
    return place


def _train(rank: int, world_size: int, config: RunConfig) -> None:
    train_here(config, rank, world_size)


def test_weights_follow_the_held_out_losses(folder: Path) -> None:
    config = dynamic(folder, "dynamic", train={"steps": 6, "log_every": 1})
    train_here(config)
    weights = np.array([0.7, 0.3])
    for line in lines(config):
        if line["step"] % 2 == 0:
            found = line["heldout"]
            assert found["step"] == line["step"]
            measured, reference = (np.array([of[name] for name in REFERENCES]) for of in (found["loss"], REFERENCES))
            weights = updated_weights("sheared_llama", weights, measured, reference)
        assert [line["domains"][name]["weight"] for name in REFERENCES] == weights.tolist()
        assert sum(domain["rows"] for domain in line["domains"].values()) == 8 * line["step"]
    assert weights[1] > 0.9  # its loss is that of noise, and it should come down to 1
    summary = json.loads((config.output.folder / "summary.json").read_text())
    assert summary["heldout_losses"] == lines(config)[-1]["heldout"]["loss"]
    assert summary["heldout_losses"]["far"] > summary["heldout_losses"]["near"]


@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_losses_of_domains_are_sums_over_all_ranks(layout: str, folder: Path) -> None:
    parts = {"steps": 4, "micro_batches": 2, "log_every": 1}
    sections = {"model": {"checkpoint": str(folder / "moe")}, "train": parts}
    pipeline = (
        {"parallel": {"pipeline_parallel_size": 2}} if layout == "pp2" else {"parallel": {"expert_parallel_size": 2}}
    )
    one, many = dynamic(folder, f"one-{layout}", **sections), dynamic(folder, layout, **sections, **pipeline)
    train_here(one)
    run_ranks(_train, many, world_size=2)
    assert losses(many) == pytest.approx(losses(one), rel=1e-5)
    for ours, theirs in zip(lines(many), lines(one), strict=True):
        if "heldout" in theirs:
            assert ours["heldout"]["loss"] == pytest.approx(theirs["heldout"]["loss"], rel=1e-5)
        for name, domain in theirs["domains"].items():  # the losses differ in their last bits, and so do weights
            assert ours["domains"][name] == pytest.approx(domain, rel=1e-5)


def test_evaluations_midway_change_nothing(folder: Path) -> None:
    configs = [
        two_domains(
            folder, f"midway-{every}", data={"heldout_every": every}, model={"checkpoint": str(folder / "moe")},
            parallel={"expert_parallel_size": 2}, train={"steps": 4, "save_every": 2},
        )
        for every in (1, 100)
    ]  # fmt: skip
    for config in configs:
        run_ranks(_train, config, world_size=2)
    one, other = map(lines, configs)
    for key in ("losses", "bytes_per_token", "load_max_over_mean"):
        assert [line[key] for line in one] == [line[key] for line in other]
    manifests = [read_manifest(config.output.folder / "checkpoints/step_000002") for config in configs]
    assert manifests[0]["checksums"] == manifests[1]["checksums"]


@pytest.mark.parametrize("kind", ["static", "dynamic", "documents"])
def test_the_place_in_the_data_survives_another_number_of_ranks(kind: str, folder: Path) -> None:
    def config(name: str, steps: int, **sections: Any) -> RunConfig:
        train = {"steps": 6, "micro_batches": sections.pop("micro_batches", 1)}
        if kind == "documents":
            data = {"train": str(folder / "chats"), "heldout": str(folder / "chats"), "packing": "documents"}
            made = small_run(folder, name, data=data, train=train, **sections)
        else:
            made = (dynamic if kind == "dynamic" else two_domains)(folder, name, train=train, **sections)
        return made

    whole, parts = config(f"whole-{kind}", 6), config(f"parts-{kind}", 6)
    train_here(whole)
    # stop after 4 steps by a checkpoint in the middle: the newest then is deleted
    halfway = parts.model_copy(update={"train": parts.train.model_copy(update={"save_every": 4})})
    train_here(halfway)
    shutil.rmtree(parts.output.folder / "checkpoints" / "step_000006")
    assert place_in_data(parts)["domains"] != place_in_data(whole)["domains"]
    run_ranks(_train, config(f"parts-{kind}", 6, output={"resume": True}, micro_batches=2), world_size=2)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    ours, theirs = place_in_data(parts)["domains"], place_in_data(whole)["domains"]
    for name in theirs:
        assert ours[name]["rows"] == theirs[name]["rows"]
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_a_run_whose_weights_move_goes_on_with_the_same_bits(folder: Path) -> None:
    whole, parts = dynamic(folder, "bits-whole"), dynamic(folder, "bits", train={"steps": 6, "save_every": 4})
    train_here(whole)
    train_here(parts)
    shutil.rmtree(parts.output.folder / "checkpoints" / "step_000006")
    train_here(dynamic(folder, "bits", output={"resume": True}))
    assert losses(parts) == losses(whole)
    assert place_in_data(parts) == place_in_data(whole)


def test_a_resumed_run_with_a_larger_batch_reads_on(folder: Path) -> None:
    first = two_domains(folder, "batch", train={"steps": 3})
    train_here(first)
    train_here(two_domains(folder, "batch", data={"batch_size": 16}, train={"steps": 4}, output={"resume": True}))
    assert sum(domain["rows"] for domain in place_in_data(first)["domains"].values()) == 3 * 8 + 16


def test_a_domain_that_runs_dry_stops_the_run_or_comes_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    even = {"weights": "uniform"}  # far has 31 rows, of which a step reads 4
    stops = two_domains(folder, "stops", data=even | {"when_exhausted": "stop"}, train={"steps": 20})
    summary = train_here(stops)
    assert summary["steps"] == 7
    assert summary["heldout_loss"] > 0
    assert newest(stops.output.folder) == stops.output.folder / "checkpoints" / "step_000007"
    assert "domain far has run dry after step 7 of 20; the run ends" in caplog.messages
    wraps = two_domains(folder, "wraps", data=even, train={"steps": 20})
    assert train_here(wraps)["steps"] == 20
    assert "step 8: all rows of domain far were read; they come again in another order" in caplog.messages
    assert losses(wraps)[:7] == losses(stops)


def test_losses_of_domains_weighed_by_their_tokens_are_the_loss(folder: Path) -> None:
    config = two_domains(folder, "weighed", train={"steps": 5, "log_every": 2})
    train_here(config)
    rows = {"near": 0.0, "far": 0.0}
    for line in lines(config):
        read = {name: domain["rows"] - rows[name] for name, domain in line["domains"].items()}
        rows = {name: domain["rows"] for name, domain in line["domains"].items()}
        total = sum(read[name] * domain["loss"] for name, domain in line["domains"].items())
        assert total / sum(read.values()) == pytest.approx(line["loss"], rel=1e-6)
    assert line["domains"]["near"]["loss"] < line["domains"]["far"]["loss"]


def test_a_domain_that_was_not_read_has_no_loss(folder: Path) -> None:
    config = two_domains(folder, "unread", data={"weights": {"near": 1.0, "far": 0.0}}, train={"steps": 1})
    train_here(config)
    (line,) = lines(config)
    assert line["domains"]["far"]["loss"] is None
    assert line["domains"]["near"]["loss"] == pytest.approx(line["loss"], rel=1e-6)


def two_chats(folder: Path) -> dict[str, Any]:
    files = {name: str(folder / name) for name in ("chats", "pleas")}
    return {"train": files, "weights": {"chats": 0.6, "pleas": 0.4}}


def chats(folder: Path, name: str, *, packing: str = "documents", **sections: Any) -> RunConfig:
    data = two_chats(folder) | {"heldout": None, "heldout_batches": 16, "packing": packing}
    return small_run(folder, name, data=data, **sections)


@pytest.mark.parametrize("packing", ["documents", "padded"])
def test_only_responses_are_learnt_each_in_its_document(packing: str, folder: Path, tmp_path: Path) -> None:
    dense = dense_folder(tmp_path / "hf")
    convert(dense, tmp_path / "engine")
    sections = {
        "model": {"checkpoint": str(tmp_path / "engine")},
        "train": {"steps": 1, "learning_rate": 1e-9, "min_learning_rate": 0.0},
    }
    held_out = {"heldout": str(folder / "chats"), "packing": packing, "heldout_batches": 1}
    config = small_run(folder, f"oracle-{packing}", data=two_chats(folder) | held_out, **sections)
    summary = train_here(config)
    model = LlamaForCausalLM.from_pretrained(dense)
    rows = rows_of(TokenFile(folder / "chats"), 16, packing)  # type: ignore[arg-type]
    loss, count = loss_of_rows(model, [rows.read(row) for row in range(8)])
    assert summary["heldout_tokens"] == count
    assert summary["heldout_loss"] == pytest.approx(loss, rel=1e-5)
    blend = resolve(config, 1, overwrite=True).blend()
    (line,), read = lines(config), blend.ahead(8)
    for domain, name in enumerate(blend.names):
        loss, _ = loss_of_rows(model, list(zip(*blend.read([row for row in read if row[0] == domain]), strict=True)))
        assert line["domains"][name]["loss"] == pytest.approx(loss, rel=1e-5)


def loss_of_rows(model: LlamaForCausalLM, rows: Sequence[tuple[Any, Any, Any]]) -> tuple[float, int]:
    """Mean over the targets, and their number: document by document, nothing before it in its row."""
    total, count = 0.0, 0
    with torch.no_grad():
        for inputs, targets, documents in (map(torch.as_tensor, row) for row in rows):
            for document in set(documents.tolist()) - {PADDING}:
                at = documents == document
                logits = model(inputs[at].unsqueeze(0)).logits[0]
                of_each = torch.nn.functional.cross_entropy(logits, targets[at], ignore_index=IGNORED, reduction="sum")
                total, count = total + float(of_each), count + int((targets[at] != IGNORED).sum())
    return total / count, count


LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "dp2 in parts": {"train": {"micro_batches": 2}},
    "tp2": {"parallel": {"tensor_parallel_size": 2}},
    "pp2": {"parallel": {"pipeline_parallel_size": 2}, "train": {"micro_batches": 2}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_losses_do_not_depend_on_the_layout(layout: str, folder: Path) -> None:
    name = layout.replace(" ", "-")
    sections = {"train": {"steps": 4, **LAYOUTS[layout].get("train", {})}}
    one = chats(folder, f"chats-one-{name}", **sections)
    many = chats(folder, f"chats-{name}", **sections, parallel=LAYOUTS[layout].get("parallel", {}))
    train_here(one)
    run_ranks(_train, many, world_size=2)
    assert losses(many) == pytest.approx(losses(one), rel=1e-5)
    for ours, theirs in zip(lines(many), lines(one), strict=True):
        for domain in ("chats", "pleas"):
            assert ours["domains"][domain]["loss"] == pytest.approx(theirs["domains"][domain]["loss"], rel=1e-5)


def test_documents_that_are_cut_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    train_here(chats(folder, "cut", train={"steps": 1}))
    tokens = TokenFile(folder / "chats")
    longer = int((np.diff(tokens.document_ends, prepend=0) > 16).sum())
    words = f"{longer} documents of domain chats are longer than 16 tokens and cut there; `ep-engine tokenize --max-l"
    assert any(message.startswith(words) for message in caplog.messages)


REFUSALS: dict[str, tuple[str, str]] = {
    "no weights": (
        "-data.weights",
        r"^data\.train has 2 domains and data\.weights is missing; give a weight for each, or",
    ),
    "a sum that is not 1": (
        "data.weights={near=0.5,far=0.6}",
        r"^data\.weights sum to 1\.1 and must sum to 1; divide each by 1\.1\n$",
    ),
    "a negative weight": (
        "data.weights={near=1.5,far=-0.5}",
        r"^data\.weights of far is -0\.5, and no domain is read less",
    ),
    "weights of other domains": (
        "data.weights=llama",
        r"^data\.weights are of en_arxiv, .*, data\.train of far, near; name",
    ),
    "an unknown name": ("data.weights=lama", r"data\.weights.*lama"),
    "weights of one file": (
        "data.train={folder}/chats",
        r"data\.weights has no effect on one token file; make data\.train a",
    ),
    "no domain": ("data.train={{}}", r"data\.train has 0 domains; name a token file for each"),
    "a rule without losses": (
        "data.dynamic_weights=sheared_llama",
        r"data\.dynamic_weights and data\.reference_losses go together; give both, or neither",
    ),
    "a rule without an interval": (
        "data.dynamic_weights=sheared_llama data.reference_losses={near=1,far=1}",
        r"data\.dynamic_weights needs data\.heldout_every, the steps between updates; set it",
    ),
    "a rule without held-out domains": (
        "data.dynamic_weights=sheared_llama data.reference_losses={near=1,far=1} data.heldout_every=2 "
        "data.heldout={folder}/near-heldout",
        r"data\.dynamic_weights needs a data\.heldout of every domain \(near, far\), got one for all; name them",
    ),
    "losses of other domains": (
        "data.dynamic_weights=sheared_llama data.reference_losses={near=1} data.heldout_every=2",
        r"^data\.reference_losses are of near, data\.train of far, near; name the same\n$",
    ),
    "a domain that is not there": (
        "data.train={near='{folder}/none',far='{folder}/none'}",
        r"none\.bin does not exist",
    ),
    "documents kept apart twice": (
        "data.packing=documents data.separate_documents=true",
        r"data\.separate_documents has no effect with data\.packing documents, which keeps them apart; leave it out",
    ),
    "an interval of nothing": (
        "-data.heldout -data.heldout_batches data.heldout_every=2",
        r"data\.heldout_every has no effect without data\.heldout; set that too, or leave it out",
    ),
    "nothing to learn": (
        "-data.weights data.train={folder}/nothing",
        r"^loss mask .*/nothing_loss_mask\.bin leaves none of 2000 tokens to learn; tokenise again with a template",
    ),
    "ids out of range": (
        "-data.weights data.train={folder}/large",
        r"large\.bin holds id 69 at position 2000, outside \[0, 64\)",
    ),
    "another vocabulary": (
        "-data.weights data.train={folder}/foreign data.tokenizer={folder}/tokenizer",
        r"^token file .*/foreign\.bin was made with another vocabulary \(elsewhere\) than that of .*/tokenizer; ",
    ),
    "a tokenizer that is too large": (
        "data.tokenizer={folder}/larger",
        r"^tokenizer .*/larger has ids up to 256, the model has a vocabulary of 64; use the tokenizer that",
    ),
    "a run folder with a domain": (
        "output.folder={folder} --overwrite",
        r"would replace data\.train .*/near-train; choose another folder",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_data_that_cannot_be_is_one_sentence(name: str, run: Command, folder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    ids = np.arange(2000) % VOCAB
    if not (folder / "nothing.bin").exists():
        write_masked_token_file(folder / "nothing", [(ids, np.zeros(2000, np.uint8))], VOCAB)
        write_token_file(folder / "large", [np.r_[ids, 69]], 70)  # the last of them
        write_token_file(folder / "foreign", [ids], VOCAB)
        (folder / "foreign.json").write_text('{"tokenizer": "elsewhere", "vocabulary": "0"}')
        for words, size in (("tokenizer", VOCAB), ("larger", 257)):
            (folder / words).mkdir()
            word_level = Tokenizer(models.WordLevel({str(i): i for i in range(size)}, unk_token="0"))
            word_level.save(str(folder / words / "tokenizer.json"))
    given, sentence = REFUSALS[name]
    config = two_domains(folder, "", output={"folder": str(tmp_path / "run")})
    overrides = given.replace("{folder}", str(folder)).replace("{{}}", "{}").split()
    dropped = [word.removeprefix("-data.") for word in overrides if word.startswith("-data.")]
    text = "\n".join(line for line in to_toml(config).splitlines() if line.split(" = ")[0] not in dropped)
    (tmp_path / "run.toml").write_text(text)
    before = contents(folder, tmp_path)
    status, out, err = run(
        "train", tmp_path / "run.toml", *(word for word in overrides if not word.startswith("-data."))
    )
    assert (status, out, err.count("\n")) == (2, "", 1)
    with pytest.raises(ValueError, match=sentence):
        raise ValueError(err)
    assert contents(folder, tmp_path) == before


def test_a_run_file_with_domains_is_read_back(folder: Path, tmp_path: Path) -> None:
    config = dynamic(folder, "round")
    (tmp_path / "run.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "run.toml") == config


def test_resuming_with_other_data_is_refused_before_anything_is_touched(
    folder: Path, run: Command, tmp_path: Path
) -> None:
    config = two_domains(folder, "other-data", train={"steps": 2})
    train_here(config)
    again = two_domains(folder, "other-data", data={"sequence_length": 8}, train={"steps": 4}, output={"resume": True})
    (tmp_path / "run.toml").write_text(to_toml(again))
    before = contents(config.output.folder)
    status, _, err = run("train", tmp_path / "run.toml")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("data.sequence_length is 8, the checkpoint was made with 16, which orders the data; keep it")
    assert contents(config.output.folder) == before
