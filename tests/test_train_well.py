"""What a run does beside its steps: rates of gates, frozen weights, steps without numbers, spikes, early ends."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint_tools.source import open_source
from ep_engine.config import RunConfig, to_toml
from ep_engine.errors import Fault, UserError
from ep_engine.resolve import resolve
from ep_engine.router import Router
from ep_engine.training import trainer as trainer_file
from ep_engine.training.guard import GO_BACK, RECENT
from ep_engine.whole_model import write_model
from tests.distributed import run_ranks
from tests.run_cases import NEW_MODEL, losses, moe_folder, small_run, train_here

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moe_folder(tmp_path_factory.mktemp("runs"))


def run_of(folder: Path, name: str, parallel: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    model = {"checkpoint": str(folder / "moe")}
    return small_run(folder, name, model=model, train={"log_every": 1, **train}, parallel=parallel or {})


def weights(config: RunConfig, step: int | None = None) -> dict[str, Tensor]:
    checkpoints = sorted((config.output.folder / "checkpoints").iterdir())
    at = checkpoints[-1] if step is None else config.output.folder / f"checkpoints/step_{step:06d}"
    return dict(open_source(at).tensors)


def lines(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.output.folder / "metrics.jsonl").read_text().splitlines()]


def summary(config: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((config.output.folder / "summary.json").read_text())
    return found


def changed(config: RunConfig, folder: Path) -> set[str]:
    before, after = open_source(folder / "moe").tensors, weights(config)
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def _train(rank: int, world_size: int, config: RunConfig) -> None:
    train_here(config, rank, world_size)


def test_gates_may_have_a_rate_of_their_own(folder: Path) -> None:
    configs = {rate: run_of(folder, f"gates {rate}", steps=1, warmup_steps=0, **rate_of(rate)) for rate in (None, 1e-5)}
    for config in configs.values():
        train_here(config)
    before = open_source(folder / "moe").tensors
    moved = {
        rate: {name: float((tensor - before[name]).abs().max()) for name, tensor in weights(config).items()}
        for rate, config in configs.items()
    }
    for name, far in moved[None].items():
        ratio = 1e-5 / 3e-3 if ".router." in name else 1.0
        assert moved[1e-5][name] == pytest.approx(ratio * far, rel=0.05, abs=1e-7), (
            name
        )  # Adam's first step is its rate


def rate_of(gates: float | None) -> dict[str, Any]:
    return {} if gates is None else {"gate_learning_rate": gates}


LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one": (1, {}),
    "ep2": (2, {"expert_parallel_size": 2}),
    "tp2 ep2": (2, {"tensor_parallel_size": 2, "expert_parallel_size": 2}),
    "pp2": (2, {"pipeline_parallel_size": 2}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_frozen_stays_and_the_rest_learns(name: str, folder: Path) -> None:
    ranks, parallel = LAYOUTS[name]
    freeze = ["embed.*", "layers.0.*", "*.router.*", "layers.1.moe.experts.w_down"]
    config = run_of(folder, f"frozen {name}", parallel, freeze=freeze, steps=4, micro_batches=2)
    run_ranks(_train, config, world_size=ranks)
    found = changed(config, folder)
    assert {n for n in found if "experts" in n} == {
        f"layers.1.moe.experts.{e}.{w}" for e in range(8) for w in ("w_gate", "w_up")
    }
    assert {"head.weight", "norm.weight", "layers.1.attention.w_q.weight"} <= found
    assert not any(n.startswith(("embed", "layers.0.")) or ".router." in n or "w_down" in n for n in found)
    resumed = config.model_copy(
        update={
            "output": config.output.model_copy(update={"resume": True}),
            "train": config.train.model_copy(update={"steps": 6}),
        }
    )
    run_ranks(_train, resumed, world_size=ranks)  # moments of frozen weights are not asked for
    assert len(losses(resumed)) == 6


def test_a_frozen_embedding_that_is_the_head_stays_on_both_ends_of_a_pipeline(folder: Path) -> None:
    model, train = NEW_MODEL | {"tie_embeddings": True}, {"steps": 2, "micro_batches": 2, "freeze": ["embed.weight"]}
    one, two = (
        small_run(folder, f"tied {size}", model=model, train=train, parallel={"pipeline_parallel_size": size})
        for size in (1, 2)
    )
    train_here(one)
    run_ranks(_train, two, world_size=2)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert torch.equal(weights(two)["embed.weight"], weights(one)["embed.weight"])


def test_frozen_layouts_agree(folder: Path) -> None:
    of = [losses(run_of(folder, f"frozen {name}")) for name in LAYOUTS]
    for other in of[1:]:
        assert other == pytest.approx(of[0], rel=1e-5)  # sums of ranks are added in another order


@pytest.mark.parametrize(
    ("train", "sentence"),
    [
        ({"freeze": ["layers.9.*"]}, r"train.freeze 'layers.9.\*' matches none of the model's \d+ weights, such as "),
        ({"freeze": ["*"]}, r"train.freeze \['\*'\] and train.trainable all leave 0 of \d+ weights to train"),
        (
            {"trainable": "condensed-experts"},
            "train.trainable is condensed-experts, and the model has 0 condensed layers",
        ),
        (
            {"warmup_tokens": 100, "warmup_steps": 3},
            r"train.warmup_tokens \(100\) and train.warmup_steps \(3\) are both",
        ),
        ({"decay_steps": 3}, r"train.decay_steps \(3\) has no effect on train.schedule cosine; leave it out"),
        ({"spike_factor": 1.0}, "train.spike_factor: Input should be greater than 1"),
    ],
)
def test_what_cannot_be_is_refused(train: dict[str, Any], sentence: str, folder: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        resolve(run_of(folder, "refused", **train), 1)


class Planted:
    """Makes the losses of some steps what a test wants, as they come out of the sums over all ranks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, wanted: dict[int, float]) -> None:
        self.calls, real = 0, trainer_file.sum_over_ranks

        def sums(*args: Any) -> tuple[float, float, float]:
            self.calls += 1
            total, norm, more = real(*args)
            return wanted.get(self.calls, total), norm, more

        monkeypatch.setattr(trainer_file, "sum_over_ranks", sums)


def test_steps_that_are_no_numbers_are_left_out_and_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Planted(monkeypatch, {1: float("nan"), 3: float("inf"), 4: float("nan")})
    config = run_of(folder, "skipping", steps=6, skip_steps=2, save_every=1)
    train_here(config)
    told = lines(config)
    assert [line.get("skipped_steps", 0) for line in told] == [1, 1, 2, 3, 3, 3]
    assert [line["loss"] is None for line in told] == [True, False, True, True, False, False]
    assert summary(config)["skipped_steps"] == 3
    for a, b, same in ((2, 3, True), (3, 4, True), (4, 5, False)):
        one, other = weights(config, a), weights(config, b)
        assert all(torch.equal(one[name], other[name]) for name in one) == same
    assert not (config.output.folder / "metrics.jsonl").read_text().count("NaN")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_that_is_left_out_counts_nowhere(ranks: int, folder: Path) -> None:
    """Weights of one row of the batch are no numbers from step 2 to 3: real NaN in logits, losses and loads."""
    parallel = {"expert_parallel_size": ranks}
    sections = {"steps": 4, "skip_steps": 1, "log_every": 2}
    config = run_of(folder, f"counted {ranks}", parallel, **sections)
    run_ranks(_with_a_bad_step, config, world_size=ranks)
    told = lines(config)
    assert [line.get("skipped_steps", 0) for line in told] == [1, 1]
    assert not (config.output.folder / "metrics.jsonl").read_text().count("NaN")
    tokens = config.data.batch_size * config.data.sequence_length
    assert [sum(line["layers"][0]["load"]) for line in told] == [2 * tokens, 2 * 2 * tokens]  # top-2; one step, two


def _with_a_bad_step(rank: int, world_size: int, config: RunConfig) -> None:
    real = Router.logits
    steps = count()

    def logits(router: Router, x_TD: Tensor) -> Tensor:
        found = real(router, x_TD)
        bad = router.layer == 0 and torch.is_grad_enabled() and next(steps) == 1
        return found * float("nan") if bad else found

    Router.logits = logits  # type: ignore[method-assign]
    train_here(config, rank, world_size)


def test_too_many_of_them_stop_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Planted(monkeypatch, dict.fromkeys((2, 3, 4), float("nan")))
    with pytest.raises(
        Fault, match=r"step 4: the loss is nan and the gradient norm .*; training stopped, no checkpoint"
    ):
        train_here(run_of(folder, "too many", steps=6, skip_steps=2))


def test_a_spike_goes_back_and_on_with_later_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = RECENT + 8
    Planted(monkeypatch, {RECENT + 3: 100.0})
    config = run_of(folder, "spike", steps=steps, spike_factor=2.0, save_every=10)
    train_here(config)
    told = lines(config)
    assert [line["step"] for line in told] == list(range(1, steps + 1))  # those that were done again are told once
    assert told[-1]["went_back"] == 1
    assert max(losses(config)) < 10
    kept = json.loads((config.output.folder / f"checkpoints/step_{steps:06d}/manifest.json").read_text())
    rows_read = 8 * (steps + 3)  # those of three steps are not read again
    assert kept["training"]["data"]["domains"]["all"]["rows"] == rows_read
    assert len({sum(line["layers"][0]["load"]) for line in told}) == 1  # the step of the spike is in none of them


def test_spikes_without_a_checkpoint_or_again_and_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Planted(monkeypatch, {RECENT + 1: 100.0})
    config = run_of(folder, "early", steps=RECENT + 2, spike_factor=2.0)
    train_here(config)
    assert "and there is no checkpoint yet" in caplog.text
    Planted(monkeypatch, {RECENT + 1 + n: 100.0 for n in range(GO_BACK + 1)})
    with pytest.raises(
        Fault, match=f"the loss is 100.0, a spike again after going back {GO_BACK} times, the last checkpoint"
    ):
        train_here(run_of(folder, "again", steps=3 * RECENT, spike_factor=2.0, save_every=5))


def test_a_time_limit_saves_and_ends(folder: Path) -> None:
    config = run_of(folder, "limited", {"expert_parallel_size": 2}, steps=100_000, time_limit_s=3.0)
    run_ranks(_train, config, world_size=2)
    told = summary(config)
    assert told["stopped"] == "train.time_limit_s"
    assert 0 < told["steps"] < 100_000
    assert told["heldout_loss"] is None
    assert open_source(config.output.folder / f"checkpoints/step_{told['steps']:06d}").config.moe is not None


def test_a_signal_to_one_rank_ends_all_after_the_same_step(folder: Path) -> None:
    config = run_of(folder, "signalled", {"expert_parallel_size": 2}, steps=100_000)
    run_ranks(_signalled, config, world_size=2)
    told = summary(config)
    assert told["stopped"] == "SIGTERM"
    go_on = config.model_copy(
        update={
            "output": config.output.model_copy(update={"resume": True}),
            "train": config.train.model_copy(update={"steps": told["steps"] + 2}),
        }
    )
    train_here(go_on.model_copy(update={"parallel": go_on.parallel.model_copy(update={"expert_parallel_size": 1})}))
    assert summary(go_on)["steps"] == told["steps"] + 2


def _signalled(rank: int, world_size: int, config: RunConfig) -> None:
    if rank == 1:
        metrics = config.output.folder / "metrics.jsonl"
        threading.Thread(target=_signal_once_there, args=(metrics,), daemon=True).start()
    train_here(config, rank, world_size)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the process can be ended again


def _signal_once_there(metrics: Path) -> None:
    while not metrics.exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["launch/torchrun.py", "torchrun"])
def test_torchrun_ends_well_through_our_script(launcher: str, folder: Path, tmp_path: Path) -> None:
    """Workers save and end with 0; torchrun itself would tell 1 all the same."""
    config = run_of(folder, f"under {Path(launcher).name}", {"expert_parallel_size": 2}, steps=100_000)
    (tmp_path / "run.toml").write_text(to_toml(config))
    start = [str(ROOT / launcher)] if launcher.startswith("launch") else ["-m", "torch.distributed.run"]
    command = [sys.executable, *start, "--standalone", "--nproc-per-node", "2", "-m", "ep_engine.cli", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*command, str(tmp_path / "run.toml")], env=environment, stderr=subprocess.PIPE, text=True
    ) as run:
        metrics, deadline = config.output.folder / "metrics.jsonl", time.monotonic() + 120
        while not metrics.exists() and time.monotonic() < deadline and run.poll() is None:
            time.sleep(0.2)
        run.send_signal(signal.SIGTERM)
        _, told = run.communicate(timeout=120)
    assert summary(config)["stopped"] == "SIGTERM", told
    assert run.returncode == (0 if launcher.startswith("launch") else 1), told


@pytest.mark.parametrize("layers", [[1], [0, 1]], ids=["one", "all"])
def test_condensed_layers_alone_are_trained(folder: Path, layers: list[int]) -> None:
    from ep_engine.entries import Shard, expected_entries
    from ep_engine.initial import initialise
    from ep_engine.model_config import CondensedLayer

    config = open_source(folder / "moe").config
    condensed = {i: CondensedLayer(shared_size=16, gated=True, scales=[0.5, 2.0]) for i in layers}
    config = config.model_copy(update={"dense_layers": {i: 32 + 16 * i for i in layers}, "condensed": condensed})
    tensors = {name: torch.empty(shape) for name, shape in expected_entries(config).items()}
    initialise({name: Shard(tensor, tensor, 0) for name, tensor in tensors.items()}, config, seed=0)
    made = folder / f"condensed-{len(layers)}"
    write_model(made, config, tensors)
    model, trained = {"checkpoint": str(made)}, {"steps": 2, "trainable": "condensed-experts"}
    run = small_run(folder, f"{made.name}-run", model=model, train=trained)
    train_here(run)
    after = weights(run)
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, tensors[name])}
    assert moved == {f"layers.{i}.ffn.{name}.weight" for i in layers for name in ("w_gate", "w_up", "w_down")}
    if config.is_dense:
        run = small_run(folder, "many ranks", model=model, parallel={"expert_parallel_size": 2})
        with pytest.raises(UserError, match="needs a model with experts, this one is dense"):
            resolve(run, 2)
