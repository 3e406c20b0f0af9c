"""New weights: what they are, and that no layout changes them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ep_engine.entries import Shard, expected_entries
from ep_engine.initial import initialise
from ep_engine.model_config import ModelConfig, MoEConfig

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    attention_bias=True,
    moe=MoEConfig(num_experts=4, top_k=2, expert_hidden_size=12),
)
SHAPES = expected_entries(CONFIG)


def initial_weights(seed: int, config: ModelConfig = CONFIG) -> dict[str, Tensor]:
    tensors = {name: torch.full(shape, math.nan) for name, shape in expected_entries(config).items()}
    initialise({name: Shard(tensor, tensor, 0) for name, tensor in tensors.items()}, config, seed)
    return tensors


def test_every_entry_is_filled() -> None:
    for name, tensor in initial_weights(0).items():
        assert tensor.isfinite().all(), name


def test_norms_are_1_and_biases_are_0() -> None:
    weights = initial_weights(0)
    norms = [name for name in weights if name.endswith("norm.weight")]
    biases = [name for name in weights if name.endswith(".bias")]
    assert (len(norms), len(biases)) == (2 * 2 + 1, 2 * 4)
    assert all((weights[name] == 1).all() for name in norms)
    assert all((weights[name] == 0).all() for name in biases)


@pytest.mark.parametrize("spread", [0.02, 0.5])
def test_matrices_have_the_spread_of_the_model(spread: float) -> None:
    weights = initial_weights(0, CONFIG.model_copy(update={"initializer_range": spread}))
    numbers = torch.cat([w.flatten() for w in weights.values() if w.ndim == 2])
    assert len(numbers) > 10_000
    # Of 20,000 draws the standard deviation is known to 0.5 %, and the mean to 0.7 % of it.
    assert float(numbers.std()) == pytest.approx(spread, rel=0.03)
    assert abs(float(numbers.mean())) < 0.03 * spread


def test_every_entry_has_a_stream_of_its_own() -> None:
    weights = initial_weights(0)
    starts = {tuple(tensor.flatten()[:8].tolist()) for tensor in weights.values() if tensor.ndim == 2}
    assert len(starts) == sum(tensor.ndim == 2 for tensor in weights.values())


@pytest.mark.parametrize("seeds", [(0, 1), (0, -1), (1, 2**70)])
def test_another_seed_gives_other_weights_and_the_same_seed_the_same(seeds: tuple[int, int]) -> None:
    one, other, again = initial_weights(seeds[0]), initial_weights(seeds[1]), initial_weights(seeds[0])
    for name, tensor in one.items():
        assert torch.equal(tensor, again[name])
        if tensor.ndim == 2:
            assert (tensor != other[name]).float().mean() > 0.99, name


@given(name=st.sampled_from(sorted(SHAPES)), seed=st.integers(0, 3), data=st.data())
def test_a_part_is_that_part_of_the_whole(name: str, seed: int, data: st.DataObject) -> None:
    shape = SHAPES[name]
    first_row = data.draw(st.integers(0, shape[0]))
    num_rows = data.draw(st.integers(0, shape[0] - first_row))
    part = torch.full((num_rows, *shape[1:]), math.nan)
    initialise({name: Shard(part, part, first_row * math.prod(shape[1:]))}, CONFIG, seed)
    assert torch.equal(part, initial_weights(seed)[name][first_row : first_row + num_rows])


def test_global_random_numbers_play_no_part_and_are_not_used_up() -> None:
    torch.manual_seed(5)
    expected = initial_weights(0)["embed.weight"]
    torch.manual_seed(6)
    state = torch.get_rng_state()
    assert torch.equal(initial_weights(0)["embed.weight"], expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_entry_does_not_depend_on_the_rest_of_the_model() -> None:
    larger = CONFIG.model_copy(
        update={"num_layers": 3, "moe": MoEConfig(num_experts=6, top_k=2, expert_hidden_size=12)}
    )
    weights, more = initial_weights(0), initial_weights(0, larger)
    same = [name for name in weights if "router" not in name]
    assert all(torch.equal(weights[name], more[name]) for name in same)
    assert weights.keys() < more.keys()
