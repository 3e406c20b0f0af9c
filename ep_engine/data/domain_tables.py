"""Published weights of domains, and losses that they should come down to, by name."""

from typing import Literal

NamedWeights = Literal["uniform", "llama", "sheared_llama", "sheared_llama_pruning", "sheared_llama_continued"]
NamedLosses = Literal["llama2_7b", "sheared_llama_1.3b", "sheared_llama_2.7b"]
DynamicRule = Literal["sheared_llama", "sheared_llama_paper"]

_SLIMPAJAMA = ("en_cc", "en_c4", "github", "en_wikipedia", "en_book", "en_arxiv", "en_stack")  # LLaMA-MoE's domains
_REDPAJAMA = ("cc", "github", "book", "stackexchange", "wiki", "arxiv", "c4-rp")  # those of LLM-Shearing
WEIGHTS: dict[str, dict[str, float]] = {
    "llama": dict(zip(_SLIMPAJAMA, (0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02), strict=True)),
    "sheared_llama": dict(zip(_SLIMPAJAMA, (0.361, 0.492, 0.008, 0.031, 0.091, 0.007, 0.01), strict=True)),
    # What LLM-Shearing's two phases begin with.
    "sheared_llama_pruning": dict(zip(_REDPAJAMA, (0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15), strict=True)),
    "sheared_llama_continued": dict(
        zip(_REDPAJAMA, (0.2192, 0.0002, 0.0791, 0.0064, 0.0096, 0.001, 0.6845), strict=True)
    ),
}
LOSSES: dict[str, dict[str, float]] = {
    "llama2_7b": dict(
        zip(
            _SLIMPAJAMA,
            (
                1.6916865110397339,
                2.074881076812744,
                0.6984495520591736,
                1.5899001359939575,
                1.925248146057129,
                1.2408167123794556,
                1.4974864721298218,
            ),
            strict=True,
        )
    ),
    "sheared_llama_1.3b": dict(zip(_REDPAJAMA, (1.9643, 0.7459, 2.1393, 1.6117, 1.7590, 1.4449, 2.1251), strict=True)),
    "sheared_llama_2.7b": dict(zip(_REDPAJAMA, (1.8712, 0.6883, 2.0325, 1.5353, 1.6297, 1.3560, 2.0328), strict=True)),
}
