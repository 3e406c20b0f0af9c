"""MFU: operations against torch's own count and against what `plan` counts; a peak that says where it is from."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ep_engine.model import Decoder
from ep_engine.model_config import ModelConfig, MoEConfig, read_model_config
from ep_engine.planning.activations import Part
from ep_engine.planning.expert_traffic import Passed
from ep_engine.planning.work import ATTENTION_PASSES, PASSES, of_experts, of_head, of_layer
from ep_engine.training.mfu import activated_parameters, flops_of_token, peak_of
from tests.run_cases import small_run, train_here, write_text

DENSE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "intermediate_size": 80,
}
MOE: dict[str, Any] = {"num_experts": 8, "top_k": 3, "expert_hidden_size": 24, "shared_hidden_size": 40}


def test_a_dense_model_needs_what_torch_counts() -> None:
    rows, length = 2, 32
    model = Decoder(ModelConfig(**DENSE))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    with FlopCounterMode(display=False) as counted:
        model(torch.zeros(rows, length, dtype=torch.int64)).sum().backward()
    products = sum(n for op, n in counted.get_flop_counts()["Global"].items() if "attention" not in str(op))
    # The first layer's input is an embedding with a gradient, so nothing is left out.
    assert products == 6 * activated_parameters(model.config) * rows * length
    attention = 12 * (length / 2) * 3 * 64 * rows * length
    assert flops_of_token(model.config, length) * rows * length == products + attention


@pytest.mark.parametrize("gate", [{"gate": "linear"}, {"gate": "mlp"}, {"gate": "cosine", "gate_hidden_size": 16}])
def test_experts_need_what_the_plan_counts(gate: dict[str, Any], tmp_path: Path) -> None:
    """`work.py` counts for one rank what is computed, attention's backward included, which computes scores again."""
    model = ModelConfig(**DENSE, moe=MoEConfig(**MOE, **gate), dense_layers={1: 80})
    config = small_run(tmp_path, "run", data={"sequence_length": 32, "batch_size": 4})
    part, tokens = Part(config, model, dp_size=1), 4 * 32
    passed = Passed(rows=tokens, copies=3 * tokens, width=3, sent=0)
    total = of_head(part).dense
    for layer in range(3):
        moe = model.moe_of(layer)
        kept = part.layer(layer, passed if moe else None)
        work = of_layer(part, layer, kept)
        total += work.dense + work.attention * PASSES / ATTENTION_PASSES
        total += of_experts(part, passed, kept).experts if moe else 0
    assert flops_of_token(model, 32) * tokens == pytest.approx(total, rel=1e-12)


def test_what_a_window_hides_is_not_needed() -> None:
    whole, narrow = (flops_of_token(ModelConfig(**DENSE, sliding_window=w), 64) for w in (None, 16))
    # 64 positions see 32 on average; in a window of 16 all but the first 16 see 16.
    assert whole - narrow == 12 * (32 - 14) * 3 * 64
    assert flops_of_token(ModelConfig(**DENSE, sliding_window=100), 64) == whole


def test_a_cpu_is_measured_once_and_says_so() -> None:
    before = time.perf_counter()
    peak = peak_of(torch.device("cpu"), torch.float32)
    assert time.perf_counter() - before < 1
    assert peak.source == f"measured product of 1024 x 1024, float32, {torch.get_num_threads()} threads"
    assert peak.tflops > 1e-4
    before = time.perf_counter()
    assert peak_of(torch.device("cpu"), torch.float32) is peak
    assert time.perf_counter() - before < 0.01


def test_a_line_says_the_share_and_of_what(tmp_path: Path) -> None:
    config = small_run(write_text(tmp_path), "run", train={"steps": 2})
    train_here(config)
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    model = read_model_config(tmp_path / "run" / "checkpoints" / "step_000002" / "model.json")
    needed = flops_of_token(model, 16) * line["tokens_per_second_per_rank"]
    assert line["mfu"] == pytest.approx(needed / (line["peak_tflops"] * 1e12))
    assert line["peak"].startswith("measured product of 1024 x 1024, float32, ")
