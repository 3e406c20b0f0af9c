"""Runs with all of `[balance]` on: every layout alike, resumed, with padding; biases at work; what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from checkpoint_tools.source import open_source
from ep_engine.balance_losses import losses_of
from ep_engine.config import RunConfig
from ep_engine.data.tokens import write_token_file
from ep_engine.entries import Shard, expected_entries
from ep_engine.errors import UserError
from ep_engine.initial import initialise
from ep_engine.model_config import ModelConfig, MoEConfig
from ep_engine.resolve import resolve
from ep_engine.whole_model import write_model
from tests.distributed import run_ranks
from tests.run_cases import NEW_MODEL, losses, small_run, train_here, write_text


def noisy_model(folder: Path, bias: Tensor | None = None, **moe: Any) -> Path:
    """A checkpoint of random weights whose gates have noise, and perhaps a bias."""
    shape = {"num_experts": 4, "top_k": 2, "expert_hidden_size": 24, "gate": "mlp", "gate_noise": True, **moe}
    sizes = {**NEW_MODEL, "head_dim": 8, "initializer_range": 0.1}
    config = ModelConfig(**sizes, moe=MoEConfig(**shape))
    tensors = {name: torch.empty(size) for name, size in expected_entries(config).items()}
    initialise({name: Shard(tensor, tensor, 0) for name, tensor in tensors.items()}, config, seed=0)
    if bias is not None:
        tensors |= {name: bias for name in tensors if name.endswith("router.bias")}
    write_model(folder, config, tensors)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_text(tmp_path_factory.mktemp("balance"))
    noisy_model(folder / "noisy")
    return folder


ALL = {
    "switch": 0.05,
    "importance": 0.02,
    "load": 0.02,
    "sequence": 0.03,
    "mutual_information": 0.02,
    "z": 0.01,
    "noise": True,
    "bias_rate": 0.05,
}


def run_of(folder: Path, name: str, balance: dict[str, Any], parts: int = 1, **sections: Any) -> RunConfig:
    train = {"steps": 5, "micro_batches": parts, "log_every": 2, **sections.pop("train", {})}
    model = {"checkpoint": str(folder / "noisy")}
    return small_run(folder, name, **{"model": model, "balance": balance, "train": train, **sections})


LAYOUTS: dict[str, tuple[int, int, dict[str, int], dict[str, Any]]] = {
    "dp2": (2, 1, {}, {}),
    "ep2 in parts": (2, 2, {"expert_parallel_size": 2}, {}),
    "tp2 ep2": (2, 1, {"tensor_parallel_size": 2, "expert_parallel_size": 2}, {}),
    "pp2 in parts": (2, 2, {"pipeline_parallel_size": 2}, {}),
    "ep2, computed again": (2, 2, {"expert_parallel_size": 2}, {"recompute": "full"}),
    "dp2 ep2 of 4": (4, 1, {"expert_parallel_size": 2}, {}),
}


def _train(rank: int, world_size: int, config: RunConfig) -> None:
    train_here(config, rank, world_size)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_alike_with_everything_on(name: str, folder: Path) -> None:
    ranks, parts, parallel, train = LAYOUTS[name]
    balance = ALL if "tp" in name else {**ALL, "capacity_factor": 1.2}  # under tp ranks have other tokens first
    alone = run_of(folder, f"alone {name}", balance, parts)
    train_here(alone)
    config = run_of(folder, name, balance, parts, parallel=parallel, train=train)
    run_ranks(_train, config, world_size=ranks)
    assert losses(config) == pytest.approx(losses(alone), rel=1e-5)  # sums of ranks are added in another order
    one, many = (last_line(c) for c in (alone, config))
    assert many["balance_losses"] == pytest.approx(one["balance_losses"], rel=1e-4)
    assert set(one["balance_losses"]) == set(losses_of(config.balance))
    for a, b in zip(one["layers"], many["layers"], strict=True):
        assert (a["load"], a["dropped"]) == (b["load"], b["dropped"])
    assert ("tp" in name) or sum(layer["dropped"] for layer in one["layers"]) > 0
    after = [open_source(c.output.folder / "checkpoints/step_000005").tensors for c in (alone, config)]
    for i in range(2):
        biases = [tensors[f"layers.{i}.moe.router.bias"] for tensors in after]
        assert biases[0].any()
        torch.testing.assert_close(*biases)
        assert after[0][f"layers.{i}.moe.router.w_noise"].any()  # it is trained


def test_a_switch_gate_as_published_trains_alike_on_two_ranks(folder: Path) -> None:
    """Gumbel noise, weights that are logits, a capacity, a factor that is learned."""
    noisy_model(folder / "switch", gate_noise=False, top_k=1, score="logit", learned_scale=True)
    sections = {"model": {"checkpoint": str(folder / "switch")}}
    balance = {"switch": 0.01, "gumbel": True, "capacity_factor": 0.9}
    alone = run_of(folder, "switch alone", balance, **sections)
    train_here(alone)
    config = run_of(folder, "switch ep2", balance, parallel={"expert_parallel_size": 2}, **sections)
    run_ranks(_train, config, world_size=2)
    assert losses(config) == pytest.approx(losses(alone), rel=1e-5)  # sums of ranks are added in another order
    assert sum(layer["dropped"] for layer in last_line(alone)["layers"]) > 0
    quiet = run_of(folder, "switch quiet", {**balance, "gumbel": False}, **sections)
    train_here(quiet)
    assert losses(quiet)[0] != losses(alone)[0]
    scale = open_source(alone.output.folder / "checkpoints/step_000005").tensors["layers.0.moe.router.scale"]
    assert 0 < abs(float(scale) - 1.0) < 0.1


def last_line(config: RunConfig) -> dict[str, Any]:
    line: dict[str, Any] = json.loads((config.output.folder / "metrics.jsonl").read_text().splitlines()[-1])
    return line


def test_noise_and_biases_resume_with_the_same_bits(folder: Path) -> None:
    whole = run_of(folder, "whole", ALL)
    train_here(whole)
    cut = run_of(folder, "cut", ALL, train={"save_every": 3})
    train_here(cut)
    (cut.output.folder / "checkpoints/step_000005").rename(folder / "gone")
    train_here(cut.model_copy(update={"output": cut.output.model_copy(update={"resume": True})}))
    assert losses(cut) == losses(whole)


def test_a_bias_makes_experts_equally_busy(folder: Path) -> None:
    """One expert is favoured at first, by a bias that only the loads of steps take back; of sigmoids, as published."""
    scores = {"score": "sigmoid", "renormalise": True}
    noisy_model(folder / "skewed", selection_bias=True, bias=torch.tensor([0.4, 0.0, 0.0, 0.0]), **scores)
    busiest = {}
    for rate in (0.0, 0.02):
        train = {"steps": 40, "log_every": 20, "learning_rate": 1e-5, "min_learning_rate": 1e-5}
        skewed = {"model": {"checkpoint": str(folder / "skewed")}}
        config = run_of(folder, f"rate {rate}", {"switch": 0.0, "bias_rate": rate}, train=train, **skewed)
        train_here(config)
        busiest[rate] = last_line(config)["load_max_over_mean"]
    assert busiest[0.0] > 1.8
    assert busiest[0.02] < 1.25


@pytest.mark.parametrize(
    ("balance", "sentence"),
    [
        ({"load": 0.1}, r"balance.load \(0.1\) has no gradient without balance.noise"),
        ({"switch": 0.0, "switch_of": "plain"}, r"balance.switch_of \(plain\) has no effect, balance.switch is 0"),
        ({"reference_compat": True}, "balance.reference_compat has no effect without balance.noise and balance.load"),
        ({"noise": True, "gumbel": True}, "balance.noise and balance.gumbel both add noise to the router's logits"),
        ({"z": -0.1}, "balance.z: Input should be greater than or equal to 0, got -0.1"),
        ({"capacity_factor": 0.0}, "balance.capacity_factor: Input should be greater than 0"),
    ],
)
def test_what_has_no_effect_or_sense_is_refused(balance: dict[str, Any], sentence: str, folder: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        resolve(run_of(folder, "refused", balance), 1)


def test_noise_needs_its_matrix_and_a_dense_model_has_no_experts(folder: Path) -> None:
    noisy_model(folder / "quiet", gate_noise=False)
    quiet = {"model": {"checkpoint": str(folder / "quiet")}}
    with pytest.raises(UserError, match=r"balance.noise is set, but the model's gates have no noise matrix"):
        resolve(run_of(folder, "refused", {"noise": True}, **quiet), 1)
    with pytest.raises(UserError, match=r"\[balance\] needs a model with experts, this one is dense; split it first"):
        resolve(small_run(folder, "refused", balance={"switch": 0.1}), 1)


@pytest.mark.parametrize("rule", ["group_limited", "c2r_grouped"])
def test_a_smooth_load_is_refused_where_noise_moves_groups(rule: str, folder: Path) -> None:
    routing: dict[str, Any] = {"rule": rule, "max_devices": 1}
    if rule == "group_limited":
        routing["num_groups"] = 2
    else:
        lists = [[*(e for e in range(4) if e != i), i] for i in range(4)]
        routing |= {"top_t": 1, "lists": [lists] * 2, "device_of_expert": [[0, 0, 1, 1]] * 2}
    noisy_model(folder / rule, routing=routing)
    model = {"model": {"checkpoint": str(folder / rule)}}
    with pytest.raises(UserError, match=rf"balance.load \(0.1\) is not known under routing.rule {rule}"):
        resolve(run_of(folder, "refused", {"load": 0.1, "noise": True}, **model), 1)


def test_padding_of_rows_is_told_from_tokens(tmp_path: Path) -> None:
    """Documents of 3 to 12 tokens in rows of 16: of what fills rows up, nothing is counted, on one rank or two,
    unless as published."""
    lengths = [3, 12, 5, 7, 9, 4, 11, 6] * 12
    write_token_file(tmp_path / "train", [np.arange(n) % 60 for n in lengths], NEW_MODEL["vocab_size"])
    noisy_model(tmp_path / "noisy")
    data = {"train": str(tmp_path / "train"), "heldout": None, "heldout_batches": 16, "packing": "padded"}
    sections = {"data": data, "train": {"steps": 2, "log_every": 1}}
    config = run_of(tmp_path, "one", {**ALL, "capacity_factor": 1.2}, **sections)
    train_here(config)
    two = run_of(tmp_path, "two", {**ALL, "capacity_factor": 1.2}, **sections)
    run_ranks(_train, two, world_size=2)
    read = run_of(tmp_path, "read", {}, **sections)
    blend = resolve(read, 1).blend()
    tokens = sum(int((blend.read([row]).documents_BS >= 0).sum()) for row in blend.ahead(8))
    assert tokens < 8 * 16
    published = run_of(tmp_path, "as published", {"importance": 0.1, "reference_compat": True}, **sections)
    train_here(published)
    for one, counted in ((config, tokens), (two, tokens), (published, 8 * 16)):
        line = json.loads((one.output.folder / "metrics.jsonl").read_text().splitlines()[0])
        assert [sum(layer["load"]) for layer in line["layers"]] == [2 * counted] * 2
    assert losses(two) == pytest.approx(losses(config), rel=1e-5)
