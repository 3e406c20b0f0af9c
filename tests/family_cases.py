"""Small random models of every family, as transformers writes them or, where it does not know one, as its keys say."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.small_models import SIZES

# Of no family's defaults, so that a key which is not read shows.
_COMMON = {**SIZES, "rms_norm_eps": 3e-5, "rope_theta": 5e3, "max_position_embeddings": 96}
_QWEN_MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 7, "head_dim": 12}),
    "mistral_no_window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 9}),
    "qwen2_moe": ("Qwen2Moe", {**_QWEN_MOE, "shared_expert_intermediate_size": 24}),
    "qwen2_moe_with_dense": (
        "Qwen2Moe",
        {**_QWEN_MOE, "num_hidden_layers": 5, "mlp_only_layers": [1], "decoder_sparse_step": 2, "norm_topk_prob": True},
    ),
    "qwen3_moe": ("Qwen3Moe", {**_QWEN_MOE, "norm_topk_prob": True, "head_dim": 16, "mlp_only_layers": [0]}),
    "qwen3_moe_biased": ("Qwen3Moe", {**_QWEN_MOE, "head_dim": 8, "attention_bias": True}),
    "olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 20}),
    "olmoe_renormalised": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}),
}


def transformers_model(name: str, **more: Any) -> nn.Module:
    """A random model of one of CONFIGS, float32."""
    import transformers

    kind, own = CONFIGS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**_COMMON, **own, **more})
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter_name, weight in model.named_parameters():
            if parameter_name.endswith("bias") or "norm" in parameter_name:  # initialised to constants
                weight.normal_(mean=0.5, std=0.2)
            elif "gate" in parameter_name or "experts" in parameter_name:  # some are left empty
                weight.normal_(std=0.2)
    return model.eval()


def family_folder(folder: Path, name: str, **save: Any) -> Path:
    """The model in a folder."""
    model: Any = transformers_model(name)
    model.save_pretrained(folder, **save)
    return folder


DEEPSEEK = {
    **{key: value for key, value in _COMMON.items() if key != "rope_theta"},
    "architectures": ["DeepseekForCausalLM"],
    "model_type": "deepseek",
    "num_hidden_layers": 3,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "rope_theta": 5e3,
    "hidden_act": "silu",
}
MOLLAMA = {
    **_COMMON,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 5,
    "num_experts": 4,
    "expert_top_k": 2,
    "moe_start_layer": 1,
    "moe_layer_freq": 2,
    "first_init": False,
    "hidden_act": "silu",
}


class PlainFFN(nn.Module):
    """SwiGLU."""

    def __init__(self, d: int, f: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(d, f, bias=False), nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class PlainDeepseek(nn.Module):
    """A DeepSeekMoE layer as its paper has it (arXiv:2401.06066 eq. 9-11), under the names of its checkpoints."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        d, f, e = config["hidden_size"], config["moe_intermediate_size"], config["n_routed_experts"]
        self.gate = nn.Linear(d, e, bias=False)
        self.experts = nn.ModuleList(PlainFFN(d, f) for _ in range(e))
        self.shared_experts = PlainFFN(d, config["n_shared_experts"] * f)
        self.top_k, self.renormalise = config["num_experts_per_tok"], config["norm_topk_prob"]

    def forward(self, x: Tensor) -> Tensor:
        share = self.gate(x).softmax(dim=-1)
        kept, ids = share.topk(self.top_k, dim=-1)
        if self.renormalise:
            kept = kept / (kept.sum(dim=-1, keepdim=True) + 1e-20)
        weights = torch.zeros_like(share).scatter(-1, ids, kept)
        routed = sum(weights[..., e, None] * expert(x) for e, expert in enumerate(self.experts))
        return routed + self.shared_experts(x)


class PlainMoLlama(nn.Module):
    """A MoLlama layer by its formulas: three gates, raw softmax weights, experts in stacked transposed tensors."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        d, f, e = config["hidden_size"], config["intermediate_size"], config["num_experts"]
        r, kind = config.get("gating_size", 256), config["gate_type"]
        self.kind, self.top_k = kind, config["expert_top_k"]
        self.gate = nn.Module()
        if kind == "linear":
            self.gate.w_gate = nn.Sequential(nn.Linear(d, e, bias=False))
        elif kind == "mlp":
            self.gate.w_gate = nn.Sequential(nn.Linear(d, r), nn.GELU(), nn.Dropout(0.0), nn.Linear(r, e, bias=False))
        else:
            self.gate.w_gate = nn.Linear(d, r, bias=False)
            self.gate.expert_centroids = nn.Parameter(torch.empty(e, r))
            self.gate.temperature = nn.Parameter(torch.empty(1))
        for name, shape in (("gate_proj", (e, d, f)), ("up_proj", (e, d, f)), ("down_proj", (e, f, d))):
            stacked = nn.Module()
            stacked.weight = nn.Parameter(torch.empty(shape))
            self.add_module(name, stacked)

    def logits(self, x: Tensor) -> Tensor:
        z = self.gate.w_gate(x)
        if self.kind != "gmm":
            return z
        direction = nn.functional.normalize(z, dim=-1)
        return self.gate.temperature.exp() * direction @ nn.functional.normalize(self.gate.expert_centroids, dim=-1).T

    def forward(self, x: Tensor) -> Tensor:
        share = self.logits(x).softmax(dim=-1)
        kept, ids = share.topk(self.top_k, dim=-1)
        weights = torch.zeros_like(share).scatter(-1, ids, kept)
        y = torch.zeros_like(x)
        for e in range(share.shape[-1]):
            hidden = nn.functional.silu(x @ self.gate_proj.weight[e]) * (x @ self.up_proj.weight[e])
            y = y + weights[..., e, None] * (hidden @ self.down_proj.weight[e])
        return y


def plain_model(config: dict[str, Any]) -> Any:
    """A DeepSeekMoE or MoLlama model: transformers' LLaMA with the plain layers in the place of its FFNs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    own = ("architectures", "model_type")
    model: Any = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if k not in own}))
    for i, layer in enumerate(model.model.layers):
        if "n_routed_experts" in config and i >= config["first_k_dense_replace"]:
            layer.mlp = PlainDeepseek(config)
        start = config.get("moe_start_layer", len(model.model.layers))
        if i >= start and (i - start) % config["moe_layer_freq"] == 0:
            layer.mlp = PlainMoLlama(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(mean=0.5, std=0.2) if weight.ndim == 1 else weight.normal_(std=0.2)
    return model.eval()


def plain_folder(folder: Path, config: dict[str, Any]) -> Path:
    """Such a model in a folder."""
    folder.mkdir(parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in plain_model(config).state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
