"""The runs of launch/configs: each can be read, and the published recipes say what was published."""

from pathlib import Path

import pytest

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


def test_phases_of_a_condensed_model_follow_each_other_and_train_the_same() -> None:
    first, second = (load_config(path) for path in CONFIGS if path.stem in ("cd_moe_lm", "cd_moe_sft"))
    assert second.model.checkpoint == first.output.folder / f"checkpoints/step_{first.train.steps:06d}"
    assert second.train.trainable == "condensed-experts"
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
