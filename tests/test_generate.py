"""`ep-engine generate`: the tokens of transformers in any batch, on any ranks, under any rule; sampling by its book."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint_tools.convert import convert
from checkpoint_tools.export import export
from ep_engine.inference.generate import Sampling, choose, continue_all, end_tokens
from ep_engine.inference.loaded_model import Rule, loaded
from ep_engine.kv_cache import KVCache
from ep_engine.mesh import World
from ep_engine.model_config import read_model_config
from ep_engine.placement import Placement
from tests.distributed import run_ranks
from tests.family_cases import family_folder
from tests.run_files import contents, make_files
from tests.small_models import SIZES, dense_folder, edit_json, edit_weights, moe_checkpoint, routing_tables
from tests.texts import text_model

Command = Callable[..., tuple[int, str, str]]
PROMPTS = [[5, 17, 33, 2, 60, 8, 41], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [63, 0, 31]]
NEW = 24
GREEDY = Sampling()


def never(tokens: Any) -> bool:
    return False


def of_transformers(folder: Path, prompts: list[list[int]] = PROMPTS, **options: Any) -> list[list[int]]:
    """Greedy continuations by transformers' own generate, the batch padded on the left."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    given = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, **given)[:, longest:].tolist()


def lively(folder: Path) -> Path:
    """The model with larger embeddings and smaller biases, so that what comes next depends on what came last."""

    def enlarge(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"] *= 6
        for name, tensor in tensors.items():
            tensor *= 0.1 if name.endswith("bias") else 1

    edit_weights(folder, enlarge)
    return folder


def continued(folder: Path, prompts: list[list[int]] = PROMPTS, *, batch_size: int = 16, **how: Any) -> list[list[int]]:
    """The same by the engine, on one rank."""
    with loaded(folder, World(), how.get("rule", Rule()), most_tokens=256) as model:
        sampling, ends = how.get("sampling", GREEDY), how.get("ends", never)
        return continue_all(model, prompts, NEW, ends, sampling, batch_size=batch_size)


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "qwen2", "mixtral", "qwen2_moe", "qwen2_moe_with_dense", "qwen3_moe", "olmoe"]
)
def test_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Windows of 7 and 9 positions are shorter than all that is generated, and than the longest prompt."""
    convert(lively(family_folder(tmp_path / "hf", name)), tmp_path / "engine")
    export(tmp_path / "engine", tmp_path / "back")
    expected = of_transformers(tmp_path / "back")
    assert continued(tmp_path / "engine") == expected
    # Not one token over and over; where the head is the embedding, a token mostly follows itself.
    assert len({token for row in expected for token in row}) > (3 if name == "qwen2" else 8)


@pytest.mark.parametrize("rule", ["topk", "group_limited", "c2r", "c2r_grouped"])
def test_greedy_tokens_are_those_of_an_export_of_llama_moe(rule: str, tmp_path: Path) -> None:
    dense = dense_folder(tmp_path / "dense")
    export(moe_checkpoint(tmp_path / "engine", dense, routing=routing_tables(rule)), tmp_path / "hf")
    assert continued(tmp_path / "engine") == of_transformers(tmp_path / "hf")


def test_greedy_tokens_are_those_of_an_export_with_our_code(tmp_path: Path) -> None:
    convert(lively(family_folder(tmp_path / "hf", "qwen2_moe")), tmp_path / "engine")
    tables = routing_tables("c2r", num_experts=6)
    edit_json(tmp_path / "engine" / "model.json", lambda model: model["moe"]["routing"].update(tables))
    export(tmp_path / "engine", tmp_path / "back", our_code=True)
    found = continued(tmp_path / "engine")
    assert found == of_transformers(tmp_path / "back")
    assert found != of_transformers(tmp_path / "hf")  # the rule shows


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


def test_a_prompt_is_continued_alike_alone_and_in_every_batch(files: Path) -> None:
    together = continued(files / "moe")
    assert together == [continued(files / "moe", [prompt])[0] for prompt in PROMPTS]
    assert together == continued(files / "moe", batch_size=3)


def test_the_cache_changes_no_token(files: Path) -> None:
    with loaded(files / "moe", World(), Rule(), most_tokens=256) as model, torch.no_grad():
        for prompt, found in zip(PROMPTS, continue_all(model, PROMPTS, NEW, never, GREEDY, batch_size=4), strict=True):
            ids = [*prompt]
            for token in found:
                assert int(model.model(torch.tensor([ids]))[0, -1].argmax()) == token
                ids.append(token)


def test_who_sees_whom_by_hand() -> None:
    cache = KVCache(torch.tensor([0, 2]), 6)
    first = cache.begin(4, window=3)
    assert cache.positions_BS.tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    assert first.int().tolist() == [
        [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]]],
        [[[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]],  # two of padding see themselves alone
    ]
    assert cache.begin(1, window=3).int().tolist() == [[[[0, 0, 1, 1, 1]]], [[[0, 0, 1, 1, 1]]]]
    assert cache.positions_BS.tolist() == [[4], [2]]


def test_a_row_ends_after_the_token_that_ends_it_and_others_go_on(files: Path) -> None:
    whole = continued(files / "moe")
    last = whole[0][3]
    found = continued(files / "moe", ends=lambda tokens: tokens[-1] == last)
    assert found == [row[: row.index(last) + 1] if last in row else row for row in whole]
    assert len(found[0]) <= 4 < max(map(len, found))
    export(files / "moe", files / "moe-hf")
    padded = [row + [0] * (max(map(len, found)) - len(row)) for row in found]
    assert of_transformers(files / "moe-hf", eos_token_id=last) == padded


def _continue_on_ranks(rank: int, world_size: int, files: Path, out: Path) -> None:
    short = PROMPTS[:3]  # with 4 ranks one has nothing to continue
    placed = Rule("c2r_grouped:3:1", files / "profile.npz", files / "placement4.json")
    found = {}
    for name, rule in (("own", Rule()), ("placed", placed)):
        with loaded(files / "moe", World(rank=rank, size=world_size), rule, most_tokens=256) as model:
            assert model.meshes.experts["ep"].size() == world_size
            ends = (lambda tokens: len(tokens) == 2 + tokens[0] % 13) if name == "own" else never
            for batch_size in (1, 4):
                for sampling in (GREEDY, Sampling(0.8, 0.9, seed=3)):
                    key = f"{name} {batch_size} {sampling.temperature}"
                    found[key] = continue_all(model, short, NEW, ends, sampling, batch_size=batch_size)
    (out / f"{world_size}_{rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_have_the_tokens_of_one(world_size: int, files: Path, tmp_path: Path) -> None:
    """Experts are shared, prompts too; some ranks have none, or are done while others go on."""
    run_ranks(_continue_on_ranks, files, tmp_path, world_size=1)
    run_ranks(_continue_on_ranks, files, tmp_path, world_size=world_size)
    alone = json.loads((tmp_path / "1_0.json").read_text())
    assert len({len(row) for row in alone["own 1 0.0"]}) > 1
    assert alone["own 1 0.0"] == alone["own 4 0.0"]
    assert alone["placed 1 0.8"] == alone["placed 4 0.8"] != alone["placed 1 0.0"]
    for rank in range(world_size):
        assert json.loads((tmp_path / f"{world_size}_{rank}.json").read_text()) == alone


def warped(logits_BV: Tensor, temperature: float, top_p: float) -> Tensor:
    """Probabilities as transformers' own processors leave them."""
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

    ids = torch.zeros(len(logits_BV), 1, dtype=torch.int64)
    scores = TemperatureLogitsWarper(temperature)(ids, logits_BV.double()) if temperature != 1 else logits_BV.double()
    return (TopPLogitsWarper(top_p)(ids, scores) if top_p < 1 else scores).softmax(dim=-1)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8), (1.5, 0.3), (1.0, 1e-9)])
def test_sampling_draws_from_the_distribution_of_transformers(temperature: float, top_p: float) -> None:
    logits_V = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 2
    expected_V = warped(logits_V.unsqueeze(0), temperature, top_p)[0]
    draws = [torch.Generator().manual_seed(7)] * 20_000  # one generator for all rows
    found = choose(logits_V.expand(20_000, 12), Sampling(temperature, top_p), draws)
    share_V = torch.bincount(found, minlength=12) / 20_000
    assert not share_V[expected_V == 0].any()
    # five standard deviations of a share
    assert ((share_V - expected_V).abs() <= 5 * (expected_V * (1 - expected_V) / 20_000).sqrt() + 1e-12).all()


def test_another_seed_draws_other_tokens(files: Path) -> None:
    one, same, other = (continued(files / "moe", sampling=Sampling(1.0, 1.0, seed)) for seed in (1, 1, 2))
    assert one == same != other
    twins = continued(files / "moe", [[5, 6], [5, 6]], sampling=Sampling(1.0, 1.0, 1))
    assert twins[0] != twins[1]  # the same prompt twice is two draws


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine checkpoint `engine` of 8 experts with a tokenizer."""
    at = tmp_path_factory.mktemp("texts")
    moe_checkpoint(at / "engine", text_model(at))
    return at


def test_the_command_prints_and_reports(run: Command, texts: Path, tmp_path: Path) -> None:
    command = ("generate", texts / "engine", "--max-new-tokens", 8)
    status, out, err = run(*command, "--prompt", "river boat", "--prompt", "piano", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)["continued"]
    assert [one["prompt"] for one in found] == ["river boat", "piano"]
    assert all(len(one["tokens"]) == 8 or one["ended"] for one in found)
    status, out, err = run(*command, "--prompt", "river boat")
    assert (status, out, err) == (0, f"river boat{found[0]['text']}\n", "")
    (tmp_path / "p.txt").write_text("river boat\n\npiano\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": one["prompt"]}) + "\n" for one in found))
    for name in ("p.txt", "p.jsonl"):
        assert json.loads(run(*command, "--prompt-file", tmp_path / name, "--json")[1])["continued"] == found


def test_text_ends_where_the_model_says(texts: Path) -> None:
    config = read_model_config(texts / "engine" / "model.json")
    tokenizer = type("T", (), {"eos_token_id": 7})
    assert end_tokens(config.model_copy(update={"carried": {}}), tokenizer) == {7}
    assert end_tokens(config.model_copy(update={"carried": {"eos_token_id": [3, 4]}}), tokenizer) == {3, 4}
    both = {"eos_token_id": 3, "generation_config": {"eos_token_id": [5, 6]}}
    assert end_tokens(config.model_copy(update={"carried": both}), tokenizer) == {5, 6}


REFUSALS = {
    "no prompt": ("{texts}/engine", r"^give either --prompt \(0 given\) or --prompt-file \(None\)"),
    "both": ("{texts}/engine --prompt x --prompt-file y", r"^give either --prompt \(1 given\) or --prompt-file \(y\)"),
    "no file": ("{texts}/engine --prompt-file no", r"^--prompt-file no cannot be read \(No such file"),
    "no key": ("{texts}/engine --prompt-file {out}/a.jsonl", r"a.jsonl cannot be read \(KeyError: 'prompt'\)"),
    "empty": ("{texts}/engine --prompt-file {out}/b.txt", r"b.txt has 0 prompts"),
    "too long": (
        "{texts}/engine --prompt river --max-new-tokens 128",
        r"^the longest prompt has \d+ tokens, with --max-new-tokens \(128\) more than the model's 128 positions",
    ),
    "no model": ("{out} --prompt x", r"holds no engine checkpoint"),
    "no tokenizer": ("{files}/moe --prompt x", r"files.*/moe has no tokenizer; make the checkpoint from a folder"),
    "rule": ("{texts}/engine --prompt x --rule c2r", r"^--rule c2r is none of topk, group_limited:GROUPS:M, c2r:T"),
    "no profile": ("{texts}/engine --prompt x --rule c2r:2", r"^--rule c2r:2 needs --profile, of which it makes lists"),
    "no placement": (
        "{texts}/engine --prompt x --rule c2r_grouped:2:1 --profile {files}/profile.npz",
        r"^--rule c2r_grouped:2:1 needs --placement, whose devices bound a token",
    ),
    "no devices": (
        "{texts}/engine --prompt x --rule c2r_grouped:2:0 --profile {files}/profile.npz --placement "
        "{files}/placement2.json",
        r"^--rule c2r_grouped:2:0: max_devices.*: Input should be greater than or equal to 1",
    ),
    "large T": ("{texts}/engine --prompt x --rule c2r:8 --profile {files}/profile.npz", r"top_t \(8\) must be in"),
    "unread profile": ("{texts}/engine --prompt x --profile p.npz", r"^--profile p.npz has no effect without a --rule"),
    "dense": ("{files}/dense-engine --prompt x --rule topk", r"^--rule topk needs a model with experts, .* is dense"),
    "other placement": (
        "{texts}/engine --prompt x --placement {out}/p.json",
        r"has 1 layers of 8 experts, the model 2",
    ),
    "no text": ("{texts}/engine --prompt=", r"^prompt '' has no tokens"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_done_is_one_sentence_and_status_2(
    name: str, run: Command, files: Path, texts: Path, tmp_path: Path
) -> None:
    line, sentence = REFUSALS[name]
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "b.txt").write_text("\n")
    Placement.contiguous(8, 2, 1).save(tmp_path / "p.json")
    before = contents(tmp_path)
    status, out, err = run("generate", *line.format(files=files, texts=texts, out=tmp_path).split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    with pytest.raises(ValueError, match=sentence):
        raise ValueError(err)
    assert contents(tmp_path) == before


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(run: Command, texts: Path, files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "moe", tmp_path / "moe")
    shutil.copytree(texts / "engine" / "tokenizer", tmp_path / "moe" / "tokenizer")
    status, _, err = run("generate", tmp_path / "moe", "--prompt", "river boat")
    assert status == 2
    assert f"outside of the model's vocabulary of {SIZES['vocab_size']}" in err
