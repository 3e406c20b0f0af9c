"""The runs of launch/configs: each can be read, and the published recipes say what was published."""

from pathlib import Path

import pytest

from ep_engine.balance_losses import losses_of
from ep_engine.config import load_config
from ep_engine.data.blend import domain_weights, reference_losses
from ep_engine.layout import check_ranks

CONFIGS = sorted((Path(__file__).parents[1] / "launch/configs").glob("*.toml"))

# ranks, tokens of a row, rows of a step on a rank at once, accumulated, peak rate, warm-up, weight decay, seed, steps
PUBLISHED = {
    "c2r_lima_qwen": (4, 2048, 8, 2, 2e-5, 10, 0.0, 0, 32),
    "c2r_deita_llama_moe": (4, 2048, 4, 8, 2e-5, 3, 0.0, 12306, 94),
    "mollama_pt": (8, 4096, 1, 1, 5e-5, 0, 0.0, 42, 45),
    "mollama_sft": (8, 4096, 1, 1, 5e-5, 0, 0.0, 42, 6500),
    "llama_moe_cpt": (112, 4096, 8, 4, 2e-4, 100, 0.1, 1227, 13623),
    "cd_moe_lm": (1, 256, 8, 1, 1e-5, 250, 0.01, 0, 1250),
    "cd_moe_sft": (1, 256, 8, 1, 1e-5, 125, 0.01, 0, 1250),
}


# schedule, floor, second moment, rows, top_t; and balance losses: 0.01 of a sum over layers is as many times that here.
SETTINGS = {
    "c2r_lima_qwen": ("cosine", 0.0, 0.999, "padded", 30, {}),
    "c2r_deita_llama_moe": ("cosine", 0.0, 0.999, "padded", 5, {"importance": 0.01 * 32, "load": 0.01 * 32}),
    "mollama_pt": ("linear", 0.0, 0.999, "stream", None, {"mutual_information": 0.01 * 8}),
    "mollama_sft": ("linear", 0.0, 0.999, "padded", None, {"mutual_information": 0.01 * 8}),
    "llama_moe_cpt": ("cosine", 2e-5, 0.95, "stream", None, {"importance": 0.01 * 32, "load": 0.01 * 32}),
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_run_can_be_read(path: Path) -> None:
    config = load_config(path)
    if path.stem in PUBLISHED:
        check_ranks(config, PUBLISHED[path.stem][0])


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_say_what_was_published(name: str) -> None:
    (path,) = [path for path in CONFIGS if path.stem == name]
    data, train = load_config(path).data, load_config(path).train
    ranks, length, rows, accumulated, rate, warmup, decay, seed, steps = PUBLISHED[name]
    assert (data.sequence_length, data.batch_size, train.micro_batches) == (
        length,
        ranks * rows * accumulated,
        accumulated,
    )
    assert (train.learning_rate, train.warmup_steps, train.weight_decay, train.seed) == (rate, warmup, decay, seed)
    assert (train.steps, train.dtype) == (steps, "bfloat16")


@pytest.mark.parametrize("name", SETTINGS)
def test_recipes_have_the_published_settings(name: str) -> None:
    (config,) = [load_config(path) for path in CONFIGS if path.stem == name]
    schedule, floor, beta2, packing, top_t, balance = SETTINGS[name]
    assert (config.train.schedule, config.train.min_learning_rate, config.train.beta2) == (schedule, floor, beta2)
    assert (config.train.beta1, config.train.clip_grad_norm, config.data.packing) == (0.9, 1.0, packing)
    assert (config.routing.rule, config.routing.top_t) == (("c2r", top_t) if top_t else (None, None))
    assert {name: coefficient for name, (coefficient, _) in losses_of(config.balance).items()} == balance
    assert config.balance.noise == ("load" in balance)


def test_phases_of_a_condensed_model_follow_each_other_and_train_the_same() -> None:
    first, second = (load_config(path) for path in CONFIGS if path.stem in ("cd_moe_lm", "cd_moe_sft"))
    assert second.model.checkpoint == first.output.folder / f"checkpoints/step_{first.train.steps:06d}"
    # specs/cd_moe.md 8: torch's AdamW, the Trainer's clipping, a line to a floor; warm-up a fifth, then a tenth.
    train = first.train
    assert (train.trainable, train.schedule, train.min_learning_rate) == ("condensed-experts", "linear", 5e-6)
    assert (train.beta1, train.beta2, train.clip_grad_norm, train.warmup_steps) == (0.9, 0.999, 1.0, train.steps // 5)
    assert second.train == first.train.model_copy(update={"warmup_steps": second.train.steps // 10})
    assert (second.balance, second.data.packing) == (first.balance, "padded")


def test_continued_pretraining_takes_the_weights_of_sheared_llama() -> None:
    (path,) = [path for path in CONFIGS if path.stem == "llama_moe_cpt"]
    dynamic = ("data.heldout_every=170", "data.dynamic_weights=sheared_llama", "data.reference_losses=llama2_7b")
    for overrides in ((), dynamic):
        data = load_config(path, overrides).data
        assert isinstance(data.train, dict)
        weights = dict(zip(data.train, domain_weights(data.weights, tuple(data.train)), strict=True))
        assert (weights["en_cc"], weights["en_c4"], weights["github"]) == (0.361, 0.492, 0.008)
        assert data.batch_size * data.sequence_length == 14_680_064
    assert data.reference_losses is not None
    losses = reference_losses(data.reference_losses, tuple(data.train))
    assert losses[0] == pytest.approx(1.6917, abs=1e-4)
