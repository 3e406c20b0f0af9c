"""Condensed models where they run: in every layout of ranks, out of every family, and resumed with other weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from checkpoint_tools.condense.published_json import Shape, read_weights, write_json
from checkpoint_tools.source import open_source
from ep_engine.config import RunConfig
from ep_engine.data.batches import Batch
from ep_engine.mesh import World, process_groups
from ep_engine.resolve import resolve
from ep_engine.training.trainer import Trainer
from tests.condense_cases import KINDS, condensable, condense_by_hand, corpus, moe_blocks, plain_forward
from tests.distributed import run_ranks
from tests.family_cases import MOLLAMA, plain_folder
from tests.run_cases import small_run, write_text
from tests.small_models import edit_json, run_tool
from tests.test_hf_modeling import load
from tests.test_shared_expert import LAYOUTS
from tests.texts import VOCABULARY, add_tokenizer

CPU = torch.device("cpu")
TOKENS = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
WAYS = {"folded": (), "kept": ("--keep-scales",)}


def files(folder: Path, model: Path) -> tuple[Any, ...]:
    """Arguments of `apply`: weights as counted, some lists, and an order; in `folder`."""
    text, weights = ("--corpus", corpus(folder)), ("--weights", folder / "w.json")
    assert run_tool("condense", "weights", model, *text, "--out", folder / "w.json") == 0
    assert run_tool("condense", "experts", model, *text, *weights, "--experts", 2, "--choose", "frequency", "--out",
                    folder / "e.json") == 0  # fmt: skip
    write_json(folder / "o.json", [1, 0])
    return ("--order", folder / "o.json", *weights, "--lists", folder / "e.json", "--experts", 2)


def by_hand(folder: Path, model: Path) -> torch.Tensor:
    """Logits of the plain model with two layers condensed in memory."""
    plain = plain_forward(model, torch.float32)
    means_LE = read_weights(folder / "w.json", Shape.of(open_source(model).config)).means
    lists = json.loads((folder / "e.json").read_text())
    for index in (1, 0):
        experts = lists[str(index)]
        condense_by_hand(moe_blocks(plain)[index][1], experts, means_LE[index, experts].tolist())
    with torch.no_grad():
        logits: torch.Tensor = plain(TOKENS).logits
    return logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of both kinds with 8 experts and two of their layers condensed in both ways, and what they compute."""
    folder = write_text(tmp_path_factory.mktemp("layouts"))
    more: dict[str, dict[str, Any]] = {"deepseek": {"n_routed_experts": 8}, "qwen": {"num_experts": 8, "moe_layers": 4}}
    for kind in KINDS:
        model = condensable(folder / kind, kind, **more[kind])
        given = files(folder / kind, model)
        for way, options in WAYS.items():
            out = folder / kind / way
            assert run_tool("condense", "apply", model, out, "--layers", 2, *given, *options) == 0
        torch.save(by_hand(folder / kind, model), folder / kind / "logits.pt")
    return folder


def _compute(rank: int, world_size: int, configs: dict[str, RunConfig], out: Path) -> None:
    """Logits of some models, all in one layout, of the rows that every rank is given alike."""
    parallel = next(iter(configs.values())).parallel
    runs = {name: resolve(config, world_size) for name, config in configs.items()}
    dist.barrier()
    sizes = {"tp_size": parallel.tensor_parallel_size, "pp_size": parallel.pipeline_parallel_size}
    world = World(rank=rank, size=world_size)
    with process_groups(world, CPU, parallel.expert_parallel_size, 60.0, **sizes) as meshes, torch.no_grad():
        for name, run in runs.items():
            trainer = Trainer(run, meshes, CPU)
            found = trainer.pipeline.forward(Batch(TOKENS, TOKENS, torch.zeros_like(TOKENS)))
            if found is not None:
                torch.save(found.full_tensor() if isinstance(found, DTensor) else found, out / f"{name} {rank}.pt")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_computes_what_the_condensed_model_does_in_memory(
    layout: str, folder: Path, tmp_path: Path
) -> None:
    world_size, parallel = LAYOUTS[layout]
    names = [f"{kind} {way}" for kind in KINDS for way in WAYS]
    configs = {
        name: small_run(folder, f"{name} {layout}", model={"checkpoint": str(folder / name.replace(" ", "/"))},
                        train={"steps": 1, "micro_batches": 2}, parallel=parallel)
        for name in names
    }  # fmt: skip
    run_ranks(_compute, configs, tmp_path, world_size=world_size)
    for name in names:
        wanted, found = torch.load(folder / name.split()[0] / "logits.pt"), list(tmp_path.glob(f"{name} *.pt"))
        assert len(found) == world_size // parallel.get("pipeline_parallel_size", 1)
        for path in found:
            torch.testing.assert_close(torch.load(path), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe_biased", "olmoe"])
def test_a_family_without_shared_experts_is_condensed(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    window: dict[str, Any] = {"sliding_window": None} if kind == "mixtral" else {}
    model, small, hf = condensable(tmp_path, kind, **window), tmp_path / "small", tmp_path / "hf"
    given = ("--layers", 2, *files(tmp_path, model))
    assert run_tool("condense", "apply", model, small, *given) == 0
    assert run_tool("export", small, hf) == 0
    wanted = by_hand(tmp_path, model)
    with torch.no_grad():
        found = load(hf)(TOKENS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    if kind == "mixtral":  # our modeling file has no window
        edit_json(model / "config.json", lambda config: config.update(sliding_window=9))
        assert run_tool("condense", "apply", model, small, *given, "--overwrite") == 0
        assert run_tool("export", small, tmp_path / "no") == 2
        assert "cannot express sliding_window 9 of the model" in capsys.readouterr().err
        assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(("layers", "sentence"), [
    (1, "LlamaForCausalLM cannot express dense_layers"),
    (2, "MoLlama has experts in its layers, this model is dense; choose another family with --family"),
])  # fmt: skip
def test_a_family_that_cannot_say_it_refuses(
    layers: int, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MoLlama's layers with experts are told from the others by where they begin and how often they come."""
    model = plain_folder(tmp_path / "model", {**MOLLAMA, "gate_type": "linear", "vocab_size": VOCABULARY,
                                              "num_experts": 6})  # fmt: skip
    add_tokenizer(model)
    given = ("--layers", layers, *files(tmp_path, model))
    assert run_tool("condense", "apply", model, tmp_path / "small", *given) == 0
    assert run_tool("export", tmp_path / "small", tmp_path / "hf") == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_an_output_is_not_gone_on_with_under_other_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import checkpoint_tools.condense.apply as module

    model, made = condensable(tmp_path, "deepseek"), []
    given = ("condense", "apply", model, tmp_path / "small", "--layers", 2, *files(tmp_path, model))
    scaled = module._scaled

    def stopped(weight: torch.Tensor, factor: float) -> torch.Tensor:
        made.append(factor)
        if len(made) > 6:  # the second of its matrices
            raise KeyboardInterrupt
        return scaled(weight, factor)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_scaled", stopped)
        assert run_tool(*given) != 0
    before = (tmp_path / "w.json").read_text()
    edit_json(tmp_path / "w.json", lambda weights: weights.update(
        {key: [2 * total, count, 2 * mean] for key, (total, count, mean) in weights.items()}
    ))  # fmt: skip
    assert run_tool(*given, "--resume") == 2
    assert "--resume goes on with another options" in capsys.readouterr().err
    (tmp_path / "w.json").write_text(before)
    assert run_tool(*given, "--resume") == 0
