"""Dense traffic: bytes that leave a rank in a step beside the rows of experts, by kind and link tier.

Counted as if every rank sent to every other directly; a ring sends as many bytes in all. Losses, norms and router
statistics, a few numbers each, are left out.
"""

from collections import Counter

from ep_engine.ledger import TIERS
from ep_engine.planning.expert_traffic import Groups
from ep_engine.planning.memory import Step
from ep_engine.planning.weight_groups import frozen_of

KINDS = ("gather_weights", "reduce_gradients", "tensor_parallel", "pipeline")
_FLOAT = 4


def dense_traffic(step: Step, groups: Groups) -> dict[str, dict[str, int]]:
    """Bytes of one step by kind and tier; `step` has been walked."""
    rank = step.rank
    found: Counter[tuple[str, str]] = Counter()

    def to_each(kind: str, axis: str, num_bytes: int) -> None:
        for other in groups.around(rank, axis):
            if other != rank:
                found[kind, groups.tier(rank, other)] += num_bytes

    for axis in ("dp", "edp", "stage"):
        to_each("gather_weights", axis, step.gathers[axis])
        to_each("reduce_gradients", axis, step.reductions[axis])
    to_each("tensor_parallel", "tp", _exchanges_of_sequence(step) * step.parts * step.part.hidden)
    pipeline = groups.around(rank, "pp")
    for stage in step.weights:
        for neighbour in (stage - 1, stage + 1):
            if 0 <= neighbour <= step.stages.last:
                other = pipeline[step.stages.rank_of_stage[neighbour]]
                if other != rank:
                    found["pipeline", groups.tier(rank, other)] += step.parts * step.part.hidden
    if step.model.tie_embeddings and step.size > 1 and "embed.weight" not in frozen_of(step.config, step.model):
        embedding = step.model.vocab_size * step.model.hidden_size // step.part.tp // step.dp
        to_each("reduce_gradients", "ends", embedding * _FLOAT)
    return {kind: {tier: found[kind, tier] for tier in TIERS} for kind in KINDS}


def _exchanges_of_sequence(step: Step) -> int:
    """How often a part's hidden states are gathered along the sequence, or summed and scattered; there and back."""
    layers = (layer for weights in step.weights.values() for layer in weights.layers)
    ends = 2 * ((0 in step.weights) + (step.stages.last in step.weights))
    if 0 in step.weights and "embed.weight" in frozen_of(step.config, step.model):
        ends -= 1  # nothing goes back to it
    return sum(_exchanges_of_layer(step, layer) for layer in layers) + ends


def _exchanges_of_layer(step: Step, layer: int) -> int:
    moe, recompute = step.model.moe_of(layer), step.config.train.recompute
    # Each FFN that is no part of the experts, if only beside them, reads all of the sequence, as attention does.
    dense = (
        int(step.model.dense_size(layer) > 0) if moe is None else int(moe.shared_hidden_size > 0) + moe.residual_experts
    )
    if recompute == "selective":
        return 4 + 4 * dense + 1 + (dense if moe is not None else 0)  # what attention and those beside experts read
    # Computed again: all but the last, after which nothing is kept.
    return 4 + 4 * dense + (2 + dense if recompute == "full" else 0)
