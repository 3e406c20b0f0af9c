"""What a run says of its routing while it trains, and of the placement in use; and how experts move to a better one."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from checkpoint_tools.source import open_source
from ep_engine.c2r.collaboration import Profile, drift, read_profile
from ep_engine.c2r.place import asked_of, place
from ep_engine.c2r.placement_watch import ALARM, PlacementWatch, compare, stored_profile
from ep_engine.config import RunConfig
from ep_engine.errors import UserError
from ep_engine.metrics import Metrics, load_picture, numbers_in
from ep_engine.placement import Placement, read_placement
from ep_engine.resolve import resolve
from tests.counts import COUNTS, LOAD, random_profile
from tests.distributed import run_ranks
from tests.run_cases import losses, moe_folder, small_run, train_here


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moe_folder(tmp_path_factory.mktemp("runs"))


def lines_of(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.output.folder / "metrics.jsonl").read_text().splitlines()]


def _train(rank: int, world_size: int, config: RunConfig) -> None:
    train_here(config, rank=rank, world_size=world_size)


def run_on_two(folder: Path, name: str, **sections: Any) -> RunConfig:
    parallel = {"expert_parallel_size": 2}
    model = {"checkpoint": str(folder / "moe")}
    train = {"steps": 6, "save_every": 3, "log_every": 2, **sections.pop("train", {})}
    config = small_run(folder, name, model=model, parallel=parallel, train=train, **sections)
    run_ranks(_train, config, world_size=2)
    return config


def test_a_line_has_what_the_routers_and_the_ledger_say(folder: Path) -> None:
    stored = {"rule": "c2r", "top_t": 3, "profile": str(folder / "profile.npz")}
    config = run_on_two(folder, "lines", routing=stored)
    lines = lines_of(config)
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    for line in lines:
        assert line["load_violation"] == pytest.approx(line["load_max_over_mean"] - 1)
        assert 1 <= line["device_load_max_over_mean"] <= line["load_max_over_mean"]
        assert 0 < line["intra_device_fraction"] < 1
        # two experts a token: what is inside one device needs no second one
        assert line["devices_per_token"] == pytest.approx(2 - line["intra_device_fraction"], abs=0.02)
        assert sum(line["bytes_per_token_by_tier"].values()) == pytest.approx(line["bytes_per_token"]["total"])
        assert line["bytes_per_token_by_tier"]["network"] == 0
    found = json.loads((config.output.folder / "summary.json").read_text())["placement"]
    assert found["step"] == 6
    assert 0 < found["in_use"] <= found["solved"] < 1
    assert 0 < found["drift"]["l1"] < 1
    assert ("alarm" in found) == (found["solved"] - found["in_use"] > ALARM)


def test_the_profile_is_of_the_steps_since_the_last_save(folder: Path) -> None:
    config = run_on_two(folder, "recent")
    recent = read_profile(config.output.folder / "profile.npz")
    tokens = 3 * config.data.batch_size * config.data.sequence_length
    assert (recent.about["tokens"], recent.about["step"]) == (tokens, 6)
    assert recent.load.sum(axis=1).tolist() == [2 * tokens] * 2
    # the same as a run that begins where that save was
    later = run_on_two(folder, "later", train={"save_every": 3})
    (later.output.folder / "checkpoints/step_000006").rename(folder / "gone")
    resumed = later.model_copy(update={"output": later.output.model_copy(update={"resume": True})})
    run_ranks(_train, resumed, world_size=2)
    assert np.array_equal(read_profile(later.output.folder / "profile.npz").counts, recent.counts)


def test_nothing_is_counted_where_nobody_watches(folder: Path) -> None:
    config = run_on_two(folder, "blind", output={"watch": False})
    assert not (config.output.folder / "profile.npz").exists()
    assert "placement" not in json.loads((config.output.folder / "summary.json").read_text())
    assert all("intra_device_fraction" not in line for line in lines_of(config))
    assert losses(config) == losses(run_on_two(folder, "seeing"))


def test_tensorboard_shows_the_numbers_of_the_lines(folder: Path) -> None:
    config = run_on_two(folder, "events")
    shown = EventAccumulator(str(config.output.folder / "tensorboard"))
    shown.Reload()
    lines = lines_of(config)
    for name in ("loss", "load_violation", "bytes_per_token/total", "bytes_per_token_by_tier/node"):
        events = shown.Scalars(name)
        assert [event.step for event in events] == [line["step"] for line in lines]
        first, *rest = name.split("/")
        values = [line[first][rest[0]] if rest else line[first] for line in lines]
        assert [event.value for event in events] == pytest.approx(values, rel=1e-6)
    last = lines[-1]["layers"]
    assert shown.Scalars("layers/layer_1/token_entropy")[-1].value == pytest.approx(last[1]["token_entropy"], rel=1e-6)
    picture = np.asarray(Image.open(io.BytesIO(shown.Images("load")[-1].encoded_image_string)).convert("L"))
    assert np.abs(picture / 255 - load_picture(last)).max() < 1 / 128


def test_numbers_in_a_line() -> None:
    line = {"step": 3, "a": 1, "b": {"c": 2.5, "step": 4, "d": {"e": 0}}, "losses": [1.0], "text": "x", "yes": True}
    assert numbers_in(line) == [("a", 1.0), ("b/c", 2.5), ("b/step", 4.0), ("b/d/e", 0.0)]
    layers = [{"layer": 2, "load": [3, 4], "entropy": 0.5}, {"layer": 7, "load": [1], "entropy": 0.25}]
    assert numbers_in({"layers": layers}) == [("layers/layer_2/entropy", 0.5), ("layers/layer_7/entropy", 0.25)]


def test_a_picture_of_loads_shows_twice_the_mean_white() -> None:
    layers = [{"load": [3, 1]}, {"load": [6, 0, 0]}]
    assert load_picture(layers).tolist() == [[0.75, 0.25, 0.0], [1.0, 0.0, 0.0]]


def test_lines_of_steps_that_are_done_again_are_dropped(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    for step in (2, 4, 6):
        metrics.append({"step": step, "loss": 1.0})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    Metrics(tmp_path).forget_after(4)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [2, 4]


def spearman(a: Any, b: Any) -> float:
    """Correlation of ranks, equal values sharing the mean of theirs."""
    ranks = [[(of < value).sum() + ((of == value).sum() - 1) / 2 for value in of] for of in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize("seed", range(3))
def test_drift_is_the_distance_and_the_rank_correlation_of_pairs(seed: int) -> None:
    one, other = random_profile(2, 7, seed, largest=6), random_profile(2, 7, seed + 10, largest=6)
    rows, columns = np.triu_indices(7, 1)
    found = drift(one.counts, other.counts)
    pairs = [(a[rows, columns], b[rows, columns]) for a, b in zip(one.counts, other.counts, strict=True)]
    assert found["l1"] == pytest.approx(np.mean([np.abs(a / a.sum() - b / b.sum()).sum() / 2 for a, b in pairs]))
    assert found["rank_correlation"] == pytest.approx(np.mean([spearman(a, b) for a, b in pairs]))
    assert drift(one.counts, 3 * one.counts) == pytest.approx({"l1": 0.0, "rank_correlation": 1.0})
    assert drift(one.counts, 0 * one.counts) == {"l1": 0.0, "rank_correlation": 1.0}


def profile_with_partners(partner: int) -> Profile:
    """Each expert of 8 works with the one `partner` further on most."""
    counts = np.ones((1, 8, 8), dtype=np.int64)
    for expert in range(8):
        if expert // partner % 2 == 0:
            counts[0, expert, (expert + partner) % 8] = counts[0, (expert + partner) % 8, expert] = 50
    counts[:, range(8), range(8)] = 0
    return Profile(counts, counts.sum(axis=2), 2, {})


def test_a_placement_that_the_routers_have_left_raises_an_alarm() -> None:
    before, after = profile_with_partners(1), profile_with_partners(4)
    placement, _ = place(before, 4)
    same = compare(placement, before, 10, before)
    assert "alarm" not in same
    assert same["in_use"] == same["solved"] == pytest.approx(400 / 448)
    assert same["drift"] == pytest.approx({"l1": 0.0, "rank_correlation": 1.0})
    moved = compare(placement, after, 20, before)
    assert moved["solved"] == pytest.approx(400 / 448)
    assert moved["in_use"] == pytest.approx(8 / 448)
    assert moved["drift"]["l1"] > 0.8
    assert moved["alarm"].startswith("the placement in use has 1.8% of the pairs of the last steps inside devices, one")
    assert "drift" not in compare(placement, after, 20, None)


def test_a_look_is_told_once_and_does_not_wait_for_the_next() -> None:
    watch = PlacementWatch(Placement.contiguous(4, 2, 1), None)
    assert watch.take(wait=True) is None
    watch.look(Profile(COUNTS[None], LOAD[None], 2, {}), 5)
    found = watch.take(wait=True)
    assert found is not None
    assert found["step"] == 5
    assert watch.take() is None


def test_a_stored_profile_is_one_with_counts(folder: Path) -> None:
    assert stored_profile(None) is None
    assert stored_profile(Path("config.json")) is None
    found = stored_profile(folder / "profile.npz")
    assert found is not None
    assert found.num_experts == 8


def test_experts_move_to_a_new_placement_with_their_moments(folder: Path) -> None:
    """Solved again from a run, and resumed with it: every weight and moment is where it was, by logical expert."""
    combine = {"combine": "per_expert"}
    stay = run_on_two(folder, "stay", moe=combine)
    config = run_on_two(folder, "move", moe=combine)
    profile, devices, nodes = asked_of(None, config.output.folder, None, None)
    assert (profile, devices, nodes) == (config.output.folder / "profile.npz", 2, 1)
    placement, _ = place(read_profile(profile), devices, nodes=nodes)
    assert placement.layers != Placement.contiguous(8, 2, 2).layers
    placement.save(folder / "moved.json")

    last = config.output.folder / "checkpoints/step_000006"
    before = {name: tensor.clone() for name, tensor in open_source(last).tensors.items()}
    last.rename(folder / "reference-step-6")
    moved = config.model_copy(
        update={
            "output": config.output.model_copy(update={"resume": True}),
            "moe": config.moe.model_copy(update={"placement": folder / "moved.json"}),
        }
    )
    run_ranks(_train, moved, world_size=2)
    after = open_source(last).tensors
    assert before.keys() == after.keys()
    assert all(bool((before[name] == after[name]).all()) for name in before)  # steps 4 to 6 on other devices
    assert losses(config) == losses(stay)
    _, devices, nodes = asked_of(None, config.output.folder, None, None)
    assert read_placement(folder / "moved.json").devices == devices


@pytest.mark.parametrize(("profile", "run"), [(None, None), (Path("p.npz"), Path("run"))])
def test_a_profile_or_a_run_is_needed(profile: Path | None, run: Path | None) -> None:
    with pytest.raises(Exception, match=r"give either a profile \(.*\) or --from-run \(.*\), what to place by"):
        asked_of(profile, run, 2, 1)
    with pytest.raises(Exception, match=r"--devices \(None\) is missing"):
        asked_of(Path("p.npz"), None, None, None)


def test_no_pairs_are_no_alarm() -> None:
    nothing = Profile(np.zeros((1, 4, 4), dtype=np.int64), np.ones((1, 4), dtype=np.int64), 2, {})
    found = compare(Placement.contiguous(4, 2, 1), nothing, 1, None)
    assert "alarm" not in found
    assert math.isnan(found["in_use"])


def test_weights_and_biases_is_sent_the_numbers_of_the_lines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the package wandb, which only output.wandb needs, is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = small_run(folder, "sent", train={"steps": 4}, output={"wandb": "tests"})
    train_here(config)
    (file,) = (config.output.folder / "wandb").glob("offline-run-*/*.wandb")
    sent = file.read_bytes()  # records of protobuf, with values as JSON
    for line in lines_of(config):
        assert all(repr(line[name]).encode() in sent for name in ("loss", "grad_norm", "tokens_per_second"))


def test_weights_and_biases_is_refused_where_it_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ep_engine.resolve.find_spec", lambda _: None)
    config = small_run(folder, "refused", output={"wandb": "mine"})
    words = r"^output\.wandb is mine, but the package wandb is not installed; install it, or leave the key out$"
    with pytest.raises(UserError, match=words):
        resolve(config, 1)
