"""Whether two model folders hold the same model: same entries by checksum, same logits on random tokens.

Every folder is run by its own code: a Hugging Face folder by transformers where transformers knows the family (a MoE
one of ours by our modeling file) and the model fits into memory, all else layer by layer (forward.py). Where logits
differ, the first layer whose output differs is named.
"""

import logging
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from checkpoint_tools import forward
from checkpoint_tools.source import Source, open_source
from ep_engine.attention import Positions
from ep_engine.checksum import checksum
from ep_engine.errors import Fault
from ep_engine.model_config import ModelConfig
from ep_engine.progress import track

# fp32, relative to the largest logit: the two sides may sum in another order.
TOLERANCE = 1e-5
_BATCH, _LENGTH = 2, 64
_TIE = 1e-5  # between logits of two experts, relative to the largest: either may be chosen, as sums are rounded
_TRIES = 3  # sets of tokens, where there are ties
_UNCOMPARED = {"carried", "family", "initializer_range", "moe"}  # they change no logit; the MoE part is compared itself

_log = logging.getLogger(__name__)


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
    ties: list[int] = field(default_factory=list)  # seeds of tokens that were not compared to the end

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
        found += [
            f"with random tokens of seed {seed} two experts score the same to the last digits, and each folder chose "
            "another; others were taken" for seed in self.ties
        ]  # fmt: skip
        if self.first_difference is not None:
            found.append(f"outputs first differ at {self.first_difference}")
        if self.max_abs_diff is not None:
            found.append(
                f"largest difference of logits {self.max_abs_diff:.3g}, allowed "
                f"{self.tolerance * (self.logit_scale or 0.0):.3g} (logits up to {self.logit_scale:.3g})"
            )
        return [*found, "same model" if self.same else "not the same model"]


@dataclass(frozen=True)
class LogitGap:
    """How far the outputs of two models are apart."""

    max_abs_diff: float
    logit_scale: float  # largest absolute logit of the first
    first_difference: str | None  # None: within the tolerance, all of them or at least the logits


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
    a, b = open_source(first), open_source(second)
    config = {} if logits_alone else _config_differences(a.config, b.config, all_experts=all_experts)
    missing, extra, different = ([], [], []) if logits_alone else _entry_differences(a, b, all_experts=all_experts)
    entries_same = not (missing or extra or different)
    if a.config.vocab_size != b.config.vocab_size:
        return Verification(False, tolerance, config=config, missing=missing, extra=extra, different=different)
    ties: list[int] = []
    for tried in range(seed, seed + _TRIES):
        tokens = random_tokens(a.config, b.config, tried)
        ours, theirs = (dict(_outputs(source, tokens, all_experts=all_experts)) for source in (a, b))
        gap = compare_outputs(ours, theirs, tolerance)
        if tried == seed + _TRIES - 1 or all_experts or not _is_tie(a, ours, theirs, gap.first_difference, tolerance):
            break
        ties.append(tried)
    same = gap.first_difference is None and entries_same and not config
    return Verification(
        same,
        tolerance,
        gap.max_abs_diff,
        gap.logit_scale,
        gap.first_difference,
        config,
        missing,
        extra,
        different,
        ties,
    )


def _is_tie(
    source: Source, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], at: str | None, tolerance: float
) -> bool:
    """Whether outputs first differ at a layer with experts, and only for tokens for which two of them tie there."""
    layer = int(at.removeprefix("layer ")) if at is not None and at.startswith("layer ") else -1
    if at is None or layer < 0 or source.config.moe_of(layer) is None:
        return False
    config, before = source.config, ours["embedding" if layer == 0 else f"layer {layer - 1}"]
    with torch.no_grad():
        x_BSD = forward.attended(before, config, source.tensors, Positions(config), layer)
        h_TD = forward.normed(x_BSD, config, source.tensors, f"layers.{layer}.ffn_norm").flatten(0, 1)
        chosen = forward.routed(h_TD, config, layer, source.tensors)
    logits_TE = chosen.logits_TE
    others_TE = logits_TE.scatter(1, chosen.ids_TK, torch.inf)
    gap_T = (logits_TE.gather(1, chosen.ids_TK)[:, :, None] - others_TE[:, None]).abs().flatten(1).amin(dim=1)
    # What is no number is apart, and no tie.
    apart_T = ~((ours[at] - theirs[at]).abs().amax(dim=2).flatten() <= tolerance * ours[at].abs().max())
    return bool(apart_T.any()) and bool((gap_T[apart_T] <= _TIE * logits_TE.abs().max()).all())


def random_tokens(a: ModelConfig, b: ModelConfig, seed: int) -> Tensor:
    """Ids (B, S) that both models know, for as many positions as both have."""
    length = min(_LENGTH, a.max_position_embeddings, b.max_position_embeddings)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(min(a.vocab_size, b.vocab_size), (_BATCH, length), generator=generator)


def compare_outputs(outputs_a: Mapping[str, Tensor], outputs_b: Mapping[str, Tensor], tolerance: float) -> LogitGap:
    """Compare what two models put out, a few tokens of every layer."""
    gap, scale = _gap(outputs_a["logits"], outputs_b["logits"])
    if gap <= tolerance * scale:
        return LogitGap(gap, scale, None)
    for name in outputs_a:
        if name in outputs_b:
            of_part, scale_of_part = _gap(outputs_a[name], outputs_b[name])
            if not of_part <= tolerance * scale_of_part:
                return LogitGap(gap, scale, name)
    return LogitGap(gap, scale, "logits")


def _config_differences(a: ModelConfig, b: ModelConfig, *, all_experts: bool) -> dict[str, tuple[Any, Any]]:
    """Settings that change the model and differ."""
    skipped = _UNCOMPARED | ({"dense_layers"} if all_experts else set())
    if all_experts or (a.moe is not None and b.moe is not None):
        skipped.add("intermediate_size")  # experts and dense layers have widths of their own
    pairs = {name: (getattr(a, name), getattr(b, name)) for name in ModelConfig.model_fields if name not in skipped}
    if all_experts:
        pairs["the width of all experts together"] = (_width(a), _width(b))
    elif a.moe is not None and b.moe is not None:
        parts = {"moe": (a.moe, b.moe), "moe.routing": (a.moe.routing, b.moe.routing)}
        for at, (x, y) in parts.items():
            names = [name for name in type(x).model_fields if name != "routing"]
            pairs |= {f"{at}.{name}": (getattr(x, name), getattr(y, name)) for name in names}
    else:
        pairs["moe"] = ("dense" if a.moe is None else "MoE", "dense" if b.moe is None else "MoE")
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _width(config: ModelConfig) -> int:
    moe = config.moe
    if moe is None:
        return config.intermediate_size
    experts = moe.num_experts * moe.expert_hidden_size if moe.expert_sizes is None else max(map(sum, moe.expert_sizes))
    return experts + moe.residual_experts * moe.residual_hidden_size


def _entry_differences(a: Source, b: Source, *, all_experts: bool) -> tuple[list[str], list[str], list[str]]:
    """Names of entries only in `a`, only in `b`, and in both but not the same."""
    own = (".ffn.", ".moe.") if all_experts else ()
    names_a, names_b = ([name for name in s.tensors if not any(part in name for part in own)] for s in (a, b))
    both = [name for name in names_a if name in b.tensors.deferred]
    different = [name for name in track(both, "comparing weights") if not _same_bits(a.tensors[name], b.tensors[name])]
    missing = [name for name in names_a if name not in b.tensors.deferred]
    return missing, [name for name in names_b if name not in a.tensors.deferred], different


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and checksum(a) == checksum(b)


def _outputs(source: Source, tokens: Tensor, *, all_experts: bool) -> Iterator[tuple[str, Tensor]]:
    """fp32 outputs by place, in order: `embedding`, `layer 0` ..., `logits`."""
    moe = source.config.moe is not None
    if source.family is None or source.family.transformers_class is None or (all_experts and moe):
        return forward.outputs(source.config, source.tensors, tokens, all_experts=all_experts)
    num_bytes = 4 * sum(deferred.num_elements for deferred in source.tensors.deferred.values())
    free = psutil.virtual_memory().available
    if num_bytes > free // 2:
        _log.warning(
            "%s has %.1f GiB of weights in float32, %.1f GiB of memory are free: it is run layer by layer, not by "
            "transformers",
            source.folder, num_bytes / 2**30, free / 2**30,
        )  # fmt: skip
        return forward.outputs(source.config, source.tensors, tokens)
    return _transformers_outputs(source, source.family.transformers_class, tokens)


def _transformers_outputs(source: Source, class_name: str, tokens: Tensor) -> Iterator[tuple[str, Tensor]]:
    model, stack = _transformers_model(source, class_name)
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def keep_input(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        found["embedding"] = args[0] if args else kwargs["hidden_states"]

    stack[0].register_forward_pre_hook(keep_input, with_kwargs=True)
    for i, layer in enumerate(stack):
        layer.register_forward_hook(keep(f"layer {i}"))
    if source.config.num_labels:  # a classifier's own are those of the last token that is no padding
        classifier: Any = model
        classifier.score.register_forward_hook(keep("logits"))
        classifier.config.pad_token_id = classifier.config.pad_token_id or 0
    with torch.no_grad():
        told = model(tokens).logits
    found.setdefault("logits", told)
    return iter(found.items())


def _transformers_model(source: Source, class_name: str) -> tuple[nn.Module, nn.ModuleList]:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    module, _, name = class_name.partition(":")
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
