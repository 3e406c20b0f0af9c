"""`ep-engine train`, `profile` and `place`: what they print and write, how they end, and what they leave alone."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ep_engine import checkpoint, reference
from ep_engine.c2r.collaboration import read_profile
from ep_engine.c2r.collaboration_report import describe_collaboration
from ep_engine.c2r.place import place
from ep_engine.data.batches import Batches
from ep_engine.data.tokens import TokenFile, write_token_file
from ep_engine.load_balance import RouterStatistics
from ep_engine.model import Decoder
from ep_engine.model_config import read_model_config
from ep_engine.parallelize import entries_of
from ep_engine.placement import read_placement
from tests.counts import COUNTS, LOAD, random_profile
from tests.run_files import contents, make_files, write_run

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


def profile_arguments(files: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("profile", files / "moe", "--tokens", files / "train", "--out", out, *more)


SMALL = ("--max-tokens", 200, "--sequence-length", 16)  # 12 windows, 192 tokens


def test_profile_counts_what_the_model_chose(run: Command, files: Path, tmp_path: Path) -> None:
    status, out, err = run(*profile_arguments(files, tmp_path / "p.npz", *SMALL, "--seed", 3))
    assert (status, err) == (0, "")
    words = rf"wrote {tmp_path / 'p.npz'}: 2 layers, 192 tokens, collaboration \d\.\d+, load max/mean \d\.\d+"
    assert re.fullmatch(words + r", its halves agree to -?\d\.\d+ \(profile more .*\)\n", out)
    found = read_profile(tmp_path / "p.npz")
    batches = Batches(TokenFile(files / "train"), sequence_length=16, batch_size=1, seed=3)
    model = Decoder(read_model_config(files / "moe/model.json")).eval()
    checkpoint.load(files / "moe", entries_of([model]))
    routers: dict[int, RouterStatistics] = {}
    model.watch = lambda x, seen: (routers.update(seen), x)[1]
    with torch.no_grad():
        model(torch.cat([batches.batch(window)[0] for window in range(12)]))
    assert sorted(routers) == [0, 1]
    for layer, router in routers.items():
        expected = reference.count_pairs(router.ids_TK, 8).numpy()
        assert np.array_equal(found.load[layer], expected.diagonal())
        assert np.array_equal(found.counts[layer], expected - np.diag(expected.diagonal()))
    with np.load(tmp_path / "p.npz") as stored:
        assert (np.diagonal(stored["counts"], axis1=1, axis2=2) == 0).all()
    assert found.top_k == 2
    assert found.counts.sum(axis=(1, 2)).tolist() == found.load.sum(axis=1).tolist() == [2 * 192] * 2


def test_profile_says_on_what_it_was_made(run: Command, files: Path, tmp_path: Path) -> None:
    status, out, _ = run(*profile_arguments(files, tmp_path / "p.npz", *SMALL, "--json"))
    report = json.loads(out)
    about = read_profile(tmp_path / "p.npz").about
    assert status == 0
    collaboration, halves = report.pop("collaboration"), report.pop("halves")
    assert report == {"written": str(tmp_path / "p.npz"), "layers": 2, "experts": 8, **about}
    assert collaboration == describe_collaboration(read_profile(tmp_path / "p.npz"))
    assert [tokens for tokens, _ in halves] == [96]
    assert (about["tokens"], about["seed"]) == (192, 0)
    assert len(about["model_hash"]) == len(about["corpus_hash"]) == 64


def test_text_is_profiled_with_the_tokenizer_of_the_model(run: Command, files: Path, tmp_path: Path) -> None:
    model, folder = tmp_path / "moe", tmp_path / "texts"
    shutil.copytree(files / "moe", model)
    words = {word: i for i, word in enumerate(["<|endoftext|>", "?", *"abcdefghilnprtuxe(): +1023456789\n"])}
    characters = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<|endoftext|>").save_pretrained(model / "tokenizer")
    folder.mkdir()
    (folder / "a.py").write_text("def f(x):\n    return x + 1\n" * 40)
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": f"line {i} " * 9}) + "\n" for i in range(40)))
    (folder / "c.bin").write_bytes(b"\xff\xfe")
    command = ("profile", model, "--corpus", folder, *SMALL, "--json", "--out")
    more = ("--trace", tmp_path / "t.npz", "--scores", "--picture", tmp_path / "p.png")
    status, out, err = run(*command, tmp_path / "p.npz", *more)
    assert (status, err, json.loads(out)["tokens"]) == (0, "", 192)
    with np.load(tmp_path / "t.npz") as trace:
        ids_LTK, scores_LTE = trace["ids"], trace["scores"]
    assert ids_LTK.shape == (2, 192, 2)
    assert np.array_equal(scores_LTE.argmax(axis=2), ids_LTK[:, :, 0])
    assert run(*command, tmp_path / "q.npz", "--scores")[2].startswith("--scores has no effect without --trace")
    found = read_profile(tmp_path / "p.npz")
    assert np.array_equal(found.load[1], np.bincount(ids_LTK[1].ravel(), minlength=8))
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    run(*command, tmp_path / "again.npz")
    assert np.array_equal(read_profile(tmp_path / "again.npz").counts, found.counts)


def test_published_counts_become_a_profile(run: Command, tmp_path: Path) -> None:
    (tmp_path / "topt_5_collaboration.pkl").write_bytes(pickle.dumps(np.stack([COUNTS, COUNTS]), 4))
    command = ("profile", tmp_path / "topt_5_collaboration.pkl", "--out", tmp_path / "p.npz")
    status, out, err = run(*command, "--top-k", 2)
    assert (status, err) == (0, "")
    assert out.startswith(f"wrote {tmp_path / 'p.npz'}: 2 layers, 15 tokens, collaboration ")
    assert np.array_equal(read_profile(tmp_path / "p.npz").load[0], LOAD)
    status, _, err = run(*command, "--overwrite")
    assert (status, err.count("\n")) == (2, 1)
    assert "--top-k (None) must be the model's number of experts per token" in err
    status, _, err = run(*command, "--overwrite", "--top-k", 2, "--trace", tmp_path / "t.npz")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("--trace has no effect on published counts (")


def test_the_same_seed_gives_the_same_profile(run: Command, files: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(*profile_arguments(files, tmp_path / f"{name}.npz", *SMALL, "--seed", seed))[0] == 0
    a, b, c = (read_profile(tmp_path / f"{name}.npz") for name in "abc")
    assert np.array_equal(a.counts, b.counts)
    assert a.about == b.about
    assert not np.array_equal(a.counts, c.counts)


def test_profile_counts_every_window_once(run: Command, files: Path, tmp_path: Path) -> None:
    # 16 * 249 tokens are whole windows of the text; more would be counted twice
    most = profile_arguments(files, tmp_path / "p.npz", "--sequence-length", 16, "--max-tokens")
    assert run(*most, 16 * 249)[0] == 0
    status, _, err = run(*most, 16 * 250, "--overwrite")
    assert status == 2
    assert "249" in err
    assert "250" in err


def test_place_finds_what_the_search_finds(run: Command, files: Path, tmp_path: Path) -> None:
    status, out, err = run("place", files / "profile.npz", "--devices", 4, "--nodes", 2, "--out", tmp_path / "p.json")
    placement, found = place(read_profile(files / "profile.npz"), 4, nodes=2)
    assert (status, err) == (0, "")
    assert read_placement(tmp_path / "p.json") == placement
    assert json.loads((tmp_path / "p.json").read_text())["measured"] == json.loads(json.dumps(found))
    (row,) = [line for line in out.splitlines() if "intra device fraction" in line]
    four = [f"{found[of]['intra_device_fraction']:.4f}" for of in ("placed", "contiguous", "uniform", "bound")]
    assert [cell.strip() for cell in row.split("│")[2:6]] == four
    assert "proven best in 2 of 2 layers, mean gap to the bound 0.0000" in out
    same = ("--devices", 4, "--nodes", 2, "--check", files / "profile.npz")
    status, out, _ = run("place", files / "profile.npz", *same, "--out", tmp_path / "q.json")
    _, there = [line for line in out.splitlines() if "intra device fraction" in line]
    assert [cell.strip() for cell in there.split("│")[2:4]] == four[:2]


def test_place_reports_json_alone(run: Command, files: Path, tmp_path: Path) -> None:
    arguments = ("place", files / "profile.npz", "--devices", 2, "--out", tmp_path / "p.json")
    status, out, err = run(*arguments, "--json")
    report = json.loads(out)
    assert (status, err, report["written"], report["exact"]) == (0, "", str(tmp_path / "p.json"), True)
    inside = {of: [layer[of]["intra_device_fraction"] for layer in report["layers"]] for of in ("placed", "contiguous")}
    assert np.mean(inside["contiguous"]) <= np.mean(inside["placed"]) == report["placed"]["intra_device_fraction"]


def test_a_placement_of_many_is_said_not_to_be_proven(run: Command, tmp_path: Path) -> None:
    random_profile(1, 40, seed=0).save(tmp_path / "p.npz")
    arguments = ("place", tmp_path / "p.npz", "--devices", 4, "--overwrite", "--seed", 5, "--out")
    outputs = [run(*arguments, tmp_path / name)[1] for name in ("a.json", "b.json")]
    assert all("proven best in 0 of 1 layers, mean gap to the bound 0.0" in out for out in outputs)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_what_is_special_about_a_placement_is_said(run: Command, tmp_path: Path) -> None:
    busy = random_profile(2, 40, seed=0)
    busy.load[1, 7] = busy.load.sum()
    busy.save(tmp_path / "p.npz")
    command = ("place", tmp_path / "p.npz", "--devices", 4, "--out", tmp_path / "p.json")
    status, _, err = run(*command, "--strict")
    assert (status, err.count("\n")) == (2, 1)
    assert "--load-cap (1.1) cannot be held in layer 1, the smallest found is 2.95" in err
    assert not (tmp_path / "p.json").exists()
    status, out, _ = run(*command, "--time-limit", 0, "--replicas", 3)
    words = " ".join(out.split())
    assert status == 0
    assert "a cap of 1.1 cannot be held in 1 layers, which have the smallest that was found instead (1: 2.95" in words
    assert "the time limit cut the search of layers [0, 1] short" in words
    assert "load max over mean with the replicas: " in words


def test_devices_of_tokens_are_made_few(run: Command, files: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.npz"
    assert run(*profile_arguments(files, tmp_path / "p.npz", *SMALL, "--trace", trace))[0] == 0
    command = ("place", tmp_path / "p.npz", "--devices", 4, "--objective", "distinct-devices", "--load-cap", "none")
    outputs = "--json", "--out"
    report = json.loads(run(*command, "--trace", trace, *outputs, tmp_path / "a.json")[1])
    pairs = json.loads(run(*command[:4], "--load-cap", "none", "--trace", trace, *outputs, tmp_path / "b.json")[1])
    assert report["placed"]["distinct_devices"] <= pairs["placed"]["distinct_devices"]
    assert report["placed"]["intra_device_fraction"] <= pairs["placed"]["intra_device_fraction"]
    assert pairs["objective"] == "pairs"
    status, _, err = run(*command, "--out", tmp_path / "c.json")
    assert (status, err.count("\n")) == (2, 1)
    assert "give --trace" in err


def test_one_command_after_the_other(run: Command, files: Path, tmp_path: Path) -> None:
    profile, placement = tmp_path / "p.npz", tmp_path / "p.json"
    assert run(*profile_arguments(files, profile, *SMALL))[0] == 0
    assert run("place", profile, "--devices", 2, "--out", placement)[0] == 0
    rule = ("routing.rule=c2r", "routing.top_t=3", f"routing.profile={profile}", f"moe.placement={placement}")
    status, out, err = run("train", write_run(files, tmp_path), *rule, "train.steps=2", "train.log_every=1", "--json")
    summary = json.loads(out)
    assert status == 0
    layout, *steps = err.splitlines()
    assert layout == "1 ranks on cpu (parallel.device = cpu)"
    assert [line.split()[:2] for line in steps] == [["step", "1"], ["step", "2"]]
    assert (summary["steps"], summary["ranks"]) == (2, 1)
    assert 0 < summary["changed_share"] < 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary


def test_ranks_that_are_started_again_go_on_in_the_folder_of_their_job(
    run: Command, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("train", write_run(files, tmp_path), "train.steps=2", "train.log_every=1")
    folder = tmp_path / "run"
    again = "the ranks of this job were started again; "

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    status, _, err = run(*command)
    assert status == 0
    assert again not in err
    (folder / "summary.json").unlink()  # as if a rank had died in the evaluation
    status, _, err = run(*command)
    assert status == 0
    assert err.startswith(f"{again}going on from {folder}/checkpoints/step_000002\n")
    assert json.loads((folder / "summary.json").read_text())["heldout_loss"] > 0
    shutil.rmtree(folder / "checkpoints")
    status, _, err = run(*command)
    assert status == 0
    assert err.startswith(f"{again}there is no checkpoint yet, beginning again\n")

    before = contents(folder)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    status, _, err = run(*command)
    assert status == 2
    assert "is not empty" in err
    assert contents(folder) == before


def test_check_for_many_nodes_knows_their_ranks(run: Command, files: Path, tmp_path: Path) -> None:
    over_nodes = ("train", write_run(files, tmp_path), "parallel.expert_parallel_size=4", "--check-for", 4)
    assert run(*over_nodes, "moe.transport=hierarchical", "--ranks-per-node", 2) == (0, "", "")
    status, _, err = run(*over_nodes, "moe.transport=shared_memory", "--ranks-per-node", 2)
    assert status == 2
    assert "do not lie on one node of 2 ranks" in err


def test_check_for_touches_nothing_and_says_nothing(run: Command, files: Path, tmp_path: Path) -> None:
    run_file = write_run(files, tmp_path)
    before = contents(files, tmp_path)
    assert run("train", run_file, "parallel.expert_parallel_size=2", "--check-for", 4) == (0, "", "")
    status, out, err = run("train", run_file, "parallel.expert_parallel_size=2", "--check-for", 3)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "parallel.expert_parallel_size (2) must divide the 3 ranks" in err
    assert contents(files, tmp_path) == before


# arguments, in which {files} and {out} stand for the two folders, and the sentence
REFUSALS: dict[str, tuple[str, str]] = {
    "no run file": ("train {out}/none.toml", r"^run file .*none\.toml cannot be read \(No such file or directory\)"),
    "unknown key": ("train {out}/run.toml train.stepz=3", r"^unknown key train\.stepz; did you mean train\.steps\?\n$"),
    "no ranks": ("train {out}/run.toml --check-for 0", "'--check-for': .* greater than or equal to 1; see --help\n$"),
    "profile of a dense model": (
        "profile {files}/dense-engine --tokens {files}/train --out {out}/x.npz",
        r"^.*/dense-engine is a dense model, profile counts experts; split it first\n$",
    ),
    "profile of no model": (
        "profile {files}/none --tokens {files}/train --out {out}/x.npz",
        r"^.*/none holds no engine checkpoint \(no model\.json\); make one with",
    ),
    "profile on no text": (
        "profile {files}/moe --tokens {files}/none --out {out}/x.npz",
        r"^token file .*/none\.bin does not exist",
    ),
    "profile of less than a window": (
        "profile {files}/moe --tokens {files}/train --out {out}/x.npz --max-tokens 15 --sequence-length 16",
        r"^--max-tokens \(15\) must be at least one window of 16 tokens\n$",
    ),
    "profile of longer windows than the model's": (
        "profile {files}/moe --tokens {files}/train --out {out}/x.npz --max-tokens 129 --sequence-length 129",
        r"\b129\b.*\b128\b",
    ),
    "profile into what exists": (
        "profile {files}/moe --tokens {files}/train --out {out}/old",
        r"^output .*/old exists; choose another name or pass --overwrite\n$",
    ),
    "profile into a folder": (
        "profile {files}/moe --tokens {files}/train --out {files} --overwrite",
        r"^output .* is a folder, expected the name of a file; add one\n$",
    ),
    "place no profile": (
        "place {files}/none.npz --devices 2 --out {out}/x.json",
        r"^profile .*/none\.npz cannot be read .*; make one with `ep-engine profile`\n$",
    ),
    "place on too many": (
        "place {files}/profile.npz --devices 9 --out {out}/x.json",
        r"^--devices \(9\) must be in 1\.\.8, the experts of .*/profile\.npz; choose it there\n$",
    ),
    "place on none": (
        "place {files}/profile.npz --devices 0 --out {out}/x.json",
        r"^--devices \(0\) must be in 1\.\.8",
    ),
    "place on uneven nodes": (
        "place {files}/profile.npz --devices 4 --nodes 3 --out {out}/x.json",
        r"^nodes \(3\) must divide devices \(4\); give every node the same number\n$",
    ),
    "place into what exists": (
        "place {files}/profile.npz --devices 2 --out {out}/old",
        r"^output .*/old exists; choose another name or pass --overwrite\n$",
    ),
    "no text": ("profile {files}/moe --out {out}/p.npz", r"^give either --corpus \(None\) or --tokens \(None\)"),
    "text twice": (
        "profile {files}/moe --corpus {files} --tokens {files}/train --out {out}/p.npz",
        r"^give either --corpus .* or --tokens .*, the text to profile on\n$",
    ),
    "no such text": (
        "profile {files}/moe --corpus {out}/none --out {out}/p.npz",
        r"^corpus .*/none does not exist; give text files, \.jsonl files or folders of them\n$",
    ),
    "no tokenizer": (
        "profile {files}/moe --corpus {files} --out {out}/p.npz",
        r"^.*/moe has no tokenizer for --corpus; give a token file with --tokens\n$",
    ),
    "a picture of no kind": (
        "profile {files}/moe --tokens {files}/train --out {out}/p.npz --picture {out}/p.gif",
        r"^--picture .*/p\.gif must end in \.png, \.svg or \.pdf; choose one\n$",
    ),
    "no such command": ("plce", r"^No such command 'plce'\..*; see --help\n$"),
    "no such option": ("place {files}/profile.npz --device 2", r"^No such option: --device\b.*; see --help\n$"),
    "missing option": ("place {files}/profile.npz --devices 2", r"^Missing option '--out'; see --help\n$"),
    "no number": (
        "place {files}/profile.npz --devices two --out x",
        r"^Invalid value for '--devices': .*; see --help\n$",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_done_is_one_sentence_and_status_2(name: str, run: Command, files: Path, tmp_path: Path) -> None:
    line, sentence = REFUSALS[name]
    write_run(files, tmp_path)
    (tmp_path / "old").write_text("kept")
    before = contents(files, tmp_path)
    status, out, err = run(*line.format(files=files, out=tmp_path).split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    with pytest.raises(ValueError, match=sentence):
        raise ValueError(err)
    assert contents(files, tmp_path) == before


def test_overwrite_replaces_an_output(run: Command, files: Path, tmp_path: Path) -> None:
    for name in ("p.npz", "p.json"):
        (tmp_path / name).write_text("old")
    assert run(*profile_arguments(files, tmp_path / "p.npz", *SMALL, "--overwrite"))[0] == 0
    assert run("place", tmp_path / "p.npz", "--devices", 2, "--out", tmp_path / "p.json", "--overwrite")[0] == 0
    assert read_placement(tmp_path / "p.json").experts_of_layer == read_profile(tmp_path / "p.npz").experts_of_layer


def test_run_folder_is_replaced_only_with_overwrite(run: Command, files: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").touch()
    arguments = ("train", write_run(files, tmp_path), "train.steps=1")
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert "run is not empty (1 entries); choose another or pass --overwrite" in err
    assert (tmp_path / "run" / "old").exists()
    assert run(*arguments, "--overwrite")[0] == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoints",
        "job",
        "metrics.jsonl",
        "profile.npz",
        "run.lock",
        "run.toml",
        "summary.json",
        "tensorboard",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_that_is_not_there_is_refused_before_anything_is_replaced(
    run: Command, files: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").touch()
    status, out, err = run("train", write_run(files, tmp_path), "parallel.device=cuda", "--overwrite")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "parallel.device" in err
    assert (tmp_path / "run" / "old").exists()


def test_text_of_a_larger_vocabulary_replaces_no_run(run: Command, files: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").touch()
    write_token_file(tmp_path / "other", [np.full(4000, 69)], vocab_size=70)  # seen in the first batch
    status, _, err = run("train", write_run(files, tmp_path), f"data.train={tmp_path / 'other'}", "--overwrite")
    assert status == 2
    assert "id 69" in err
    assert (tmp_path / "run" / "old").exists()


@pytest.mark.parametrize("command", ["profile", "train"])
def test_text_of_a_larger_vocabulary_is_refused(command: str, run: Command, files: Path, tmp_path: Path) -> None:
    write_token_file(tmp_path / "other", [np.arange(4000) % 70], vocab_size=70)
    if command == "profile":
        given = ("profile", files / "moe", "--tokens", tmp_path / "other", "--out", tmp_path / "x.npz", *SMALL)
    else:
        given = ("train", write_run(files, tmp_path), f"data.heldout={tmp_path / 'other'}", "train.steps=1")
    status, out, err = run(*given)
    assert (status, out) == (2, "")
    sentence = err.splitlines()[-1]
    assert str(tmp_path / "other") in sentence
    assert "64" in sentence
