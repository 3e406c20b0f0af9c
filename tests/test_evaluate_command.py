"""`ep-engine evaluate`: a checkpoint, its export and transformers score alike; suites are lm-eval's; refusals."""

import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from checkpoint_tools.export import export
from ep_engine.c2r.collaboration import collaboration_lists, read_profile
from ep_engine.data.tokens import TokenFile, write_token_file
from ep_engine.inference.generate import read_tokenizer
from ep_engine.inference.loaded_model import Rule, loaded
from ep_engine.inference.scores import Asked, evaluate_checkpoint
from ep_engine.inference.task_suites import SUITES, load_tasks, named_tasks, task_manager
from ep_engine.mesh import World
from ep_engine.placement import Placement
from tests.counts import random_profile
from tests.distributed import run_ranks
from tests.small_models import dense_folder, edit_json, moe_checkpoint, routing_tables
from tests.texts import VOCABULARY, WORDS, text_model

pytest.importorskip("lm_eval", reason="lm_eval is not installed; requirements-dev.txt pins it")

Command = Callable[..., tuple[int, str, str]]
TASKS = Path(__file__).parent / "tasks"
ALL = "words_choice,words_perplexity,words_until"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`engine`, 8 experts under C2R with a tokenizer, its export `hf`, tables for other rules; token file `text`."""
    at = tmp_path_factory.mktemp("files")
    moe_checkpoint(at / "engine", text_model(at), routing=routing_tables("c2r", top_t=1))
    export(at / "engine", at / "hf")
    random_profile(2, 8, seed=3).save(at / "profile.npz")
    Placement.contiguous(8, 4, 2).save(at / "placement.json")
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 700)
    write_token_file(at / "text", [ids[:300], ids[300:]], VOCABULARY)
    return at


def report(run: Command, *arguments: object) -> dict[str, Any]:
    status, out, err = run("evaluate", *arguments, "--json")
    assert status == 0, err
    return json.loads(out)


def local(files: Path, tasks: str = ALL, model: str = "engine") -> tuple[object, ...]:
    return (files / model, "--tasks", tasks, "--include-path", TASKS)


@pytest.mark.slow
def test_a_checkpoint_and_its_export_score_alike(run: Command, files: Path) -> None:
    for shots in ((), ("--num-fewshot", 2)):
        engine, exported = (
            report(run, *local(files, model=model), "--batch-size", 32, *shots) for model in ("engine", "hf")
        )
        assert engine["rule"] == exported["rule"] == "c2r"
        assert engine["tasks"].keys() == exported["tasks"].keys() == set(ALL.split(","))
        choice = engine["tasks"]["words_choice"]
        assert (choice["shots"], choice["questions"]) == (2 if shots else 0, 32)
        assert 0 < choice["acc"] < 1
        for metric in ("acc", "acc_norm", "acc_stderr"):
            assert choice[metric] == exported["tasks"]["words_choice"][metric]
        for metric in ("word_perplexity", "byte_perplexity"):
            found = (one["tasks"]["words_perplexity"][metric] for one in (engine, exported))
            assert next(found) == pytest.approx(next(found), rel=1e-4)  # exp of a sum over many tokens


def requests(files: Path) -> dict[str, list[Any]]:
    """What the tasks ask, by the kind of request."""
    asked: dict[str, list[Any]] = {}
    for task in load_tasks(dict.fromkeys(ALL.split(","), 1), TASKS)["tasks"].values():
        task.build_all_requests(limit=None, rank=0, world_size=1)
        for instance in task.instances:
            asked.setdefault(instance.request_type, []).append(instance)
    # A context alone, and texts beyond the model's 128 positions.
    # Not periodic ones: HFLM takes windows of the same tokens for one request, whatever of them is to be scored.
    words = " ".join(random.Random(0).choices(" ".join(WORDS).split(), k=240))
    asked["loglikelihood"] += [SimpleNamespace(args=one) for one in (("", " boat"), (words, " boat lake"))]
    asked["loglikelihood_rolling"].append(SimpleNamespace(args=(words,)))
    asked["generate_until"].append(SimpleNamespace(args=(words, {"until": ["\n"], "max_gen_toks": 9})))
    return asked


def answers(model: Any, files: Path) -> dict[str, list[Any]]:
    return {kind: getattr(model, kind)(some) for kind, some in requests(files).items()}


def of_engine(files: Path, world: World, batch_size: int = 8) -> dict[str, list[Any]]:
    from ep_engine.inference.lm_eval_model import EngineLM

    with loaded(files / "engine", world, Rule(), most_tokens=8 * 128) as model:
        return answers(EngineLM(model, read_tokenizer(files / "engine"), batch_size), files)


def test_every_answer_is_that_of_lm_evals_own_class_on_the_export(files: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    exported = HFLM(pretrained=str(files / "hf"), trust_remote_code=True, dtype="float32", device="cpu", batch_size=8)
    assert type(exported.model).__module__.startswith("transformers_modules.")
    ours, theirs = of_engine(files, World()), answers(exported, files)
    assert ours["generate_until"] == theirs["generate_until"]
    assert len(set(ours["generate_until"])) > 8
    for (one, greedy), (other, other_greedy) in zip(ours["loglikelihood"], theirs["loglikelihood"], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
        assert greedy == other_greedy
    assert ours["loglikelihood_rolling"] == pytest.approx(theirs["loglikelihood_rolling"], rel=1e-5)


@pytest.mark.slow
def test_lm_eval_runs_the_constrained_router_of_an_export_as_it_is(files: Path, tmp_path: Path) -> None:
    """Nothing is edited: `lm_eval --model hf --model_args pretrained=...,trust_remote_code=True` calls this."""
    from lm_eval import simple_evaluate

    export(files / "engine", tmp_path / "c2r", our_code=True)
    moe_checkpoint(tmp_path / "plain", files / "model")
    export(tmp_path / "plain", tmp_path / "topk")
    found = {}
    for name in ("c2r", "topk"):
        scored = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(tmp_path / name), "trust_remote_code": True, "dtype": "float32"},
            tasks=[*load_tasks({"words_choice": 0}, TASKS)["tasks"].values()],
            device="cpu",
            batch_size=8,
        )
        found[name] = [
            float(answer[0]) for one in scored["samples"]["words_choice"] for answer in one["filtered_resps"]
        ]
    assert len(found["c2r"]) == 4 * 32
    assert found["c2r"] != pytest.approx(found["topk"], rel=1e-3)  # the rule shows


def _score_on_ranks(rank: int, world_size: int, files: Path, out: Path) -> None:
    found = of_engine(files, World(rank=rank, size=world_size), batch_size=5)
    (out / f"{world_size}_{rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_requests_and_have_the_answers_of_one(world_size: int, files: Path, tmp_path: Path) -> None:
    run_ranks(_score_on_ranks, files, tmp_path, world_size=world_size)
    alone = json.loads(json.dumps(of_engine(files, World())))
    for rank in range(world_size):
        found = json.loads((tmp_path / f"{world_size}_{rank}.json").read_text())
        assert found["generate_until"] == alone["generate_until"]
        assert found["loglikelihood_rolling"] == pytest.approx(alone["loglikelihood_rolling"], rel=1e-5)
        for (one, greedy), (other, other_greedy) in zip(found["loglikelihood"], alone["loglikelihood"], strict=True):
            assert one == pytest.approx(other, rel=1e-5)
            assert greedy == other_greedy


def _evaluate_on_ranks(rank: int, world_size: int, files: Path, out: Path) -> None:
    asked = Asked(lambda: load_tasks({"words_choice": 0}, TASKS), None, files / "text", 40, None, 8)
    found = evaluate_checkpoint(files / "engine", asked, World(rank=rank, size=world_size), Rule(), 60.0)
    (out / f"{rank}.json").write_text(json.dumps(found))


def test_the_command_says_on_two_ranks_what_it_says_on_one(run: Command, files: Path, tmp_path: Path) -> None:
    run_ranks(_evaluate_on_ranks, files, tmp_path)
    alone = report(run, *local(files, "words_choice"), "--tokens", files / "text", "--sequence-length", 40)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        one, other = (one["tasks"]["words_choice"] for one in (alone, found))
        assert (other["acc"], other["acc_norm"], other["questions"]) == (one["acc"], one["acc_norm"], 32)
        assert found["heldout"]["loss"] == pytest.approx(alone["heldout"]["loss"], rel=1e-5)


def test_perplexity_is_that_of_a_plain_loop_for_checkpoint_and_export(run: Command, files: Path) -> None:
    from transformers import AutoModelForCausalLM

    heldout = ("--tokens", files / "text", "--sequence-length", 40)
    engine, exported = (report(run, files / model, *heldout)["heldout"] for model in ("engine", "hf"))
    model = AutoModelForCausalLM.from_pretrained(files / "hf", trust_remote_code=True).eval()
    stream = torch.from_numpy(TokenFile(files / "text").read(0, 700))
    losses = []
    for start in range(0, 699 - 39, 40):
        with torch.no_grad():
            logits = model(stream[None, start : start + 40]).logits[0]
        losses.append(float(F.cross_entropy(logits, stream[start + 1 : start + 41])))
    assert engine["tokens"] == exported["tokens"] == 40 * len(losses) == 680
    for found in (engine, exported):
        assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    some = report(run, files / "engine", *heldout, "--max-tokens", 100, "--batch-size", 3)["heldout"]
    assert some["tokens"] == 80
    assert some["loss"] == pytest.approx(np.mean(losses[:2]), rel=1e-5)


def test_a_rule_for_the_occasion_is_that_rule(run: Command, files: Path, tmp_path: Path) -> None:
    """Scores under --rule are those of a checkpoint that has the rule's tables in its model.json."""
    heldout = ("--tokens", files / "text", "--sequence-length", 50)
    lists = ("--profile", files / "profile.npz")
    given = {
        "topk": ("--rule", "topk"),
        "c2r": ("--rule", "c2r:2", *lists),
        "c2r_grouped": ("--rule", "c2r_grouped:2:1", *lists, "--placement", files / "placement.json"),
    }
    found = {name: report(run, files / "engine", *heldout, *options) for name, options in given.items()}
    assert {name: one["rule"] for name, one in found.items()} == {name: name for name in given}
    losses = [one["heldout"]["loss"] for one in found.values()]
    assert len(set(losses)) == 3
    assert losses[0] != report(run, files / "engine", *heldout)["heldout"]["loss"]
    moe_checkpoint(tmp_path / "plain", files / "model")
    assert report(run, tmp_path / "plain", *heldout)["heldout"]["loss"] == losses[0]
    tables = {
        "rule": "c2r",
        "top_t": 2,
        "lists": collaboration_lists(read_profile(files / "profile.npz").counts_of_layer),
    }
    edit_json(tmp_path / "plain" / "model.json", lambda model: model["moe"]["routing"].update(tables))
    assert report(run, tmp_path / "plain", *heldout)["heldout"]["loss"] == losses[1]
    devices = [[expert // 2 for expert in range(8)]] * 2
    tables = {"rule": "c2r_grouped", "max_devices": 1, "device_of_expert": devices}
    edit_json(tmp_path / "plain" / "model.json", lambda model: model["moe"]["routing"].update(tables))
    assert report(run, tmp_path / "plain", *heldout)["heldout"]["loss"] == losses[2]


def test_a_folder_with_code_asks_nothing(run: Command, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would ask on the terminal whether its code may run."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    status, _, err = run("evaluate", *local(files, "words_choice", "hf"), "--limit", 2)
    assert status == 0
    assert "Do you wish to run" not in err


def test_the_report_for_people(run: Command, files: Path) -> None:
    status, out, _ = run("evaluate", *local(files, "words_choice"), "--tokens", files / "text", "--limit", 4)
    assert status == 0
    assert "words_choice" in out
    assert "acc_norm" in out
    assert f"{files / 'text'}: loss " in out.replace("\n", "")


def test_a_group_and_a_task_file_in_the_plain_form(run: Command, files: Path, tmp_path: Path) -> None:
    found = report(run, *local(files, "words_group"))["tasks"]
    assert found.keys() == {"words_group", "words_choice", "words_until"}
    assert found["words_group"]["acc"] == found["words_choice"]["acc"]
    task = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(TASKS / "words.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{words}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
    }
    (tmp_path / "own.yaml").write_text(json.dumps(task))  # JSON is YAML
    own = report(run, files / "engine", "--tasks", "own", "--include-path", tmp_path)["tasks"]["own"]
    assert own["questions"] == 40
    # Eight questions more than the other task has.
    assert round(own["acc"] * 40) - round(found["words_choice"]["acc"] * 32) in range(9)


LLAMA_MOE = {
    "arc_challenge": 25, "hellaswag": 10, "boolq": 32, "nq_open": 32, "mmlu": 5,
    "sciq": 0, "piqa": 0, "winogrande": 0, "arc_easy": 0, "logiqa": 0, "lambada_openai": 0,
}  # fmt: skip
CD_MOE = ("arc_challenge", "boolq", "piqa", "rte", "openbookqa", "winogrande", "mmlu", "hellaswag")


def test_suites_have_the_published_shots_and_lm_eval_knows_every_task() -> None:
    assert named_tasks(["llama-moe"], None) == LLAMA_MOE
    assert named_tasks(["cd-moe"], None) == dict.fromkeys(CD_MOE, 0)
    assert named_tasks(["c2r"], None) == {name: n for name, n in LLAMA_MOE.items() if name != "nq_open"}
    assert set(SUITES) == {"c2r", "llama-moe", "cd-moe"}
    manager = task_manager([*LLAMA_MOE, *CD_MOE], None)
    for suite in SUITES.values():
        assert set(suite) <= set(manager.all_tasks)
    assert set(manager.match_tasks([*LLAMA_MOE, *CD_MOE])) == {*LLAMA_MOE, *CD_MOE}


def shots_of(tasks: dict[str, dict[str, Any]]) -> dict[str, int]:
    return {name: task.get_config("num_fewshot") for name, task in tasks["tasks"].items()}


def test_shots_of_a_suite_are_those_of_its_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUITES, "words", {"words_choice": 3, "words_until": 0})
    tasks = load_tasks(named_tasks(["words", "words_perplexity"], None), TASKS)
    assert shots_of(tasks) == {"words_choice": 3, "words_until": 0, "words_perplexity": 0}
    group = load_tasks({"words_group": 2}, TASKS)
    assert list(group["groups"]) == ["words_group"]
    assert shots_of(group) == {"words_choice": 2, "words_until": 2}
    choice = tasks["tasks"]["words_choice"]
    choice.build_all_requests(limit=1, rank=0, world_size=1)
    context = choice.instances[0].args[0]
    assert context.count("\n\n") == 3


def test_a_missing_library_is_a_sentence(run: Command, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    status, out, err = run("evaluate", *local(files))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("--tasks needs lm_eval, which cannot be imported (")
    assert "pip install 'ep_engine[evaluate]'" in err
    assert report(run, files / "engine", "--tokens", files / "text")["tasks"] == {}  # which needs none


def test_a_missing_accelerate_is_a_sentence(run: Command, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    status, out, err = run("evaluate", *local(files, "words_choice", "hf"))
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("tasks on a Hugging Face folder need accelerate, which cannot be imported (")


REFUSALS = {
    "nothing": ("{files}/engine", r"^there is nothing to evaluate on; give --tasks, --tokens, or both"),
    "unknown task": (
        "{files}/engine --tasks words_choise,words_until --include-path {tasks}",
        r"^task words_choise is unknown to lm-eval; did you mean words_choice",
    ),
    "unknown suite": (
        "{files}/engine --tasks llama_moe",
        r"^task llama_moe is unknown to lm-eval; did you mean llama-moe",
    ),
    "twice": ("{files}/engine --tasks cd-moe,piqa", r"^--tasks names piqa twice \(cd-moe, piqa\)"),
    "shots of a suite": (
        "{files}/engine --tasks c2r --num-fewshot 3",
        r"^--num-fewshot \(3\) has no effect on suite c2r",
    ),
    "no folder": ("{files}/engine --tasks x --include-path no", r"^--include-path no is no folder"),
    "no tokens": ("{files}/engine --tokens no", r"^token file no.bin does not exist"),
    "long": (
        "{files}/engine --tokens {files}/text --sequence-length 129",
        r"^--sequence-length \(129\) is longer than the model's positions \(128\)",
    ),
    "short text": (
        "{files}/engine --tokens {files}/text --sequence-length 64 --max-tokens 63",
        r"has 700 tokens and --max-tokens is 63, of which at least one window of 64 tokens",
    ),
    "ids": ("{files}/engine --tokens {files}/other", r"other.bin holds id 300 at position 5, outside \[0, 300\)"),
    "ids of a folder": (
        "{files}/hf --tokens {files}/other",
        r"other.bin holds id 300 at position 5, outside \[0, 300\)",
    ),
    "rule of a folder": ("{files}/hf --tokens x --rule topk", r"^--rule topk is for engine checkpoints"),
    "bad folder": ("{files}/bad --tokens x", r"bad cannot be read by transformers \("),
    "neither": ("{files} --tokens x", r"holds no engine checkpoint"),
    "no tokenizer": ("{files}/silent --tasks words_choice --include-path {tasks}", r"silent has no tokenizer"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_done_is_one_sentence_and_status_2(name: str, run: Command, files: Path) -> None:
    line, sentence = REFUSALS[name]
    if not (files / "bad").exists():
        (files / "bad").mkdir()
        (files / "bad" / "config.json").write_text('{"model_type": "no such"}')
        write_token_file(files / "other", [np.array([1, 2, 3, 4, 5, VOCABULARY, *range(200)])], VOCABULARY + 1)
        moe_checkpoint(files / "silent", dense_folder(files / "dense"))
    status, out, err = run("evaluate", *line.format(files=files, tasks=TASKS).split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    with pytest.raises(ValueError, match=sentence):
        raise ValueError(err)


def test_several_ranks_do_not_share_a_folder(run: Command, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = run("evaluate", files / "hf", "--tokens", files / "text")
    assert status == 2
    assert "hf is a Hugging Face folder, which 2 ranks do not share; convert it first" in err
