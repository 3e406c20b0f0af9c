"""What a model is: the sizes, the routing rule and its tables. Stored as `model.json` in every checkpoint.

Nothing here says how the model is run (ranks, steps, data): that is `config.py`.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ep_engine.errors import UserError


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RoutingConfig(_Part):
    """The selection rule of every MoE layer and the tables it reads."""

    rule: Literal["topk", "group_limited", "c2r", "c2r_grouped"] = "topk"
    top_t: int | list[int] | None = None
    """T of C2R: how many collaborators of the top-1 expert are candidates, in k-1..E-1; or that of every layer."""
    lists: list[list[list[int]]] | None = None
    """[L][E][E]: row i is a permutation of the experts, closest collaborator of i first, i itself last."""
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
    """E."""
    top_k: int
    """K, experts chosen per token."""
    expert_hidden_size: int
    """F, hidden width of one expert."""
    gate: Literal["linear", "mlp"] = "mlp"
    """`linear`: one (E, D) matrix. `mlp`: (E, D), tanh, (E, E), as in LLaMA-MoE v1."""
    score: Literal["softmax_of_chosen", "softmax", "sigmoid"] = "softmax_of_chosen"
    """Combine weights before all else: softmax over the K chosen, softmax over all experts, or a sigmoid each."""
    renormalise: bool = False
    """Whether the weights of the K chosen are divided by their sum."""
    score_scale: float = 1.0
    """Factor on the combine weights; E / K keeps the magnitude of a split dense layer (specification of LLaMA-MoE)."""
    shared_hidden_size: int = 0
    """Hidden width of the dense SwiGLU that every token goes through beside its experts; 0: none."""
    shared_gate: bool = False
    """Whether its output is multiplied by the sigmoid of a gate, as in Qwen2-MoE."""
    routing: RoutingConfig = RoutingConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        e, k, rule = self.num_experts, self.top_k, self.routing
        if not 1 <= k <= e:
            raise ValueError(f"moe.top_k ({k}) must be in 1..moe.num_experts ({e}); choose fewer experts per token")
        if self.shared_gate and self.shared_hidden_size == 0:
            raise ValueError("moe.shared_gate is set and moe.shared_hidden_size is 0: there is nothing to gate")
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
        for top_t in rule.top_t if isinstance(rule.top_t, list) else [rule.top_t]:
            if top_t is None or not k - 1 <= top_t <= e - 1:
                raise ValueError(
                    f"routing.top_t ({top_t}) must be in k-1..E-1 = {k - 1}..{e - 1} for k={k} of {e} experts; "
                    "choose it there"
                )
        for layer, rows in enumerate(rule.lists):
            check_lists(rows, e, where=f"layer {layer}")
        if rule.rule == "c2r_grouped":
            self._check_groups()
        return self

    def _check_limited(self) -> None:
        groups, rule = self.routing.num_groups, self.routing
        if groups is None or rule.max_devices is None or groups < 1 or self.num_experts % groups:
            raise ValueError(
                f"routing.num_groups ({groups}) must divide the {self.num_experts} experts into equal groups for rule "
                "group_limited; choose a divisor"
            )
        for m in rule.max_devices if isinstance(rule.max_devices, list) else [rule.max_devices]:
            if not 1 <= m <= groups or m * (self.num_experts // groups) < self.top_k:
                raise ValueError(
                    f"routing.max_devices ({m}) of {groups} groups hold {m * (self.num_experts // groups)} experts, "
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
            if len(devices) != self.num_experts:
                raise ValueError(
                    f"routing.device_of_expert of layer {layer} has {len(devices)} entries, the layer has "
                    f"{self.num_experts} experts; make the placement from a profile of this model"
                )
            _, m = rule.in_layer(layer)
            smallest = sorted(devices.count(d) for d in set(devices))[:m]
            if sum(smallest) < self.top_k:
                raise ValueError(
                    f"routing.max_devices ({m}) devices of layer {layer} may hold only {sum(smallest)} "
                    f"experts, fewer than top_k ({self.top_k}); allow more devices per token"
                )


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
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    moe: MoEConfig | None = None
    """None: every layer has a dense FFN."""
    carried: dict[str, Any] = {}
    """Keys of the source's config.json that the engine does not read; written back at export."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads}); "
                "query heads share key heads evenly"
            )
        routing = self.moe.routing if self.moe else RoutingConfig()
        for name in ("top_t", "max_devices", "lists", "device_of_expert"):
            table = getattr(routing, name)
            if isinstance(table, list) and len(table) != self.num_layers:
                raise ValueError(
                    f"routing.{name} has {len(table)} layers, the model has {self.num_layers}; make it for this model"
                )
        return self


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
