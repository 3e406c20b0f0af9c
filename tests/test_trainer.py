"""Training: golden losses, the same run twice, any number of ranks, resuming, and how a run ends badly."""

import json
import os
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from checkpoint_tools.source import open_source
from ep_engine.c2r.collaboration import Profile, read_profile
from ep_engine.checkpoint import newest, read_manifest
from ep_engine.config import RunConfig
from ep_engine.data.tokens import TokenFile
from ep_engine.errors import Fault, UserError
from ep_engine.initial import initialise
from ep_engine.mesh import World
from ep_engine.model import Decoder
from ep_engine.parallelize import entries_of
from ep_engine.resolve import resolve
from ep_engine.training.trainer import train
from tests.distributed import run_ranks
from tests.run_cases import NEW_MODEL, losses, moe_model, small_run, train_here, write_text
from tests.small_models import dense_folder, moe_checkpoint, run_tool

GOLDEN = Path(__file__).parent / "golden" / "losses.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files, a MoE model, and a profile of it."""
    folder = write_text(tmp_path_factory.mktemp("runs"))
    moe_model(folder)
    counts = torch.randint(1, 99, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    counts = (counts + counts.transpose(1, 2)).numpy()
    Profile(counts, counts.sum(axis=2), 2, {}).save(folder / "profile.npz")
    return folder


def moe_sections(folder: Path, rule: str = "topk", **others: dict[str, Any]) -> dict[str, dict[str, Any]]:
    routing = {"rule": rule} if rule == "topk" else {"rule": rule, "top_t": 3, "profile": str(folder / "profile.npz")}
    return {"model": {"checkpoint": str(folder / "moe")}, "routing": routing, **others}


@pytest.mark.parametrize("kind", ["dense", "topk", "c2r"])
def test_twenty_steps_give_the_golden_losses(kind: str, folder: Path) -> None:
    """To 1e-4, because processors differ. The file is made by WRITE_GOLDEN=1 pytest tests/test_trainer.py -k golden."""
    sections = {} if kind == "dense" else moe_sections(folder, kind)
    config = small_run(folder, f"golden-{kind}", **sections, train={"steps": 20, "learning_rate": 3e-3})
    summary = train_here(config, overwrite=True)
    found = [*losses(config), summary["heldout_loss"]]
    if os.environ.get("WRITE_GOLDEN"):
        _write_golden(kind, found)
    golden = json.loads(GOLDEN.read_text())[kind]
    assert len(found) == len(golden) == 21
    assert found == pytest.approx(golden, rel=1e-4)
    assert found[-2] < found[0] - 0.15


def test_a_step_is_that_of_torch(folder: Path) -> None:
    """A dense model, its gradient clipped to a tenth of its norm, by torch's own clipping and AdamW."""
    train_of = {"steps": 1, "warmup_steps": 0, "clip_grad_norm": 0.1, "weight_decay": 0.2, "beta2": 0.9}
    config = small_run(folder, "one-step", train=train_of)
    run = resolve(config, 1)
    batch, model = run.blend().read(run.blend().ahead(config.data.batch_size)), Decoder(run.model)
    initialise(entries_of([model]), run.model, config.train.seed)
    train_here(config)
    loss = F.cross_entropy(model(batch.inputs_BS).flatten(0, 1), batch.targets_BS.flatten())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    matrices, others = ([p for p in model.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=config.train.learning_rate, betas=(0.9, 0.9)).step()
    line = json.loads((config.output.folder / "metrics.jsonl").read_text())
    assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert float(norm) > 1
    after = open_source(config.output.folder / "checkpoints/step_000001").tensors
    for name, weight in model.named_parameters():
        torch.testing.assert_close(after[name], weight.detach(), rtol=1e-5, atol=1e-6)


def _write_golden(kind: str, found: list[float]) -> None:
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    GOLDEN.write_text(json.dumps(golden | {kind: found}, indent=1) + "\n")


# Ranks, expert-parallel size, routing rule, and what else is set; `train` for the one process too.
LAYOUTS: dict[str, tuple[int, int, str, dict[str, dict[str, Any]]]] = {
    "dp2": (2, 1, "topk", {}),
    "dp2, weights gathered again": (2, 1, "topk", {"parallel": {"reshard_after_forward": True}}),
    "ep2": (2, 2, "topk", {}),
    "ep2 per expert": (2, 2, "topk", {"moe": {"combine": "per_expert"}}),
    "ep2 fixed rows": (2, 2, "topk", {"moe": {"fixed_rows": 64}}),
    "ep2 c2r": (2, 2, "c2r", {}),
    "edp2 ep2": (4, 2, "topk", {}),
    "edp2 ep2, weights gathered again": (4, 2, "topk", {"parallel": {"reshard_after_forward": True}}),
    "edp2 ep2 in parts": (4, 2, "topk", {"train": {"micro_batches": 2}}),
    "ep2 in parts": (2, 2, "c2r", {"train": {"micro_batches": 4}}),
    "ep4": (4, 4, "topk", {}),
    "etp2": (2, 1, "topk", {"parallel": {"expert_tensor_parallel_size": 2}}),
    "ep2 etp2": (4, 2, "c2r", {"parallel": {"expert_tensor_parallel_size": 2}}),
    "edp2 etp2 tp2, per expert": (
        4,
        1,
        "topk",
        {"parallel": {"expert_tensor_parallel_size": 2, "tensor_parallel_size": 2}, "moe": {"combine": "per_expert"}},
    ),
    "tp2": (2, 1, "topk", {"parallel": {"tensor_parallel_size": 2}}),
    "tp2 ep2": (2, 2, "c2r", {"parallel": {"tensor_parallel_size": 2}}),
    "tp2 dp2 ep4": (4, 4, "topk", {"parallel": {"tensor_parallel_size": 2}}),
    "tp2 dp2 ep2, weights gathered again": (
        4,
        2,
        "topk",
        {"parallel": {"tensor_parallel_size": 2, "reshard_after_forward": True}, "train": {"micro_batches": 2}},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_losses_of_one_process(layout: str, folder: Path) -> None:
    world_size, ep_size, rule, others = LAYOUTS[layout]
    name = layout.replace(" ", "-")
    train = {"train": {"steps": 10, **others.get("train", {})}}
    single = small_run(folder, f"one-{name}", **moe_sections(folder, rule, **train))
    train_here(single)
    parallel = {"expert_parallel_size": ep_size, **others.get("parallel", {})}
    sections = moe_sections(folder, rule, parallel=parallel, moe=others.get("moe", {}), **train)
    config = small_run(folder, f"many-{name}", **sections)
    run_ranks(_train, config, world_size=world_size)
    assert losses(config) == pytest.approx(losses(single), rel=1e-5)
    one, many = (open_source(c.output.folder / "checkpoints/step_000010").tensors for c in (single, config))
    for weight, tensor in one.items():
        # Adam divides by the root of tiny second moments, which enlarges the last bits of a gradient.
        torch.testing.assert_close(many[weight], tensor, rtol=1e-3, atol=1e-4)
    summaries = [json.loads((c.output.folder / "summary.json").read_text()) for c in (single, config)]
    assert summaries[1]["heldout_loss"] == pytest.approx(summaries[0]["heldout_loss"], rel=1e-5)
    assert summaries[1]["load_max_over_mean"] == summaries[0]["load_max_over_mean"]
    assert summaries[0]["ledger"]["bytes_per_token"]["total"] == 0
    assert summaries[1]["changed_share"] == summaries[0]["changed_share"]
    profiles = [read_profile(c.output.folder / "profile.npz") for c in (single, config)]
    assert (profiles[0].counts == profiles[1].counts).all()
    moving = ep_size * parallel.get("expert_tensor_parallel_size", 1) > 1
    assert (summaries[1]["ledger"]["bytes_per_token"]["total"] > 0) == moving


# Ranks and sizes, with two experts: fewer on a rank than ranks have the same, so that each has a slice of every one.
SLICED: dict[str, tuple[int, dict[str, Any]]] = {
    "edp4": (4, {}),
    "edp2 ep2, gathered again": (4, {"expert_parallel_size": 2, "reshard_after_forward": True}),
    "edp2 ep2 etp2 tp2": (
        8,
        {"expert_parallel_size": 2, "expert_tensor_parallel_size": 2, "tensor_parallel_size": 2},
    ),
}


@pytest.mark.parametrize("name", SLICED)
def test_slices_of_experts_train_and_go_on_elsewhere_like_whole_ones(name: str, folder: Path) -> None:
    if not (folder / "two").exists():
        moe_checkpoint(folder / "two", folder / "dense", num_experts=2, top_k=1)
    world_size, parallel = SLICED[name]
    at = f"sliced-{name.replace(' ', '-')}"
    sections: dict[str, Any] = {
        "model": {"checkpoint": str(folder / "two")},
        "train": {"steps": 8, "save_every": 4, "micro_batches": 2 if world_size < 8 else 1},
    }
    single = small_run(folder, f"{at}-one", **sections)
    train_here(single)
    config = small_run(folder, at, **sections, parallel=parallel)
    run_ranks(_train, config, world_size=world_size)
    assert losses(config) == pytest.approx(losses(single), rel=1e-5)
    one, many = (open_source(c.output.folder / "checkpoints/step_000008").tensors for c in (single, config))
    for weight, tensor in one.items():
        torch.testing.assert_close(many[weight], tensor, rtol=1e-3, atol=1e-4)
    (config.output.folder / "checkpoints/step_000008").rename(folder / f"{at}-away")
    train_here(small_run(folder, at, **sections, output={"resume": True}))  # moments come from the slices too
    assert losses(config) == pytest.approx(losses(single), rel=1e-5)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, {}),
        (2, {"expert_parallel_size": 2}),
        (4, {"expert_parallel_size": 2, "reshard_after_forward": True}),
        (4, {"expert_parallel_size": 4, "tensor_parallel_size": 2}),
    ],
)
def test_what_is_computed_again_has_the_same_bits(
    world_size: int, parallel: dict[str, Any], recompute: str, folder: Path
) -> None:
    configs = []
    for what in ("none", recompute):
        name = f"{recompute}-{world_size}-{len(parallel)}-{'tensor_parallel_size' in parallel}-{what}"
        train = {"steps": 3, "recompute": what, "micro_batches": 2}
        config = small_run(folder, name, **moe_sections(folder, "c2r", parallel=parallel), train=train)
        run_ranks(_train, config, world_size=world_size)
        configs.append(config)
    assert losses(configs[0]) == losses(configs[1])
    kept = [read_manifest(config.output.folder / "checkpoints/step_000003")["checksums"] for config in configs]
    assert kept[0] == kept[1]
    ledgers = [json.loads((config.output.folder / "summary.json").read_text())["ledger"] for config in configs]
    assert ledgers[0]["devices_per_token"] == ledgers[1]["devices_per_token"]
    sent = [ledger["bytes_per_token"] for ledger in ledgers]
    # A layer that is computed again is dispatched again, which the ledger counts.
    assert sent[1]["dispatch"] == sent[0]["dispatch"] * (2 if recompute == "full" else 1)


def test_a_dense_batch_in_parts_is_the_same_step(folder: Path) -> None:
    whole, parts = (small_run(folder, f"parts-{n}", train={"steps": 6, "micro_batches": n}) for n in (1, 4))
    for config in (whole, parts):
        train_here(config)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-6)


DENSE: dict[str, dict[str, Any]] = {
    "untied": {},
    "head is the embedding": {"tie_embeddings": True},
    "with biases": {"attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_model_in_tensor_parallel_is_that_of_one_process(name: str, folder: Path) -> None:
    stem = name.replace(" ", "-")
    model = DENSE[name]
    if name == "with biases":
        source = dense_folder(folder / stem, **model)
        assert run_tool("convert", source, folder / f"{stem}-engine") == 0
        model = {"checkpoint": str(folder / f"{stem}-engine")}
    single, split = (
        small_run(folder, f"{stem}-tp{tp}", model=model, train={"steps": 6}, parallel={"tensor_parallel_size": tp})
        for tp in (1, 2)
    )
    train_here(single)
    run_ranks(_train, split, world_size=4)
    assert losses(split) == pytest.approx(losses(single), rel=1e-5)
    one, two = (open_source(c.output.folder / "checkpoints/step_000006").tensors for c in (single, split))
    for weight, tensor in one.items():
        torch.testing.assert_close(two[weight], tensor, rtol=1e-3, atol=1e-4)
    norms = [json.loads(line)["grad_norm"] for c in (single, split) for line in _lines(c)]
    assert norms[:3] == pytest.approx(norms[3:], rel=1e-5)


def _lines(config: RunConfig) -> list[str]:
    return (config.output.folder / "metrics.jsonl").read_text().splitlines()


def _train(rank: int, world_size: int, config: Any) -> None:
    train_here(config, rank, world_size)


@pytest.mark.parametrize("tp", [1, 2])
def test_bfloat16_learns_and_keeps_float32_weights(tp: int, folder: Path) -> None:
    parallel = {"expert_parallel_size": 2, "tensor_parallel_size": tp}
    train = {"steps": 20, "learning_rate": 3e-3, "dtype": "bfloat16"}
    config = small_run(folder, f"bf16-{tp}", **moe_sections(folder, parallel=parallel), train=train)
    run_ranks(_train, config, world_size=2)
    assert losses(config)[-1] < losses(config)[0] - 0.15
    golden = json.loads(GOLDEN.read_text())["topk"]
    assert losses(config) == pytest.approx(golden[:-1], rel=0.02)  # bfloat16 keeps 8 bits
    tensors = open_source(config.output.folder / "checkpoints/step_000020").tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


REPEATED: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "ep2": (2, {"expert_parallel_size": 2}),
    "edp2 x ep2, weights gathered again": (4, {"expert_parallel_size": 2, "reshard_after_forward": True}),
    "tp2 x ep2": (2, {"tensor_parallel_size": 2, "expert_parallel_size": 2}),
    "ep2 x etp2": (4, {"expert_parallel_size": 2, "expert_tensor_parallel_size": 2}),
}


@pytest.mark.parametrize("name", REPEATED)
def test_a_run_repeated_or_resumed_in_the_same_layout_has_the_same_bits(name: str, folder: Path) -> None:
    world_size, parallel = REPEATED[name]
    stem = name.replace(" ", "-").replace(",", "")

    def run(which: str, *, resume: bool = False) -> tuple[list[float], dict[str, str]]:
        sections = moe_sections(folder, "c2r", parallel=parallel)
        train = {"steps": 6, "save_every": 3, "micro_batches": 2}
        config = small_run(folder, f"{stem}-{which}", **sections, train=train, output={"resume": resume})
        run_ranks(_train, config, world_size=world_size)
        return losses(config), read_manifest(config.output.folder / "checkpoints/step_000006")["checksums"]

    whole = run("whole")
    assert run("again") == whole
    (folder / f"{stem}-again/checkpoints/step_000006").rename(folder / f"{stem}-forgotten")
    assert run("again", resume=True) == whole  # three steps from the first run, three from the second


# Ranks and sizes of a run, and of the one that goes on with it.
MOVES = {
    "one process to ep4": ((1, {}), (4, {"expert_parallel_size": 4})),
    "ep2 x etp2 to tp2 x ep4": (
        (4, {"expert_parallel_size": 2, "expert_tensor_parallel_size": 2}),
        (4, {"tensor_parallel_size": 2, "expert_parallel_size": 4}),
    ),
    "one process to etp2": ((1, {}), (2, {"expert_tensor_parallel_size": 2})),
    "tp2 x ep2 to one process": ((2, {"tensor_parallel_size": 2, "expert_parallel_size": 2}), (1, {})),
    "edp2 x ep2 to tp2 x dp2 x ep4": (
        (4, {"expert_parallel_size": 2}),
        (4, {"tensor_parallel_size": 2, "expert_parallel_size": 4}),
    ),
}


@pytest.mark.parametrize("name", MOVES)
def test_resuming_in_another_layout_goes_on_with_the_same_losses(name: str, folder: Path) -> None:
    at = folder / name.replace(" ", "-")
    whole = small_run(folder, f"{at.name}-whole", **moe_sections(folder), train={"steps": 8, "save_every": 4})
    train_here(whole)
    for i, (world_size, parallel) in enumerate(MOVES[name]):
        sections = moe_sections(folder, parallel=parallel)
        train = {"steps": 8, "save_every": 4}
        config = small_run(folder, at.name, **sections, train=train, output={"resume": i == 1})
        run_ranks(_train, config, world_size=world_size)
        if i == 0:
            (at / "checkpoints/step_000008").rename(folder / f"{at.name}-away")
    assert losses(config) == pytest.approx(losses(whole), rel=1e-5)  # every step once
    assert json.loads((at / "summary.json").read_text())["first_step"] == 4
    assert sorted(path.name for path in at.glob("*.toml")) == ["run.from-4.toml", "run.toml"]


def test_only_the_newest_checkpoints_stay(folder: Path) -> None:
    config = small_run(folder, "kept", train={"steps": 7, "save_every": 2}, output={"keep_checkpoints": 2})
    train_here(config)
    kept = config.output.folder / "checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == ["step_000006", "step_000007"]
    assert newest(config.output.folder) == kept / "step_000007"


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(folder: Path) -> None:
    config = small_run(folder, "nan", train={"steps": 40, "learning_rate": 1e19, "warmup_steps": 2, "save_every": 1})
    with pytest.raises(Fault, match=r"^step \d+: the loss is (nan|inf) .* lower train.learning_rate$") as caught:
        train_here(config)
    assert caught.value.everywhere
    checkpoints = sorted((config.output.folder / "checkpoints").iterdir())
    assert checkpoints
    assert all(tensor.isfinite().all() for tensor in open_source(checkpoints[0]).tensors.values())
    assert not (config.output.folder / "summary.json").exists()


class LosingTokens(TokenFile):
    """Text whose reader dies, or says nothing any more, on its third batch."""

    reads, silent = 0, False

    def read(self, start: int, count: int) -> Any:
        self.reads += 1
        if self.reads > 2 * 8 // 2:  # rows of two batches
            time.sleep(20 if self.silent else 0)
            os._exit(0)  # without a word, and so that only what the others do counts
        return super().read(start, count)


LOST: dict[str, dict[str, Any]] = {
    "dp2": {},
    "pp2": {"parallel": {"pipeline_parallel_size": 2}, "train": {"micro_batches": 2}},
    "pp2 zbv": {"parallel": {"pipeline_parallel_size": 2, "pipeline_schedule": "zbv"}, "train": {"micro_batches": 2}},
}


@pytest.mark.parametrize("how", ["dead", "silent"])
@pytest.mark.parametrize("layout", LOST)
def test_a_rank_that_is_lost_is_a_fault_on_the_others(layout: str, how: str, folder: Path) -> None:
    name = f"{how}-{layout}".replace(" ", "-")
    sections = {key: dict(values) for key, values in LOST[layout].items()}
    sections["train"] = {"steps": 6, **sections.get("train", {})}
    sections["parallel"] = {"timeout_s": 4.0 if how == "silent" else 60.0, **sections.get("parallel", {})}
    config = small_run(folder, name, model=NEW_MODEL | {"num_layers": 4}, **sections)
    run_ranks(_lose_a_rank, config, folder / f"{name}.txt", how == "silent", world_size=2, dying=frozenset({1}))
    assert (folder / f"{name}.txt").read_text().startswith("rank 0 of 2 in group world: step 3 did not finish (")


def _lose_a_rank(rank: int, world_size: int, config: RunConfig, words: Path, silent: bool) -> None:
    run = resolve(config, world_size)
    if rank == 1:
        tokens = LosingTokens(config.data.train)
        tokens.silent = silent
        if config.parallel.pipeline_parallel_size > 1:
            tokens.reads = -8  # it has all rows there, not half of them
        train(replace(run, train={"all": tokens}), World(rank=rank, size=world_size))
    started = time.monotonic()
    with pytest.raises(Fault, match="a peer died or hangs, look at the first rank that failed") as caught:
        train(run, World(rank=rank, size=world_size))
    assert time.monotonic() - started < 18  # two steps and the time-out; the silent rank still sleeps
    words.write_text(str(caught.value))


OTHERS = {
    "train.seed": r"^train\.seed is 0 on rank 0 and 7 on rank 1; start all ranks with the same run file, overrides and",
    "model": r"^the model \(crc32\) is \d+ on rank 0 and \d+ on rank 1; start all ranks with the same run file,",
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_rank_with_other_settings_is_refused_by_all(other: str, folder: Path) -> None:
    run_ranks(_start_otherwise, small_run(folder, f"others-{other}", **moe_sections(folder)), other)


def _start_otherwise(rank: int, world_size: int, config: RunConfig, other: str) -> None:
    if rank == 1 and other == "train.seed":
        config = config.model_copy(update={"train": config.train.model_copy(update={"seed": 7})})
    run = resolve(config, world_size)
    if rank == 1 and other == "model":  # a file of the same name, but not the same on the two nodes
        run = replace(run, model=run.model.model_copy(update={"rope_theta": 5.0}))
    dist.barrier()
    with pytest.raises(UserError, match=OTHERS[other]):
        train(run, World(rank=rank, size=world_size))
    assert not run.config.output.folder.exists()


def test_a_full_disk_during_a_save_keeps_the_checkpoint_before(folder: Path) -> None:
    first = small_run(folder, "full", train={"steps": 2, "save_every": 2})
    train_here(first)
    before = {path: path.read_bytes() for path in (folder / "full/checkpoints/step_000002").rglob("*.distcp")}
    config = small_run(folder, "full", train={"steps": 4}, output={"resume": True})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(Fault, match="no room to write"):
            train_here(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (folder / "full/checkpoints").iterdir()] == ["step_000002"]
    assert {path: path.read_bytes() for path in before} == before


def test_token_ids_outside_the_vocabulary_are_refused(folder: Path) -> None:
    config = small_run(folder, "vocabulary", model={"vocab_size": 40})
    with pytest.raises(ValueError, match=r"train.bin holds id \d+ at position \d+, outside \[0, 40\)"):
        train_here(config)
