"""What tests of condensing share: small DeepSeekMoE and Qwen-MoE models with a tokenizer, and plain forwards in fp64.

A plain model is transformers' own, or its LLaMA with the plain layers of family_cases.py; a condensed layer is made of
it by replacing the FFN's forward, so nothing here is the code that is tested.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.family_cases import DEEPSEEK, plain_folder, plain_model, transformers_model
from tests.texts import VOCABULARY, add_tokenizer, write_documents

PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "cd_moe"
KINDS = ("deepseek", "qwen")
LENGTH = 16


def condensable(folder: Path, kind: str, *, seed: int = 0, moe_layers: int = 3, **more: Any) -> Path:
    """A random model of a kind in `folder / model`, its tokenizer beside the weights."""
    from safetensors.torch import save_file

    at = folder / "model"
    if kind == "deepseek":
        plain_folder(at, {**DEEPSEEK, "vocab_size": VOCABULARY, "num_hidden_layers": 1 + moe_layers, **more})
    else:
        name = "qwen2_moe" if kind == "qwen" else kind  # of family_cases.py; with seed 0 any of them
        transformers_model(name, vocab_size=VOCABULARY, num_hidden_layers=moe_layers, **more).save_pretrained(at)
    if seed:
        model = plain_forward(at, torch.float32)
        generator = torch.Generator().manual_seed(seed)
        for weight in model.parameters():
            spread = 0.5 + 0.2 * torch.randn(weight.shape, generator=generator)
            weight.data.copy_(spread if weight.ndim == 1 else 0.2 * torch.randn(weight.shape, generator=generator))
        if kind == "deepseek":
            state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
            save_file(state, at / "model.safetensors", metadata={"format": "pt"})
        else:
            model.save_pretrained(at)
    add_tokenizer(at)
    return at


def corpus(folder: Path, count: int = 6) -> Path:
    """A few documents."""
    return write_documents(folder / "corpus", count)


def plain_forward(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """The model of a folder, by code that is not ours."""
    import json

    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, __version__

    config = json.loads((folder / "config.json").read_text())
    if config["architectures"] == ["DeepseekForCausalLM"]:
        model = plain_model(config)
        model.load_state_dict(load_file(folder / "model.safetensors"))
    else:
        plainly = {} if __version__.startswith("4.") else {"experts_implementation": "eager"}
        model = AutoModelForCausalLM.from_pretrained(folder, **plainly)
    return model.to(dtype).eval()


def moe_blocks(model: Any) -> list[tuple[int, Any]]:
    """Decoder layer and FFN of every layer with experts."""
    return [(i, layer.mlp) for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]


def experts_of(block: Any) -> list[Any]:
    """One function for each routed expert."""
    if not hasattr(block.experts, "gate_up_proj"):
        return list(block.experts)

    def expert(number: int) -> Any:
        def run(x: Tensor) -> Tensor:
            gate, up = (x @ block.experts.gate_up_proj[number].T).chunk(2, dim=-1)
            return (torch.nn.functional.silu(gate) * up) @ block.experts.down_proj[number].T

        return run

    return [expert(number) for number in range(len(block.experts.gate_up_proj))]


def shared_of(block: Any, x: Tensor) -> Tensor:
    """What every token goes through."""
    if hasattr(block, "shared_experts"):
        return block.shared_experts(x)
    if not hasattr(block, "shared_expert"):
        return torch.zeros_like(x)
    return torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)


def condense_by_hand(block: Any, experts: Sequence[int], weights: Sequence[float]) -> None:
    """Replace a layer's forward: shared experts, and some others with fixed weights, for every token."""
    run = experts_of(block)

    def forward(x: Tensor) -> Tensor:
        return shared_of(block, x) + sum(w * run[e](x) for e, w in zip(experts, weights, strict=True))

    block.forward = forward


def restore(block: Any) -> None:
    """Undo `condense_by_hand`."""
    block.__dict__.pop("forward", None)


def js_by_hand(original: Tensor, other: Tensor) -> float:
    """specs/cd_moe.md 4, for one text: (T, D) each."""
    p, q = original.softmax(-1), other.softmax(-1)
    m = (p + q) / 2
    return (_kl(p, m) + _kl(q, m)) / 2


def _kl(u: Tensor, v: Tensor) -> float:
    eps = 1e-10
    return float(((u + eps) * ((u + eps).log() - (v + eps).log())).sum()) / len(u)


BY_HAND: dict[str, Callable[[Tensor, Tensor], float]] = {
    "js": js_by_hand,
    "kl": lambda original, other: _kl(original.softmax(-1), other.softmax(-1)),
    "mse": lambda original, other: float(((original - other) ** 2).mean()),
    "cosine": lambda a, b: float(1 - ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()),
}


def token_of_last_text(ids: Sequence[Tensor]) -> int:
    """One that no other text has; fails if there is none."""
    return min(set(ids[-1].tolist()) - {token for text in ids[:-1] for token in text.tolist()})
