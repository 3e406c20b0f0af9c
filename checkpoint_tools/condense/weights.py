"""Step 1: the weight that each expert would have for every token, its mean over the tokens that choose it.

The weight is the one that the model gives it: for DeepSeekMoE and Qwen1.5-MoE the probability among all experts, not
divided by the sum of the chosen. One pass over the texts, of which ranks have shares; both sums come by scattered
additions.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoint_tools.condense.published_json import Shape, Weights, write_weights
from checkpoint_tools.condense.texts import Texts, attended_texts, checked, embedded, read_texts
from checkpoint_tools.condense.unfinished import ranks_of
from checkpoint_tools.forward import feed_forward, normed, routed
from checkpoint_tools.source import Source, open_source
from ep_engine.attention import Positions
from ep_engine.mesh import World
from ep_engine.progress import bar
from ep_engine.router import Routing


def run_weights(
    folder: Path,
    corpus: Sequence[Path],
    out: Path,
    *,
    max_length: int | None = None,
    max_texts: int | None = None,
    timeout_s: float = 300.0,
) -> tuple[Weights, Texts] | None:
    """Write the weights of a model's experts on a corpus, and give them with the texts, on all ranks that torchrun has
    started; None on others than the first.

    Raises:
        UserError: the model has no experts or no tokenizer, or the corpus is empty.
        Fault: something that the model computes is not a number.
    """
    model, world = open_source(folder), World.from_environment()
    shape = Shape.of(model.config)
    texts = read_texts(model, corpus, max_length, max_texts)
    with (
        ranks_of(world, timeout_s) as group,
        bar("layers", model.config.num_layers, show=world.rank == 0) as advance,
    ):
        found = count_weights(model, texts.of_rank(world.rank, world.size), advance)
        for summed in (found.sum_LE, found.count_LE) if group is not None else ():
            dist.all_reduce(summed, group=group)
    if world.rank != 0:
        return None
    write_weights(out, found, shape)
    return found, texts


def count_weights(model: Source, texts: Texts, advance: Callable[[int], None] = lambda _: None) -> Weights:
    """Sums and counts of every expert of every layer with experts."""
    shape = Shape.of(model.config)
    sum_LE = torch.zeros(shape.layers, shape.experts, dtype=torch.float64)
    count_LE = torch.zeros(shape.layers, shape.experts, dtype=torch.int64)
    for index, chosen in enumerate(routings(model, texts, advance) if texts.ids else ()):
        ids_N = chosen.ids_TK.flatten()
        sum_LE[index].scatter_add_(0, ids_N, chosen.weights_TK.flatten().double())
        count_LE[index].scatter_add_(0, ids_N, torch.ones_like(ids_N))
    return Weights(sum_LE, count_LE)


@torch.no_grad()
def routings(model: Source, texts: Texts, advance: Callable[[int], None] = lambda _: None) -> Iterator[Routing]:
    """What the router of every layer with experts says of all tokens; `advance` is told how many layers are done."""
    x_TD, positions = embedded(model, texts), Positions(model.config)
    for layer in range(model.config.num_layers):
        x_TD = checked(attended_texts(x_TD, texts, model, positions, layer), texts, f"attention of layer {layer}")
        if model.config.moe_of(layer) is not None:
            h_TD = normed(x_TD, model.config, model.tensors, f"layers.{layer}.ffn_norm")
            yield routed(h_TD, model.config, layer, model.tensors)
        added_TD = feed_forward(x_TD.unsqueeze(0), model.config, model.tensors, layer)[0]
        x_TD = checked(x_TD + added_TD, texts, f"layer {layer}")
        advance(layer + 1)
