"""Routing traces: read and refused, and drawn under the rule of the model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ep_engine.c2r.collaboration import Profile
from ep_engine.errors import UserError
from ep_engine.model_config import ModelConfig, MoEConfig, RoutingConfig
from ep_engine.planning.routing_trace import draw_routing, read_trace, save_trace
from tests.small_models import routing_tables

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "intermediate_size": 48}


def model(rule: str = "topk", top_k: int = 2) -> ModelConfig:
    routing = RoutingConfig(**routing_tables(rule))
    return ModelConfig(
        num_layers=2, moe=MoEConfig(num_experts=8, top_k=top_k, expert_hidden_size=6, routing=routing), **SIZES
    )


def test_a_trace_is_read_as_it_was_written_up_to_the_tokens_of_a_step(tmp_path: Path) -> None:
    ids = draw_routing(model(), 10, seed=1)
    save_trace(tmp_path / "t.npz", ids.numpy())
    found, what = read_trace(tmp_path / "t.npz", model(), 7, seed=0)
    assert torch.equal(found, ids[:, :7])
    assert what == f"trace {tmp_path / 't.npz'}"


def test_small_integers_will_do(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", ids=np.array([[[0, 7]], [[3, 1]]], dtype=np.uint8))
    assert read_trace(tmp_path / "t.npz", model(), 1, seed=0)[0].tolist() == [[[0, 7]], [[3, 1]]]


def ids_of(change: Callable[[Any], Any]) -> Any:
    return change(draw_routing(model(), 4, seed=0).numpy())


def _set(value: int) -> Callable[[Any], Any]:
    def change(ids: Any) -> Any:
        ids[1, 2] = [value, 3]
        return ids

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda ids: ids[:1],
            r"must have integers `ids` of \(2 layers, tokens, 2 experts\), got \(1, 4, 2\) of torch.int16",
        ),
        (lambda ids: ids[:, :, :1], r"got \(2, 4, 1\)"),
        (lambda ids: ids[0], r"got \(4, 2\)"),
        (lambda ids: ids.astype(np.float32), r"of torch.float32; trace this model$"),
        (lambda ids: ids[:, :3], r"has 3 tokens, a step of the run has 4 .*trace more, or plan a smaller batch$"),
        (_set(8), r"names expert 8, the model has 8; trace this model$"),
        (_set(-1), r"names expert -1"),
        (_set(3), r"names an expert twice for one token"),
    ],
)
def test_what_is_no_trace_of_the_model_is_refused(change: Callable[[Any], Any], sentence: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", ids=ids_of(change))
    with pytest.raises(UserError, match=sentence):
        read_trace(tmp_path / "t.npz", model(), 4, seed=0)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trace .*none.npz cannot be read .*; give an .npz with `ids` \(L, T, K\)$"):
        read_trace(tmp_path / "none.npz", model(), 4, seed=0)
    (tmp_path / "text.npz").write_text("ids")
    with pytest.raises(UserError, match=r"trace .*text.npz cannot be read"):
        read_trace(tmp_path / "text.npz", model(), 4, seed=0)


def profile(tmp_path: Path, load: list[int]) -> Path:
    counts = np.ones((2, len(load), len(load)), dtype=np.int64)
    Profile(counts, np.array([load, load]), 2, {}).save(tmp_path / "p.npz")
    return tmp_path / "p.npz"


def test_first_choices_have_the_loads_of_a_profile(tmp_path: Path) -> None:
    path = profile(tmp_path, [40, 20, 10, 10, 10, 5, 4, 1])
    ids, what = read_trace(path, model(top_k=1), 20_000, seed=3)
    assert what == f"drawn with the loads of profile {path}, seed 3"
    share = torch.bincount(ids[0, :, 0], minlength=8) / 20_000
    # 20,000 draws: three deviations of a share of 0.4 are 0.01
    torch.testing.assert_close(share, torch.tensor([40, 20, 10, 10, 10, 5, 4, 1]) / 100, rtol=0, atol=0.011)


def test_a_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="has 2 layers of 4 experts, the model 2 layers of 8 experts; profile this model"
    ):
        read_trace(profile(tmp_path, [1, 1, 1, 1]), model(), 4, seed=0)


def test_a_large_step_repeats_what_is_drawn() -> None:
    ids = draw_routing(model(), (1 << 16) + 5, seed=0)
    assert ids.shape == (2, (1 << 16) + 5, 2)
    assert torch.equal(ids[:, 1 << 16 :], ids[:, :5])


def test_drawn_routing_is_uniform_repeats_and_keeps_the_rule() -> None:
    ids = draw_routing(model(), 20_000, seed=0)
    load = torch.bincount(ids[1].flatten(), minlength=8) / 20_000
    torch.testing.assert_close(load, torch.full((8,), 2 / 8), rtol=0, atol=0.011)  # as above
    assert torch.equal(ids, draw_routing(model(), 20_000, seed=0))
    assert not torch.equal(ids, draw_routing(model(), 20_000, seed=1))
    grouped = model("c2r_grouped")
    assert grouped.moe is not None
    assert grouped.moe.routing.device_of_expert is not None
    device = torch.tensor(grouped.moe.routing.device_of_expert)
    for layer, of_layer in enumerate(draw_routing(grouped, 500, seed=0)):
        devices = device[layer][of_layer.long()]
        assert (devices[:, 0] == devices[:, 1]).all()
