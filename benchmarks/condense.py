"""What does one cached pass per layer save, against the published search, a forward of the model for every candidate?

    python -m benchmarks.condense [--json OUT]

A model like DeepSeekMoE (64 experts, top-6, 2 shared, no experts in the first layer), small, with random weights, and
texts of random tokens: this measures the search, and says nothing of how well a condensed model does. Both searches
choose by the same function of hidden states; tests compare it with another. Forwards of the brute force are counted by
a hook on the model.
"""

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import write_results
from checkpoint_tools.condense.experts import choose_experts
from checkpoint_tools.condense.layers import Kept, Search, order_layers
from checkpoint_tools.condense.objectives import distances_to
from checkpoint_tools.condense.texts import Texts
from checkpoint_tools.condense.weights import count_weights
from checkpoint_tools.forward import beside, expert_output
from checkpoint_tools.source import Source
from ep_engine.deferred import Tensors
from ep_engine.entries import Shard, expected_entries
from ep_engine.initial import initialise
from ep_engine.model import Decoder
from ep_engine.model_config import ModelConfig, MoEConfig
from ep_engine.parallelize import entries_of


def random_model(hidden: int, layers: int) -> Source:
    """In memory."""
    moe = MoEConfig(
        num_experts=64,
        top_k=6,
        expert_hidden_size=hidden // 2,
        gate="linear",
        score="softmax",
        shared_hidden_size=hidden,
    )
    config = ModelConfig(
        vocab_size=512, hidden_size=hidden, num_layers=layers + 1, num_heads=4, num_kv_heads=4, head_dim=hidden // 4,
        intermediate_size=4 * hidden, initializer_range=0.1, moe=moe, dense_layers={0: 4 * hidden},
    )  # fmt: skip
    tensors = {name: torch.empty(shape) for name, shape in expected_entries(config).items()}
    initialise({name: Shard(tensor, tensor, 0) for name, tensor in tensors.items()}, config, seed=0)
    return Source(Path("random"), "engine", None, config, Tensors.of(tensors))


class BruteForce:
    """The published search, whose candidates are forwards of the whole model."""

    def __init__(self, source: Source, texts: Texts) -> None:
        self.source, self.tokens_BS = source, torch.stack(texts.ids)
        self.model = Decoder(source.config)
        for name, shard in entries_of([self.model]).items():
            shard.tensor.copy_(source.tensors[name])
        self.forwards = 0
        self.model.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.forwards += 1

    @torch.no_grad()
    def choose(self, index: int, weight_E: Tensor, count: int) -> list[int]:
        """The experts of one layer."""
        layer = self.source.config.moe_layers()[index]
        block = self.model.layers[str(layer)].moe
        watched = self.model.norm if layer == self.source.config.num_layers - 1 else self.model.layers[str(layer)]
        seen: list[Tensor] = []

        def keep(_module: object, _given: object, out: Tensor | tuple[Tensor, object]) -> None:
            seen[:] = [(out[0] if isinstance(out, tuple) else out).flatten(0, 1)]

        hook, usual = watched.register_forward_hook(keep), block.forward
        self.model(self.tokens_BS)
        distance, chosen = distances_to("js", seen[0]), list[int]()
        while len(chosen) < count:
            found = []
            for e in (e for e in range(len(weight_E)) if e not in chosen and not weight_E[e].isnan()):
                block.forward = self._condensed(layer, [*chosen, e], weight_E)
                self.model(self.tokens_BS)
                found.append((float(distance(seen[0]).double().mean()), e))
            chosen.append(min(found)[1])
        block.forward = usual
        hook.remove()
        return chosen

    def _condensed(self, layer: int, experts: list[int], weight_E: Tensor) -> Callable[..., tuple[Tensor, None]]:
        moe, tensors = self.source.config.moe_of(layer), self.source.tensors
        assert moe is not None, "it is searched"

        def forward(x_TD: Tensor, _chosen: object = None) -> tuple[Tensor, None]:
            y_TD = beside(x_TD, moe, layer, tensors)
            for e in experts:
                y_TD = y_TD + float(weight_E[e]) * expert_output(x_TD, layer, e, tensors)
            return y_TD, None

        return forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = (("hidden", 64), ("layers", 8), ("texts", 8), ("length", 64), ("experts", 6))
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    source = random_model(args.hidden, args.layers)
    generator = torch.Generator().manual_seed(0)
    texts = Texts(tuple(torch.randint(512, (args.texts, args.length), generator=generator)))
    begin = time.perf_counter()
    weights = count_weights(source, texts).means
    counted = time.perf_counter()
    lists = [choice.experts for _, choice in choose_experts(source, texts, weights, args.experts)]
    searched = time.perf_counter()
    brute = BruteForce(source, texts)
    found = [brute.choose(index, weights[index], args.experts) for index in range(args.layers)]
    forced = time.perf_counter()
    search = Search(source, texts, Kept(lists, weights))
    order_layers(search, args.layers, args.layers)
    ordered = time.perf_counter()
    # A forward for every candidate of every step, as published.
    whole = (1 + args.layers * (args.layers + 1) // 2) * source.config.num_layers
    results = {
        "weights": {"seconds": counted - begin},
        "experts": {
            "seconds": searched - counted,
            "seconds_of_brute_force": forced - searched,
            "search_speedup": (forced - searched) / (searched - counted),
            "forward_passes": 1,
            "forward_passes_of_brute_force": brute.forwards,
            "forward_passes_ratio": brute.forwards / args.layers,  # one pass of a layer each
            "same_choices": lists == found,
        },
        "layers": {
            "seconds": ordered - forced,
            "layer_forwards": search.layer_forwards,
            "layer_forwards_of_brute_force": whole,
        },
        "all": {"peak_resident_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000},
    }
    setting = {name: getattr(args, name) for name, _ in sizes}
    write_results(args.json, "search for experts and layers, random weights and tokens, float32", setting, results)


if __name__ == "__main__":
    main()
