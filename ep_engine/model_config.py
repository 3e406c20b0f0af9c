"""What a model is: the sizes, the routing rule and its tables. Stored as `model.json` in every checkpoint.

Nothing here says how the model is run (ranks, steps, data): that is `config.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ep_engine.errors import UserError


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


_BY_LAYER = ("top_t", "max_devices", "lists", "device_of_expert")  # of RoutingConfig: a row for each MoE layer


class RoutingConfig(_Part):
    """The selection rule of every MoE layer and the tables it reads."""

    rule: Literal["topk", "group_limited", "c2r", "c2r_grouped"] = "topk"
    top_t: int | list[int] | None = None
    """T of C2R: how many collaborators of the top-1 expert are candidates, in k-1..E-1; or that of every layer."""
    lists: list[list[list[int]]] | None = None
    """[L][E][E], L layers with experts: row i is a permutation of them, closest collaborator of i first, i last."""
    max_devices: int | list[int] | None = None
    """M: a token's experts live on at most this many devices (c2r_grouped), or in so many groups (group_limited); or
    that of every layer."""
    device_of_expert: list[list[int]] | None = None
    """[L][E]: the device each expert lives on; c2r_grouped reads it."""
    num_groups: int | None = None
    """Equal groups of experts with consecutive ids; group_limited reads it."""
    weights: Literal["model", "selected", "match_plain_mass"] = "model"
    """Combine weights under a constraint: as the model weighs any chosen experts; divided by their sum; or scaled so
    that their sum is that of plain top-k, before the scale of the model."""

    def in_layer(self, layer: int) -> tuple[int | None, int | None]:
        """T and M of one layer."""
        t, m = self.top_t, self.max_devices
        return (t[layer] if isinstance(t, list) else t), (m[layer] if isinstance(m, list) else m)


class MoEConfig(_Part):
    """The shape of every mixture-of-experts layer of the model."""

    num_experts: int
    """E; where layers have different numbers, the largest."""
    experts_of_layer: list[int] | None = None
    """[L]: how many experts every layer with experts has (a pyramid, arXiv:2201.05596); None: num_experts."""
    top_k: int
    """K, experts chosen per token."""
    expert_hidden_size: int
    """F, hidden width of one expert."""
    gate: Literal["linear", "mlp", "mlp_gelu", "cosine"] = "mlp"
    """How logits come about; see router.py."""
    gate_hidden_size: int = 0
    """R, width inside an `mlp_gelu` or `cosine` gate."""
    gate_noise: bool = False
    """Whether the router has a noise matrix (E, D), as LLaMA-MoE v1 has it; it has no part in what is chosen."""
    selection_bias: bool = False
    """Whether the router adds a bias to each expert's score for the choice alone, as in DeepSeek-V3."""
    score: Literal["softmax_of_chosen", "softmax", "sigmoid", "logit"] = "softmax_of_chosen"
    """Combine weights before all else: softmax over the K chosen, softmax over all experts, a sigmoid each, or the
    logits themselves, as LLaMA-MoE without `gate_use_softmax`."""
    renormalise: bool = False
    """Whether the weights of the K chosen are divided by their sum."""
    score_scale: float | list[float] = 1.0
    """Factor on the combine weights, or that of every layer; E / K keeps the magnitude of a split dense layer
    (specification of LLaMA-MoE)."""
    learned_scale: bool = False
    """Whether that factor is a weight of the router, which score_scale is the start of: LLaMA-MoE's `mlp_norm`."""
    shared_hidden_size: int = 0
    """Hidden width of the dense SwiGLU that every token goes through beside its experts; 0: none."""
    shared_gate: bool = False
    """Whether its output is multiplied by the sigmoid of a gate, as in Qwen2-MoE."""
    residual_experts: int = 0
    """Experts that every token goes through as well, weighted by a softmax gate of their own, as in LLaMA-MoE's
    residual models."""
    residual_hidden_size: int = 0
    """Hidden width of one of them."""
    residual_scale: float = 1.0
    """Factor on their weights."""
    residual_weighting: bool = False
    """Whether a softmax gate of two weighs what the chosen experts put out against what these do, as LLaMA-MoE's
    `use_weighting` (arXiv:2201.05596)."""
    expert_sizes: list[list[int]] | None = None
    """[L][E]: where experts are smaller than expert_hidden_size, how much of each is not padding with zeros."""
    routing: RoutingConfig = RoutingConfig()

    def experts_in(self, layer: int) -> int:
        """E of one layer with experts."""
        return self.num_experts if self.experts_of_layer is None else self.experts_of_layer[layer]

    def in_layer(self, layer: int) -> "MoEConfig":
        """The same as one layer sees it: num_experts is its own. Tables keep a row for every layer."""
        return (
            self if self.experts_of_layer is None else self.model_copy(update={"num_experts": self.experts_in(layer)})
        )

    @property
    def beside_hidden_size(self) -> int:
        """Hidden width of all that every token goes through beside its experts."""
        return self.shared_hidden_size + self.residual_experts * self.residual_hidden_size

    def scale_of(self, layer: int) -> float:
        """Factor on the combine weights of one layer."""
        return self.score_scale[layer] if isinstance(self.score_scale, list) else self.score_scale

    @model_validator(mode="after")
    def _check(self) -> Self:
        e, k, rule = self.num_experts, self.top_k, self.routing
        each = self.experts_of_layer or [e]
        if max(each) != e:
            raise ValueError(
                f"moe.num_experts ({e}) must be the largest of moe.experts_of_layer ({max(each)}); correct one of them"
            )
        if not 1 <= k <= min(each):
            where = "" if self.experts_of_layer is None else ", the fewest that a layer has"
            raise ValueError(
                f"moe.top_k ({k}) must be in 1..moe.num_experts ({min(each)}){where}; choose fewer experts per token"
            )
        if (self.gate in ("mlp_gelu", "cosine")) != (self.gate_hidden_size > 0):
            raise ValueError(
                f"moe.gate_hidden_size ({self.gate_hidden_size}) must be at least 1 for the gates mlp_gelu and cosine, "
                f"and 0 for others, the gate is {self.gate}; correct one of them"
            )
        if (self.residual_experts > 0) != (self.residual_hidden_size > 0):
            raise ValueError(
                f"moe.residual_experts ({self.residual_experts}) and moe.residual_hidden_size "
                f"({self.residual_hidden_size}) must both be 0 or both be more; correct one of them"
            )
        if self.shared_gate and self.shared_hidden_size == 0:
            raise ValueError("moe.shared_gate is set and moe.shared_hidden_size is 0: there is nothing to gate")
        if self.residual_weighting and (self.residual_experts == 0 or self.shared_hidden_size > 0):
            raise ValueError(
                "moe.residual_weighting weighs residual experts against the chosen ones alone, moe.residual_experts is "
                f"{self.residual_experts} and moe.shared_hidden_size {self.shared_hidden_size}; leave it out"
            )
        if self.score == "logit" and (self.renormalise or rule.weights != "model"):
            raise ValueError(
                f"moe.renormalise ({self.renormalise}) and routing.weights ({rule.weights}) cannot divide weights that "
                "are logits (moe.score) by their sum, which may be 0; leave both out"
            )
        if rule.weights != "model" and (rule.rule == "topk" or self.score == "softmax_of_chosen" or self.renormalise):
            raise ValueError(
                f"routing.weights {rule.weights} has no effect on rule {rule.rule}, score {self.score}"
                f"{', renormalised' if self.renormalise else ''}: the weights of the chosen have that sum already; "
                "leave it out"
            )
        if rule.rule == "topk":
            return self
        if rule.rule == "group_limited":
            self._check_limited()
            return self
        if rule.lists is None:
            raise ValueError(f"routing.rule {rule.rule} needs collaboration lists, got none; give routing.profile")
        for layer, rows in enumerate(rule.lists):
            self._check_top_t(layer)
            check_lists(rows, self.experts_in(layer), where=f"layer {layer}")
        if rule.rule == "c2r_grouped":
            self._check_groups()
        return self

    def _check_top_t(self, layer: int) -> None:
        k, e = self.top_k, self.experts_in(layer)
        top_t = self.routing.top_t
        if isinstance(top_t, list):
            top_t = top_t[layer] if layer < len(top_t) else k - 1  # a table too short is refused with its model
        if top_t is None or not k - 1 <= top_t <= e - 1:
            raise ValueError(
                f"routing.top_t ({top_t}) must be in k-1..E-1 = {k - 1}..{e - 1} for k={k} of {e} experts; "
                "choose it there"
            )

    def _check_limited(self) -> None:
        groups, rule = self.routing.num_groups, self.routing
        for e in self.experts_of_layer or [self.num_experts]:
            if groups is None or rule.max_devices is None or groups < 1 or e % groups:
                raise ValueError(
                    f"routing.num_groups ({groups}) must divide the {e} experts into equal groups for rule "
                    "group_limited; choose a divisor"
                )
            for m in rule.max_devices if isinstance(rule.max_devices, list) else [rule.max_devices]:
                if not 1 <= m <= groups or m * (e // groups) < self.top_k:
                    raise ValueError(
                        f"routing.max_devices ({m}) of {groups} groups hold {m * (e // groups)} experts, "
                        f"it must be in 1..{groups} and hold top_k ({self.top_k}); choose another"
                    )

    def _check_groups(self) -> None:
        rule = self.routing
        if rule.device_of_expert is None or rule.max_devices is None:
            raise ValueError("routing.rule c2r_grouped needs a placement and routing.max_devices; give both")
        for name in ("top_t", "max_devices"):
            table = getattr(rule, name)
            if isinstance(table, list) and len(table) != len(rule.device_of_expert):
                raise ValueError(
                    f"routing.{name} has {len(table)} layers, the placement {len(rule.device_of_expert)}; correct it"
                )
        for layer, devices in enumerate(rule.device_of_expert):
            if len(devices) != self.experts_in(layer):
                raise ValueError(
                    f"routing.device_of_expert of layer {layer} has {len(devices)} entries, the layer has "
                    f"{self.experts_in(layer)} experts; make the placement from a profile of this model"
                )
            _, m = rule.in_layer(layer)
            smallest = sorted(devices.count(d) for d in set(devices))[:m]
            if sum(smallest) < self.top_k:
                raise ValueError(
                    f"routing.max_devices ({m}) devices of layer {layer} may hold only {sum(smallest)} "
                    f"experts, fewer than top_k ({self.top_k}); allow more devices per token"
                )


class CondensedLayer(_Part):
    """What the inside of a condensed layer, a dense one, is multiplied by before its last matrix (arXiv:2412.00069).

    Its channels are those of the shared experts, and then those of the experts that stayed, one after the other.
    """

    shared_size: int = 0
    """Channels of the shared experts."""
    gated: bool = False
    """Whether those are multiplied by the sigmoid of a gate."""
    scales: list[float] = []
    """Factors of the experts, which have equally many channels; empty: they are part of the last matrix."""

    def blocks(self, width: int) -> list[tuple[int, float]]:
        """Channels and factors of a layer of `width` channels, those of the shared experts first."""
        rest = width - self.shared_size
        count = len(self.scales)
        each = rest // count if count else rest
        return [(self.shared_size, 1.0), *((each, scale) for scale in self.scales or [1.0])]


class ModelConfig(_Part):
    """A decoder of the LLaMA kind, dense or with MoE layers."""

    vocab_size: int
    hidden_size: int
    """D."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    """Hidden width of the dense FFN (of all experts together in a split model)."""
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    """Hugging Face's rope parameters; types `default`, `linear` and `llama3` are known."""
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    num_labels: int = 0
    """What the head tells apart in a classifier of texts, which is converted and not trained; 0: the vocabulary."""
    attention_bias: bool | Literal["qkv"] = False
    """Biases of attention: of all its matrices, or of all but the last, as in Qwen2."""
    qk_norm: Literal["head", "all"] | None = None
    """RMSNorm of queries and keys before rotation: of each head (Qwen3), or of all heads together (OLMoE)."""
    sliding_window: int | None = None
    """Positions that a token sees, itself among them; None: all before it."""
    mlp_bias: bool = False
    initializer_range: float = 0.02
    moe: MoEConfig | None = None
    """None: every layer has a dense FFN. A model of which all layers were condensed keeps it; see `is_dense`."""
    dense_layers: dict[int, int] = {}
    """Layers of a model with experts whose FFN is dense, and its hidden width; 0: they have no FFN."""
    condensed: dict[int, CondensedLayer] = {}
    """Those of them that had experts before they were condensed."""
    family: str | None = None
    """`model_type` of the Hugging Face family to export to; None: by what the model has."""
    carried: dict[str, Any] = {}
    """Keys of the source's config.json that the engine does not read; written back at export."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads}); "
                "query heads share key heads evenly"
            )
        if self.num_labels < 0 or (self.num_labels and self.tie_embeddings):
            raise ValueError(
                f"num_labels ({self.num_labels}) must be at least 0, and a head of labels is not the embedding "
                f"(tie_embeddings {self.tie_embeddings}); correct one of them"
            )
        routing = self.moe.routing if self.moe else RoutingConfig()
        tables = {f"routing.{name}": getattr(routing, name) for name in _BY_LAYER}
        count = 0 if self.moe is None else self.num_layers - len(self.dense_layers)
        if self.moe is not None:
            per_layer = ("score_scale", "expert_sizes", "experts_of_layer")
            tables |= {f"moe.{name}": getattr(self.moe, name) for name in per_layer}
        for name, table in tables.items():
            if isinstance(table, list) and len(table) != count:
                raise ValueError(f"{name} has {len(table)} layers, the model has {count}; make it for this model")
        for layer, width in self.dense_layers.items():
            if self.moe is None or not 0 <= layer < self.num_layers or width < 0:
                raise ValueError(
                    f"dense_layers names layer {layer} of width {width}, they must be in a model with experts, in "
                    f"0..{self.num_layers - 1}, of width 0 at least; correct it"
                )
        for layer, one in self.condensed.items():
            rest = self.dense_layers.get(layer, -1) - one.shared_size
            if rest < 0 or (one.scales and rest % len(one.scales)) or (one.gated and not one.shared_size):
                raise ValueError(
                    f"condensed layer {layer} has {one.shared_size} channels of shared experts and {len(one.scales)} "
                    f"scales, its width in dense_layers is {self.dense_layers.get(layer)}, which must have room for "
                    "both; correct one of them"
                )
        if self.moe is not None and count == 0 and not self.condensed:
            raise ValueError("dense_layers names every layer of a model with experts; leave one out, or leave out moe")
        return self

    @property
    def head_size(self) -> int:
        """Rows of the head."""
        return self.num_labels or self.vocab_size

    def check_predicts(self, where: str) -> None:
        """UserError for a classifier, of which no next token can be asked."""
        if self.num_labels:
            raise UserError(
                f"{where} tells {self.num_labels} labels apart and predicts no token; it can be converted, exported "
                "and verified: give a language model"
            )

    @property
    def is_dense(self) -> bool:
        """Whether no layer has experts: there never were any, or all that had some are condensed."""
        return not self.moe_layers()

    def moe_of(self, layer: int) -> MoEConfig | None:
        """The mixture of experts of one layer; None: its FFN is dense."""
        if self.moe is None or layer in self.dense_layers:
            return None
        return self.moe.in_layer(self.moe_index(layer))

    def dense_size(self, layer: int) -> int:
        """Hidden width of the FFN of a dense layer."""
        return self.dense_layers.get(layer, self.intermediate_size)

    def moe_layers(self) -> list[int]:
        """The layers with experts, ascending: what tables, profiles and placements have a row for."""
        return [] if self.moe is None else [n for n in range(self.num_layers) if n not in self.dense_layers]

    def experts_of_layer(self) -> list[int]:
        """[L]: how many experts each of them has."""
        return [] if self.moe is None else [self.moe.experts_in(row) for row in range(len(self.moe_layers()))]

    def moe_index(self, layer: int) -> int:
        """Which row of a table a layer with experts has."""
        return layer - sum(dense < layer for dense in self.dense_layers)


def in_words(experts_of_layer: Sequence[int]) -> str:
    """`4 layers of 8 experts`, or `3 layers of 4, 4, 8 experts`."""
    each = ", ".join(map(str, experts_of_layer if len(set(experts_of_layer)) > 1 else experts_of_layer[:1]))
    return f"{len(experts_of_layer)} layers of {each} experts"


def check_lists(rows: list[list[int]], num_experts: int, *, where: str) -> None:
    """Raise ValueError unless every row i is a permutation of 0..E-1 with i in last place."""
    if len(rows) != num_experts:
        raise ValueError(f"collaboration list of {where} has {len(rows)} rows, expected {num_experts}; one per expert")
    for i, row in enumerate(rows):
        if sorted(row) != list(range(num_experts)) or row[-1] != i:
            raise ValueError(
                f"collaboration list of {where}, expert {i} must be a permutation of 0..{num_experts - 1} that ends "
                f"with {i}, got {row[:8]}{'...' if len(row) > 8 else ''}; write it again with `ep-engine profile`"
            )


def first_sentence(error: ValidationError) -> str:
    """The first problem pydantic found, as one sentence that begins with the key."""
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    text = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{key} is missing; add it"
    if problem["type"] == "json_invalid":
        return f"{text}; make the file again"
    if problem["type"] == "value_error":
        return text
    return f"{f'{key}: ' if key else ''}{text}, got {problem['input']!r}; correct the value"


def read_model_config(path: Path) -> ModelConfig:
    """Read `model.json`; UserError if it is missing or not a valid model."""
    try:
        return ModelConfig.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} holds no engine checkpoint (no {path.name}); make one with "
            "`python -m checkpoint_tools convert`"
        ) from None
    except ValidationError as error:
        raise UserError(f"{path}: {first_sentence(error)}") from None
