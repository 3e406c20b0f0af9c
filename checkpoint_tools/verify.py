"""Whether two model folders hold the same model: same entries by checksum, same logits on random tokens.

Every folder is run by its own code: a Hugging Face folder by transformers (a MoE one by our modeling file), an engine
checkpoint by the engine. Where logits differ, the first layer whose output differs is named.
"""

import reprlib
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint_tools.source import Source, open_source
from ep_engine.checksum import checksum
from ep_engine.errors import Fault
from ep_engine.model_config import ModelConfig
from ep_engine.progress import track

# fp32, relative to the largest logit: the two sides may sum in another order.
TOLERANCE = 1e-5
_BATCH, _LENGTH = 2, 64
_UNCOMPARED = {"carried", "initializer_range", "moe"}  # they change no logit; the MoE part is compared by itself


@dataclass(frozen=True)
class Verification:
    """What was compared, and every difference; `same` if there is none."""

    same: bool
    tolerance: float  # relative to logit_scale
    max_abs_diff: float | None = None  # of the logits; None: not comparable
    logit_scale: float | None = None  # largest absolute logit of the first folder
    first_difference: str | None = None  # where the outputs first differ: `embedding`, `layer 3`, `logits`
    config: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # setting -> values in the first and second folder
    missing: list[str] = field(default_factory=list)  # entries of the first folder that the second lacks
    extra: list[str] = field(default_factory=list)  # the other way round
    different: list[str] = field(default_factory=list)  # entries whose dtype, shape or bits differ

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return asdict(self)

    def sentences(self) -> list[str]:
        """The findings, for people."""
        found = [
            f"{name} is {reprlib.repr(a)} in the first folder and {reprlib.repr(b)} in the second"  # tables are long
            for name, (a, b) in self.config.items()
        ]
        for what, names in (("lacks", self.missing), ("has besides", self.extra)):
            found += [f"the second folder {what} {name}" for name in names]
        found += [f"{name} differs" for name in self.different]
        if self.first_difference is not None:
            found.append(f"outputs first differ at {self.first_difference}")
        if self.max_abs_diff is not None:
            found.append(
                f"largest difference of logits {self.max_abs_diff:.3g}, allowed "
                f"{self.tolerance * (self.logit_scale or 0.0):.3g} (logits up to {self.logit_scale:.3g})"
            )
        return [*found, "same model" if self.same else "not the same model"]


def verify(
    first: Path,
    second: Path,
    *,
    all_experts: bool = False,
    logits_alone: bool = False,
    seed: int = 0,
    tolerance: float = TOLERANCE,
) -> Verification:
    """Compare two folders, each a Hugging Face model or an engine checkpoint.

    Args:
        first: a folder.
        second: the folder to compare it with.
        all_experts: run MoE models with every expert on, weight 1, so that a split model can be compared with its dense
            source; FFN entries and routing are then not compared one by one.
        logits_alone: compare neither settings nor entries.
        seed: of the random tokens.
        tolerance: largest difference of logits, relative to the largest logit.

    Raises:
        UserError: a folder is no complete model.
        Fault: a damaged checkpoint, or transformers did not load every weight.
    """
    a, b = (_densified(open_source(folder)) if all_experts else open_source(folder) for folder in (first, second))
    config = {} if logits_alone else _config_differences(a.config, b.config)
    skip = ".ffn." if all_experts else None
    missing, extra, different = ([], [], []) if logits_alone else _entry_differences(a, b, skip=skip)
    entries_same = not (missing or extra or different)
    if a.config.vocab_size != b.config.vocab_size:
        return Verification(False, tolerance, config=config, missing=missing, extra=extra, different=different)
    length = min(_LENGTH, a.config.max_position_embeddings, b.config.max_position_embeddings)
    tokens = torch.randint(a.config.vocab_size, (_BATCH, length), generator=torch.Generator().manual_seed(seed))
    outputs_a, outputs_b = (_outputs(source, tokens) for source in (a, b))
    gap, scale = _gap(outputs_a["logits"], outputs_b["logits"])
    close = gap <= tolerance * scale
    where = None if close else _first_difference(outputs_a, outputs_b, tolerance)
    same = close and entries_same and not config
    return Verification(same, tolerance, gap, scale, where, config, missing, extra, different)


def _densified(source: Source) -> Source:
    """A MoE model with all experts on is a dense model: experts side by side, in order of their ids."""
    moe = source.config.moe
    if moe is None:
        return source
    tensors = {name: tensor for name, tensor in source.tensors.items() if ".moe." not in name}
    for layer in range(source.config.num_layers):
        for name in ("w_gate", "w_up", "w_down"):
            experts = [source.tensors[f"layers.{layer}.moe.experts.{e}.{name}"] for e in range(moe.num_experts)]
            tensors[f"layers.{layer}.ffn.{name}.weight"] = torch.cat(experts, dim=1 if name == "w_down" else 0)
    width = moe.num_experts * moe.expert_hidden_size
    config = source.config.model_copy(update={"moe": None, "intermediate_size": width})
    return Source(source.folder, "engine", None, config, tensors)


def _config_differences(a: ModelConfig, b: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that change the model and differ."""
    pairs = {name: (getattr(a, name), getattr(b, name)) for name in ModelConfig.model_fields if name not in _UNCOMPARED}
    if a.moe is not None and b.moe is not None:
        parts = {"moe": (a.moe, b.moe), "moe.routing": (a.moe.routing, b.moe.routing)}
        for at, (x, y) in parts.items():
            names = [name for name in type(x).model_fields if name != "routing"]
            pairs |= {f"{at}.{name}": (getattr(x, name), getattr(y, name)) for name in names}
    else:
        pairs["moe"] = ("dense" if a.moe is None else "MoE", "dense" if b.moe is None else "MoE")
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _entry_differences(a: Source, b: Source, *, skip: str | None) -> tuple[list[str], list[str], list[str]]:
    """Names of entries only in `a`, only in `b`, and in both but not the same."""
    names_a, names_b = ([name for name in s.tensors if skip is None or skip not in name] for s in (a, b))
    both = [name for name in names_a if name in b.tensors]
    different = [name for name in track(both, "comparing weights") if not _same_bits(a.tensors[name], b.tensors[name])]
    missing = [name for name in names_a if name not in b.tensors]
    return missing, [name for name in names_b if name not in a.tensors], different


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and checksum(a) == checksum(b)


def _outputs(source: Source, tokens: Tensor) -> dict[str, Tensor]:
    """fp32 outputs by place, in order: `embedding`, `layer 0` ..., `logits`."""
    model, stack = _engine_model(source) if source.family is None else _transformers_model(source)
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def keep_input(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        outputs["embedding"] = args[0] if args else kwargs["hidden_states"]

    stack[0].register_forward_pre_hook(keep_input, with_kwargs=True)
    for i, layer in enumerate(stack):
        layer.register_forward_hook(keep(f"layer {i}"))
    with torch.no_grad():
        output = model(tokens)
    return {**outputs, "logits": output if isinstance(output, torch.Tensor) else output.logits}


def _engine_model(source: Source) -> tuple[nn.Module, nn.ModuleList]:
    from ep_engine.model import Decoder
    from ep_engine.parallelize import entries_of

    model = Decoder(source.config).float().eval()
    for name, shard in entries_of([model]).items():
        shard.tensor.copy_(source.tensors[name])
    return model, nn.ModuleList(model.layers.values())


def _transformers_model(source: Source) -> tuple[nn.Module, nn.ModuleList]:
    import transformers

    assert source.family is not None, "the engine runs its own checkpoints"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    module, _, name = source.family.transformers_class.partition(":")
    model_class = getattr(import_module(module), name)
    model, info = model_class.from_pretrained(source.folder, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        key = min(info["missing_keys"])
        raise Fault(
            f"transformers {transformers.__version__} did not load {key} from {source.folder}; "
            "it renames this key, use another version"
        )
    return model.eval(), model.model.layers


def _gap(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Largest absolute difference, infinite if not a number, and largest absolute value of `a`."""
    if a.shape != b.shape:
        return float("inf"), float(a.abs().max())
    return float((a - b).abs().nan_to_num(nan=float("inf")).max()), float(a.abs().max())


def _first_difference(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> str:
    for name in a:
        if name in b:
            gap, scale = _gap(a[name], b[name])
            if gap > tolerance * scale:
                return name
    return "logits"
