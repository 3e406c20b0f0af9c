"""The keys of a run, pinned; what a TOML file and its overrides may say, and what is refused."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_engine.config import RunConfig, config_table, load_config, make_config, to_toml
from ep_engine.errors import UserError

# A new key needs a reason in DESIGN.md, and 100 are the most there may be.
KEYS = [
    "model.checkpoint", "model.vocab_size", "model.hidden_size", "model.num_layers", "model.num_heads",
    "model.num_kv_heads", "model.intermediate_size", "model.max_position_embeddings", "model.rope_theta",
    "model.tie_embeddings",
    "data.train", "data.weights", "data.when_exhausted", "data.packing", "data.heldout", "data.heldout_every",
    "data.dynamic_weights", "data.reference_losses", "data.tokenizer", "data.sequence_length", "data.batch_size",
    "data.heldout_batches", "data.separate_documents",
    "train.steps", "train.learning_rate", "train.min_learning_rate", "train.schedule", "train.warmup_steps",
    "train.warmup_tokens", "train.decay_steps", "train.gate_learning_rate", "train.trainable", "train.freeze",
    "train.weight_decay", "train.beta1", "train.beta2", "train.clip_grad_norm", "train.skip_steps",
    "train.spike_factor", "train.time_limit_s", "train.seed", "train.dtype", "train.micro_batches", "train.recompute",
    "train.log_every", "train.save_every",
    "parallel.pipeline_parallel_size", "parallel.pipeline_schedule", "parallel.pipeline_layers",
    "parallel.data_parallel_size", "parallel.tensor_parallel_size", "parallel.expert_parallel_size",
    "parallel.expert_tensor_parallel_size", "parallel.reshard_after_forward", "parallel.device", "parallel.timeout_s",
    "moe.combine", "moe.placement", "moe.transport", "moe.fp8_dispatch", "moe.fixed_rows",
    "routing.rule", "routing.top_t", "routing.profile", "routing.max_devices", "routing.num_groups",
    "routing.tighten_steps", "routing.weights",
    "balance.switch", "balance.switch_of", "balance.importance", "balance.load", "balance.sequence",
    "balance.mutual_information", "balance.z", "balance.over", "balance.noise", "balance.gumbel",
    "balance.bias_rate", "balance.capacity_factor", "balance.reference_compat",
    "output.folder", "output.resume", "output.keep_checkpoints", "output.watch", "output.async_save", "output.wandb",
]  # fmt: skip

RAW: dict[str, dict[str, Any]] = {
    "model": {"checkpoint": "moe"},
    "data": {"train": "text/train", "sequence_length": 8, "batch_size": 4},
    "train": {"steps": 10},
    "output": {"folder": "run"},
}
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48}


def changed(**keys: Any) -> dict[str, dict[str, Any]]:
    """RAW with `section__key=value`; None takes the key away."""
    raw = copy.deepcopy(RAW)
    for name, value in keys.items():
        section, key = name.split("__")
        if value is None:
            del raw[section][key]
        else:
            raw.setdefault(section, {})[key] = value
    return raw


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(to_toml(make_config(RAW, "test")))
    return path


def test_keys_are_pinned() -> None:
    assert [key for key, _, _ in config_table()] == KEYS
    assert len(KEYS) == 87
    assert len(KEYS) <= 100


def test_every_key_is_described() -> None:
    assert [key for key, _, description in config_table() if not description] == []
    assert len({description for _, _, description in config_table()}) == len(KEYS)


def test_table_shows_defaults() -> None:
    defaults = {key: default for key, default, _ in config_table()}
    assert [key for key in KEYS if defaults[key] == "required"] == [
        "data.train",
        "data.sequence_length",
        "data.batch_size",
        "train.steps",
        "output.folder",
    ]
    shown = {"model.checkpoint": "", "model.tie_embeddings": "false", "train.dtype": "float32", "train.beta2": "0.95"}
    assert {key: defaults[key] for key in shown} == shown


def test_the_smallest_run_gets_the_defaults() -> None:
    config = make_config(RAW, "test")
    assert (config.model.checkpoint, config.data.train) == (Path("moe"), Path("text/train"))
    assert (config.train.seed, config.train.dtype, config.train.save_every) == (0, "float32", None)
    assert (config.parallel.data_parallel_size, config.parallel.expert_parallel_size) == (None, 1)
    assert (config.moe.combine, config.routing.rule, config.output.resume) == ("per_device", None, False)


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key, near one": (changed(train__stepps=3), r"^unknown key train\.stepps; did you mean train\.steps\?$"),
    "unknown key, near none": (
        changed(moe__zzz=1),
        r"^unknown key moe\.zzz; known are combine, placement, transport, fp8_dispatch, fixed_rows$",
    ),
    "unknown section, near one": (
        {**RAW, "paralel": {"expert_parallel_size": 2}},
        r"^unknown key paralel; did you mean parallel\?$",
    ),
    "unknown section, near none": ({**RAW, "zzz": {}}, "^unknown key zzz; known are model, data, train, parallel, moe"),
    "no section": ({**RAW, "train": 3}, r"^file\.toml: train must be a section with keys, got 3; write \[train\]$"),
    "missing section": ({k: v for k, v in RAW.items() if k != "output"}, r"^file\.toml: .*\boutput\b"),
    "missing key": (changed(data__train=None), r"^file\.toml: .*\bdata\.train\b"),
    "out of range": (
        changed(train__steps=0),
        r"train\.steps: Input should be greater than or equal to 1, got 0; correct the value$",
    ),
    "beta of 1": (changed(train__beta2=1.0), r"train\.beta2: Input should be less than 1, got 1\.0"),
    "negative rate": (changed(train__learning_rate=-1e-3), r"train\.learning_rate: .* greater than 0, got -0\.001"),
    "not a number": (changed(train__learning_rate=math.nan), r"train\.learning_rate: .*, got nan"),
    "no time to wait": (changed(parallel__timeout_s=0.0), r"parallel\.timeout_s: .* greater than 0, got 0\.0"),
    "no end of waiting": (changed(parallel__timeout_s=math.inf), r"parallel\.timeout_s: .*, got inf"),
    "minimum above the peak": (  # such as the default minimum for a small peak
        changed(train__learning_rate=5e-5),
        r"train\.min_learning_rate \(0\.0001\) .* train\.learning_rate \(5e-05\)",
    ),
    "wrong type": (changed(data__batch_size="many"), r"data\.batch_size: .* valid integer.*, got 'many'; correct"),
    "half a step": (changed(train__steps=1.5), r"train\.steps: .* valid integer.*, got 1\.5"),
    "unknown dtype": (changed(train__dtype="fp8"), r"train\.dtype: .*'float32' or 'bfloat16', got 'fp8'"),
    "unknown rule": (
        changed(routing__rule="top2"),
        r"routing\.rule: .*'topk', 'group_limited', 'c2r' or 'c2r_grouped', got 'top2'",
    ),
    "unknown combine": (changed(moe__combine="sum"), r"moe\.combine: .*'per_device' or 'per_expert', got 'sum'"),
    "checkpoint and a size": (
        changed(model__vocab_size=64),
        r"model\.checkpoint and model\.vocab_size are both set; a checkpoint knows its sizes$",
    ),
    "no checkpoint, no size": (
        changed(model__checkpoint=None),
        r"model\.vocab_size is missing; give model\.checkpoint",
    ),
    "a size is missing": (
        {**RAW, "model": {name: size for name, size in SIZES.items() if name != "num_heads"}},
        r"model\.num_heads is missing; give model\.checkpoint, or all of vocab_size, hidden_size, num_layers,",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_keys_and_values_are_refused(name: str) -> None:
    raw, sentence = REFUSALS[name]
    with pytest.raises(UserError, match=sentence):
        make_config(raw, "file.toml")


@pytest.mark.parametrize("raw", [{}, {k: v for k, v in RAW.items() if k != "output"}, changed(data__train=None)])
def test_a_missing_key_is_named_and_not_shown_as_the_rest_of_the_file(raw: dict[str, Any]) -> None:
    with pytest.raises(UserError) as refused:
        make_config(raw, "file.toml")
    assert "{" not in str(refused.value)


@pytest.mark.parametrize("key", ["num_kv_heads", "max_position_embeddings", "rope_theta", "tie_embeddings"])
def test_no_size_is_set_beside_a_checkpoint_in_silence(key: str) -> None:
    other = {"num_kv_heads": 2, "max_position_embeddings": 64, "rope_theta": 5e5, "tie_embeddings": True}
    make_config({**RAW, "model": {**SIZES, key: other[key]}}, "file.toml")
    with pytest.raises(UserError, match=rf"model\.checkpoint and model\.{key} are both set"):
        make_config({**RAW, "model": {"checkpoint": "moe", key: other[key]}}, "file.toml")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=25", 25),
        ("train.learning_rate=3e-4", 3e-4),
        ("train.dtype=bfloat16", "bfloat16"),
        ('train.dtype="bfloat16"', "bfloat16"),
        ("output.resume=true", True),
        ("data.train=../text/my train", Path("../text/my train")),
        ("data.tokenizer=a=b", Path("a=b")),
        ("moe.placement=/tmp/p.json", Path("/tmp/p.json")),
    ],
)
def test_override_is_toml_or_bare_text(run_file: Path, override: str, value: Any) -> None:
    section, key = override.partition("=")[0].split(".")
    assert getattr(getattr(load_config(run_file, [override]), section), key) == value


def test_the_last_override_of_a_key_holds(run_file: Path) -> None:
    assert load_config(run_file, ["train.steps=3", "train.seed=5", "train.steps=4"]).train.steps == 4


@pytest.mark.parametrize("override", ["train.steps", "steps=3", ".steps=3", "train.=3", "=3", ""])
def test_override_of_another_form_is_refused(run_file: Path, override: str) -> None:
    with pytest.raises(UserError, match=r"^override '.*' must have the form section\.key=value; correct it$"):
        load_config(run_file, [override])


def test_override_is_checked_as_the_file_is(run_file: Path) -> None:
    with pytest.raises(UserError, match=r"unknown key train\.step; did you mean train\.steps\?"):
        load_config(run_file, ["train.step=3"])
    with pytest.raises(UserError, match=r"run\.toml: train\.steps: .* got 0"):
        load_config(run_file, ["train.steps=0"])


def test_override_of_what_is_no_section_is_refused(run_file: Path) -> None:
    run_file.write_text("train = 3\n")
    with pytest.raises(UserError, match=r"train must be a section with keys, got 3; write \[train\]"):
        load_config(run_file, ["train.steps=3"])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, r"^run file .*run\.toml cannot be read \(No such file or directory\); give a TOML file$"),
        (b"[train\nsteps = 3", r"^run file .*run\.toml is no TOML \(.*line 1.*\); correct it$"),
        (b"steps = 3\nsteps = 4\n", r"is no TOML \(Cannot overwrite a value.*\)"),
        (b"\xff\xfe", r"is no TOML \(.*can't decode byte 0xff.*\)"),
    ],
)
def test_file_that_cannot_be_read_is_refused(run_file: Path, content: bytes | None, sentence: str) -> None:
    if content is None:
        run_file.unlink()
    else:
        run_file.write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        load_config(run_file)


def test_a_folder_is_no_run_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\); give a TOML file"):
        load_config(tmp_path)


def came_back(config: RunConfig, folder: Path) -> RunConfig:
    path = folder / "again.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    return load_config(path)


finite = st.floats(min_value=0, max_value=1e300, exclude_min=True)
# Larger ones have a test of their own below.
words = st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0xFFFF), min_size=1, max_size=8)


@given(steps=st.integers(1, 2**70), seed=st.integers(-(2**70), 2**70), rate=finite, text=words, resume=st.booleans())
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, steps: int, seed: int, rate: float, text: str, resume: bool
) -> None:
    raw = changed(
        train__steps=steps,
        train__seed=seed,
        train__learning_rate=rate,
        train__min_learning_rate=rate / 3,
        output__folder=text,
        output__resume=resume,
        routing__rule="c2r",
        routing__top_t=3,
    )
    config = make_config(raw, "test")
    assert came_back(config, tmp_path_factory.getbasetemp()) == config


@pytest.mark.parametrize(
    "keys",
    [
        {"output__folder": "runs/\U0001f600"},  # two UTF-16 units in JSON, which are no TOML
        {"output__folder": 'a "quoted"\tname\\'},
        {"train__clip_grad_norm": math.inf},  # no clipping
        {"train__min_learning_rate": 1e-5, "train__save_every": 7},
    ],
    ids=["beyond 16 bits", "quotes", "infinite", "small"],
)
def test_odd_values_are_written_as_toml(tmp_path: Path, keys: dict[str, Any]) -> None:
    config = make_config(changed(**keys), "test")
    assert came_back(config, tmp_path) == config


def test_a_new_model_is_written_without_the_keys_that_have_no_value(tmp_path: Path) -> None:
    config = make_config({**RAW, "model": SIZES}, "test")
    text = to_toml(config)
    assert "checkpoint" not in text
    assert '[output]\nfolder = "run"\nresume = false\n' in text
    assert came_back(config, tmp_path) == config
