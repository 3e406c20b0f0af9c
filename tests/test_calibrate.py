"""Score scales by layer: with them a layer adds as much to its residual stream as the dense one did."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoint_tools.documents import blocks, documents
from checkpoint_tools.source import open_source
from ep_engine.model import Decoder
from ep_engine.parallelize import entries_of
from tests.small_models import moe_checkpoint, run_tool
from tests.texts import text_model, write_documents


def gaps(folder: Path, rows: Tensor) -> list[float]:
    """mean |residual| / mean |FFN output| of every layer, seen by hooks on the engine's own model."""
    source = open_source(folder)
    model = Decoder(source.config).eval()
    for name, shard in entries_of([model]).items():
        shard.tensor.copy_(source.tensors[name])
    found: dict[int, list[float]] = {i: [] for i in range(2)}
    for i, layer in model.decoder_layers().items():
        layer.ffn_norm.register_forward_pre_hook(lambda _m, given, i=i: found[i].append(float(given[0].abs().mean())))
        ffn = layer.moe if layer.is_moe else layer.ffn
        ffn.register_forward_hook(
            lambda _m, _g, out, i=i: found[i].append(float((out[0] if isinstance(out, tuple) else out).abs().mean()))
        )
    with torch.no_grad():
        model(rows)
    return [residual / output for residual, output in found.values()]


def test_a_calibrated_layer_adds_as_much_as_the_dense_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, corpus = text_model(tmp_path), write_documents(tmp_path / "corpus")
    moe = moe_checkpoint(tmp_path / "moe", dense)
    given = ("--corpus", corpus, "--max-tokens", 320, "--sequence-length", 32)
    texts = (document.text for document in documents([corpus]))
    rows = torch.stack(list(blocks(texts, dense, 32))[:10])
    wanted, before = gaps(dense, rows), gaps(moe, rows)
    assert run_tool("calibrate", moe, dense, *given, "--json") == 0
    scales = json.loads(capsys.readouterr().out)["score_scale"]
    config = open_source(moe).config
    assert config.moe is not None
    assert config.moe.score_scale == scales
    assert gaps(moe, rows) == pytest.approx(wanted, rel=1e-4)
    assert before != pytest.approx(wanted, rel=0.1)
    assert run_tool("export", moe, tmp_path / "hf") == 0
    assert run_tool("verify", moe, tmp_path / "hf") == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["score_scale_factor"] == scales


def test_what_cannot_be_calibrated_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, corpus = text_model(tmp_path), write_documents(tmp_path / "corpus")
    moe = moe_checkpoint(tmp_path / "moe", dense)
    for folders, more, sentence in (
        ((dense, dense), (), "must be an engine checkpoint with experts"),
        ((moe, moe), (), "and .* a dense model"),
        ((moe, dense), (), "longer than the model's positions (128)"),
        ((moe, dense), ("--max-tokens", 8, "--sequence-length", 64), "is less than one row of --sequence-length (64)"),
    ):
        assert run_tool("calibrate", *folders, "--corpus", corpus, *more) == 2
        message = capsys.readouterr().err
        assert sentence.split(".*")[0] in message
