"""What a user can set for a run: one TOML file, overrides `section.key=value`, every key checked once.

Relations to files and to the number of ranks are checked in `resolve.py`. Paths are relative to the working directory.
"""

import json
import tomllib
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from ep_engine.data.domain_tables import DynamicRule, NamedLosses, NamedWeights
from ep_engine.errors import UserError
from ep_engine.model_config import first_sentence
from ep_engine.stages import Schedule

Packing = Literal["stream", "documents", "padded"]


class _Section(BaseModel):
    # A field's docstring is its description, of which `config_table` makes the table of the README.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelSection(_Section):
    """Which model: a checkpoint to go on from, or the sizes of a new dense model."""

    checkpoint: Path | None = None
    """engine checkpoint whose weights to start from; without it a new dense model is made"""
    vocab_size: int | None = Field(None, ge=1)
    """tokens of the vocabulary of a new model"""
    hidden_size: int | None = Field(None, ge=1)
    """D of a new model"""
    num_layers: int | None = Field(None, ge=1)
    """layers of a new model"""
    num_heads: int | None = Field(None, ge=1)
    """attention heads of a new model"""
    num_kv_heads: int | None = Field(None, ge=1)
    """key/value heads of a new model [num_heads]"""
    intermediate_size: int | None = Field(None, ge=1)
    """hidden width of the FFN of a new model"""
    max_position_embeddings: int = Field(2048, ge=1)
    """longest context of a new model"""
    rope_theta: FiniteFloat = Field(10000.0, gt=0)
    """base of the rotary positions of a new model"""
    tie_embeddings: bool = False
    """whether a new model's head is its embedding"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size")
        given = [name for name in sizes if getattr(self, name) is not None]
        beside = [name for name in differing(self) if name != "checkpoint"]
        if self.checkpoint is not None and beside:
            raise ValueError(f"model.checkpoint and model.{beside[0]} are both set; a checkpoint knows its sizes")
        if self.checkpoint is None and len(given) < len(sizes):
            missing = next(name for name in sizes if name not in given)
            raise ValueError(f"model.{missing} is missing; give model.checkpoint, or all of {', '.join(sizes)}")
        return self


class DataSection(_Section):
    """What is read: token files in Megatron's format, named without suffix."""

    train: Path | dict[str, Path]
    """token file to train on; or one for every domain, { name = "file", ... }"""
    weights: NamedWeights | dict[str, FiniteFloat] | None = None
    """share of rows from every domain; or by name: uniform, llama, sheared_llama (those of LLaMA-MoE's scripts)"""
    when_exhausted: Literal["wrap", "stop"] = "wrap"
    """once all rows of a domain were read: wrap: again, in another order; stop: the run ends, evaluates and saves"""
    packing: Packing = "stream"
    """a row is a window of the stream; or whole documents that do not see each other; or one; the rest is padding"""
    heldout: Path | dict[str, Path] | None = None
    """token file to evaluate on, or one for every domain"""
    heldout_every: int | None = Field(None, ge=1)
    """steps between evaluations; there is always one at the end"""
    dynamic_weights: DynamicRule | None = None
    """weights follow the held-out losses of domains after every evaluation: as LLM-Shearing's code, or its paper"""
    reference_losses: NamedLosses | dict[str, FiniteFloat] | None = None
    """of domains, for dynamic_weights; or by name: llama2_7b, sheared_llama_1.3b, sheared_llama_2.7b"""
    tokenizer: Path | None = None
    """Hugging Face tokenizer folder, copied into checkpoints"""
    sequence_length: int = Field(ge=1)
    """S, tokens of one row"""
    batch_size: int = Field(ge=1)
    """rows of the global batch"""
    heldout_batches: int = Field(16, ge=1)
    """batches of one evaluation"""
    separate_documents: bool = False
    """a token sees only its own document, not the others in its row; every token but the first is still a target"""

    @property
    def keeps_documents_apart(self) -> bool:
        """Whether a token sees only its own document."""
        return self.separate_documents or self.packing != "stream"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.heldout is None and "heldout_batches" in differing(self):
            raise ValueError("data.heldout_batches has no effect without data.heldout; set that too, or leave it out")
        if self.heldout is None and self.heldout_every is not None:
            raise ValueError("data.heldout_every has no effect without data.heldout; set that too, or leave it out")
        if self.packing != "stream" and self.separate_documents:
            raise ValueError(
                f"data.separate_documents has no effect with data.packing {self.packing}, which keeps them apart; "
                "leave it out"
            )
        self._check_domains()
        return self

    def _check_domains(self) -> None:
        if not isinstance(self.train, dict):
            beside = [n for n in ("weights", "dynamic_weights", "reference_losses") if getattr(self, n) is not None]
            if beside:
                raise ValueError(
                    f"data.{beside[0]} has no effect on one token file; make data.train a table of domains"
                )
        elif not self.train:
            raise ValueError("data.train has 0 domains; name a token file for each")
        if (self.dynamic_weights is None) != (self.reference_losses is None):
            raise ValueError("data.dynamic_weights and data.reference_losses go together; give both, or neither")
        if self.dynamic_weights is None or not isinstance(self.train, dict):
            return
        if self.heldout_every is None:
            raise ValueError("data.dynamic_weights needs data.heldout_every, the steps between updates; set it")
        names = set(self.heldout) if isinstance(self.heldout, dict) else set()
        if names != set(self.train):
            raise ValueError(
                f"data.dynamic_weights needs a data.heldout of every domain ({', '.join(self.train)}), got "
                f"{', '.join(sorted(names)) or 'one for all'}; name them"
            )


class TrainSection(_Section):
    """How long, and with what optimiser (AdamW)."""

    steps: int = Field(ge=1)
    """optimiser steps"""
    learning_rate: FiniteFloat = Field(1e-3, gt=0)
    """peak learning rate"""
    min_learning_rate: FiniteFloat = Field(1e-4, ge=0)
    """learning rate at the last step"""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """how the rate falls after warm-up: half a cosine; a line; not until the last steps (WSD)"""
    warmup_steps: int = Field(20, ge=0)
    """steps of linear warm-up"""
    warmup_tokens: int | None = Field(None, ge=1)
    """the same in tokens, in the place of steps"""
    decay_steps: int | None = Field(None, ge=1)
    """last steps over which the rate of wsd falls, in a line [a tenth of all]"""
    gate_learning_rate: FiniteFloat | None = Field(None, gt=0)
    """peak rate of routers and other gates [that of all]"""
    trainable: Literal["all", "condensed-experts"] = "all"
    """what is trained: all weights; of condensed layers the matrices alone"""
    freeze: list[str] = []
    """patterns such as "layers.*.moe.router.*" of weights that stay as they are; each must match one"""
    weight_decay: FiniteFloat = Field(0.1, ge=0)
    """of matrices; norms and biases have none"""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's first moment"""
    beta2: float = Field(0.95, ge=0, lt=1)
    """AdamW's second moment"""
    clip_grad_norm: float = Field(1.0, gt=0)
    """largest global gradient norm"""
    skip_steps: int = Field(0, ge=0)
    """steps in a row that may be left out because loss or gradient are no numbers; one more stops the run"""
    spike_factor: FiniteFloat | None = Field(None, gt=1)
    """a loss so many times the mean of the last 20 steps goes back to the last checkpoint, and on with later data"""
    time_limit_s: FiniteFloat | None = Field(None, gt=0)
    """seconds after which a run saves and ends, as it does on SIGTERM"""
    seed: int = 0
    """of new weights and of the order of batches"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of computation; weights, moments and gradient sums stay float32"""
    micro_batches: int = Field(1, ge=1)
    """parts of a batch that are computed one after the other"""
    recompute: Literal["none", "selective", "full"] = "none"
    """computed again for the backward: nothing; attention, the insides of experts; every layer as a whole"""
    log_every: int = Field(10, ge=1)
    """steps between lines of metrics.jsonl"""
    save_every: int | None = Field(None, ge=1)
    """steps between checkpoints; one is always written at the end"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"train.min_learning_rate ({self.min_learning_rate}) must not be above train.learning_rate "
                f"({self.learning_rate}), from which the rate falls; lower it"
            )
        if self.warmup_tokens is not None and "warmup_steps" in differing(self):
            raise ValueError(
                f"train.warmup_tokens ({self.warmup_tokens}) and train.warmup_steps ({self.warmup_steps}) are both set;"
                " leave one out"
            )
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ValueError(
                f"train.decay_steps ({self.decay_steps}) has no effect on train.schedule {self.schedule}; leave it out"
            )
        return self


class ParallelSection(_Section):
    """How ranks share the work. Experts live on an (edp, ep, etp) grid over the same ranks as (dp, tp) of a stage."""

    pipeline_parallel_size: int = Field(1, ge=1)
    """groups of ranks that hold layers that follow each other; the parts of a batch run through them"""
    pipeline_schedule: Schedule = "1f1b"
    """gpipe; 1f1b; interleaved: 2 stages a rank, or as pipeline_layers says; zbv: 2 in a V, weights' gradients later"""
    pipeline_layers: list[Annotated[int, Field(ge=1)]] | None = None
    """layers of every stage [as even as can be, the first longer]"""
    data_parallel_size: int | None = Field(None, ge=1)
    """groups of ranks that share the batch, and the dense weights [ranks / pipeline and tensor_parallel_size]"""
    tensor_parallel_size: int = Field(1, ge=1)
    """ranks that split the matrices outside of the experts, the vocabulary, and the sequence"""
    expert_parallel_size: int = Field(1, ge=1)
    """ranks that share the experts of a layer; divides the ranks of the job"""
    expert_tensor_parallel_size: int = Field(1, ge=1)
    """ranks that split each expert along its hidden width; times expert_parallel_size, divides the ranks of the job"""
    reshard_after_forward: bool = False
    """gather weights again for the backward (ZeRO-3) instead of keeping them (ZeRO-2)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs if every rank of a node has one, else CPU"""
    timeout_s: float = Field(300.0, gt=0, le=604_800)
    """seconds after which a rank that hears nothing from another gives up; a week at most"""


class MoESection(_Section):
    """How tokens travel."""

    combine: Literal["per_device", "per_expert"] = "per_device"
    """per_device: one row per token and rank; per_expert: one row per copy, summed at home by ascending expert id"""
    placement: Path | None = None
    """placement.json of `ep-engine place` [experts in the order of their ids]"""
    transport: Literal["auto", "collective", "shared_memory", "cuda_ipc", "hierarchical"] = "auto"
    """collective: torch's all-to-all; one machine: shared_memory on CPU, cuda_ipc on GPUs; hierarchical: over nodes"""
    fp8_dispatch: bool = False
    """rows travel to the experts in 8 bits (e4m3, a scale per 128 elements); all else keeps its dtype"""
    fixed_rows: int | None = Field(None, ge=1)
    """rows from a rank to each other in every exchange, unused ones too; more is an error [as many as there are]"""


class RoutingSection(_Section):
    """The selection rule; without it the model's own stays."""

    rule: Literal["topk", "group_limited", "c2r", "c2r_grouped"] | None = None
    """topk; group_limited: of M groups; c2r: top-1 and some of its T collaborators; c2r_grouped: on M devices"""
    top_t: int | list[int] | None = None
    """T, in k-1..E-1; or a list of that of every layer"""
    profile: Path | None = None
    """profile.npz, from which collaboration lists are made; or published lists: config.json (with top_t), or a .pkl"""
    max_devices: Annotated[int, Field(ge=1)] | list[Annotated[int, Field(ge=1)]] = 1
    """M, devices of moe.placement (c2r_grouped) or groups (group_limited) of a token; or a list of every layer's"""
    num_groups: int | None = Field(None, ge=1)
    """equal groups of experts with consecutive ids, of group_limited"""
    tighten_steps: int = Field(0, ge=0)
    """first steps of the run over which T and M fall from all to what they are set to"""
    weights: Literal["model", "selected", "match_plain_mass"] = "model"
    """of the chosen experts: as the model weighs any; divided by their sum; with the sum that plain top-k would have"""


class BalanceSection(_Section):
    """What keeps experts equally busy. Coefficients are of losses that are means over layers."""

    switch: FiniteFloat = Field(0.01, ge=0)
    """coefficient of E * sum of load share times mean probability (arXiv:2101.03961)"""
    switch_of: Literal["rule", "plain"] = "rule"
    """whose choices it counts: those of the rule, or of plain top-k on the same scores, as C2R's published code"""
    importance: FiniteFloat = Field(0.0, ge=0)
    """of the squared variation of summed combine weights (arXiv:1701.06538)"""
    load: FiniteFloat = Field(0.0, ge=0)
    """of the squared variation of loads; it has a gradient with noise alone"""
    sequence: FiniteFloat = Field(0.0, ge=0)
    """of `switch` for every row of the batch by itself (arXiv:2412.19437)"""
    mutual_information: FiniteFloat = Field(0.0, ge=0)
    """of minus the information between tokens and experts, in nats (arXiv:2212.08066)"""
    z: FiniteFloat = Field(0.0, ge=0)
    """of the squared log-sum-exp of the router's logits (arXiv:2202.08906)"""
    over: Literal["batch", "rank"] = "batch"
    """what loads and means are of: all ranks and the parts of the batch so far; or a rank's own part, as published"""
    noise: bool = False
    """noisy top-k (arXiv:1701.06538), for models whose gates have a noise matrix, as LLaMA-MoE's"""
    gumbel: bool = False
    """add Gumbel noise to the router's logits, as LLaMA-MoE's Switch gate, whose weights are its logits"""
    bias_rate: FiniteFloat = Field(0.0, ge=0)
    """how far a step moves the selection bias of experts away from the mean load (arXiv:2408.15664)"""
    capacity_factor: FiniteFloat | None = Field(None, gt=0)
    """most tokens of an expert in a pass, relative to the mean; later ones skip it [no limit]"""
    reference_compat: bool = False
    """as LLaMA-MoE's code: `load` asks the noise alone whether an expert is chosen, and padding counts like tokens"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.switch == 0 and self.switch_of != "rule":
            raise ValueError(f"balance.switch_of ({self.switch_of}) has no effect, balance.switch is 0; leave it out")
        if self.noise and self.gumbel:
            raise ValueError("balance.noise and balance.gumbel both add noise to the router's logits; choose one")
        return self


class OutputSection(_Section):
    """Where results go."""

    folder: Path
    """run folder: run.toml, metrics.jsonl, checkpoints/"""
    resume: bool = False
    """go on from the last checkpoint in the folder, in any layout"""
    keep_checkpoints: int | None = Field(None, ge=1)
    """checkpoints that stay; older ones are deleted after a save [all]"""
    watch: bool = True
    """count co-activation, and compare the placement in use with one solved for the last steps; leaves profile.npz"""
    async_save: bool = True
    """checkpoints are written while training goes on, from a copy in host memory, 12 bytes per weight of a rank"""
    wandb: str | None = Field(None, min_length=1)
    """project of Weights & Biases that is sent the numbers of metrics.jsonl too; needs its package, wandb"""


class RunConfig(_Section):
    """One run."""

    model: ModelSection
    data: DataSection
    train: TrainSection
    parallel: ParallelSection = ParallelSection()
    moe: MoESection = MoESection()
    routing: RoutingSection = RoutingSection()
    balance: BalanceSection = BalanceSection()
    output: OutputSection

    @model_validator(mode="after")
    def _check(self) -> Self:
        asked = self.balance
        if asked.reference_compat and self.data.packing == "stream" and not (asked.noise and asked.load):
            raise ValueError(
                "balance.reference_compat has no effect without balance.noise and balance.load where data.packing is "
                "stream, which has no padding; set both, or leave it out"
            )
        return self


_NOT_YET = {
    "parallel.context_parallel_size": "a row's positions stay together; split its sequence with "
    "parallel.tensor_parallel_size, or make rows shorter"
}


def differing(section: BaseModel) -> list[str]:
    """Keys of a section that are not at their default."""
    return [name for name, field in type(section).model_fields.items() if getattr(section, name) != field.default]


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's TOML file and apply overrides such as `train.steps=10` (the value in TOML syntax, or bare text).

    Raises:
        UserError: the file is missing or no TOML, a key is unknown or missing, or a value is out of range.
    """
    raw = read_toml(path, "run file")
    for override in overrides:
        _apply(raw, override)
    return make_config(raw, str(path))


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """What a TOML file holds; UserError, which names `what` it is, if it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read ({error.strerror}); give a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} is no TOML ({error}); correct it") from None


def make_config(raw: dict[str, Any], where: str) -> RunConfig:
    """RunConfig of nested dictionaries; UserError with a suggestion for an unknown key. `where` names the source."""
    _refuse_unknown(raw, list(RunConfig.model_fields), prefix="")
    for name, section in raw.items():
        known = RunConfig.model_fields[name].annotation
        if not isinstance(section, dict):
            raise UserError(f"{where}: {name} must be a section with keys, got {section!r}; write [{name}]")
        assert known is not None, "every field has a type"
        _refuse_unknown(section, list(known.model_fields), prefix=f"{name}.")
    try:
        return RunConfig(**raw)
    except ValidationError as error:
        raise UserError(f"{where}: {first_sentence(error)}") from None


def config_table() -> list[tuple[str, str, str]]:
    """Every key with its default and its meaning, for the README and the test that pins them."""
    rows = []
    for section, field in RunConfig.model_fields.items():
        assert field.annotation is not None, "every field has a type"
        for name, key in field.annotation.model_fields.items():
            default = "required" if key.is_required() else "" if key.default is None else str(key.default).lower()
            rows.append((f"{section}.{name}", default, key.description or ""))
    return rows


def to_toml(config: RunConfig) -> str:
    """The configuration as a TOML file, defaults included, that `load_config` reads back."""
    lines = []
    for section, values in config.model_dump(exclude_none=True).items():
        lines += [f"[{section}]", *(f"{name} = {_toml(value)}" for name, value in values.items()), ""]
    return "\n".join(lines)


def _toml(value: bool | int | float | str | Path | list[int] | dict[str, Any]) -> str:
    if isinstance(value, list):
        return json.dumps(value)
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml(key)} = {_toml(one)}" for key, one in value.items()) + " }"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    # TOML's escapes are those of JSON, but for characters that JSON would write as two.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.partition(".")
    if not equals or not dot or not section or not name:
        raise UserError(f"override {override!r} must have the form section.key=value; correct it")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a path or a word, which a shell makes tiresome to quote
    values = raw.setdefault(section, {})
    if isinstance(values, dict):  # otherwise the section itself is refused, later
        values[name] = value


def _refuse_unknown(given: dict[str, Any], known: Sequence[str], *, prefix: str) -> None:
    for key in given:
        if f"{prefix}{key}" in _NOT_YET:
            raise UserError(f"{prefix}{key} is not there yet: {_NOT_YET[f'{prefix}{key}']}")
        if key not in known:
            close = get_close_matches(key, known, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known are {', '.join(known)}"
            raise UserError(f"unknown key {prefix}{key}; {hint}")
