"""Work: operations and moved bytes of a step on one rank, by formulas, and how long a device is busy with them.

A product of (m, k) and (k, n) is 2 m k n operations, once forward and twice backward. Attention computes the half of
its scores that is not in the future, and its backward computes them again. What neither is, reads and writes memory:
about six times what is kept for the backward, rows into messages and out of them, and what AdamW reads and writes.
benchmarks/rates.py measures a device by the same counts.

Shape letters as in activations.py.
"""

from dataclasses import dataclass

from ep_engine.planning.activations import Kept, Part
from ep_engine.planning.cluster import Device
from ep_engine.planning.expert_traffic import Passed

MOVED_PER_KEPT = 6  # written and read in a forward, read again and its gradient written and read twice in a backward
MOVED_PER_SENT = 4 * 4  # in each of four exchanges read, written into a message, read from one and written
MOVED_PER_LOGIT = 6 * 4
MOVED_BY_ADAMW = 7 * 4  # weight, gradient and both moments are read, all but the gradient written
PASSES = 3  # a forward, and a backward for inputs and for weights
ATTENTION_PASSES = 3.5


@dataclass(frozen=True)
class Work:
    """Operations, and bytes that are moved."""

    dense: float = 0.0
    attention: float = 0.0
    experts: float = 0.0
    moved: float = 0.0

    def ms(self, device: Device) -> float:
        """How long a device is busy with it."""
        tera = self.dense / device.dense_tflops + self.attention / device.attention_tflops
        tera += self.experts / device.experts_tflops
        return tera * 1e-9 + self.moved / device.moved_gb_per_s * 1e-6


def of_layer(part: Part, layer: int, kept: Kept) -> Work:
    """A part's forward and backward through a layer, all but the experts."""
    model, recompute = part.model, part.config.train.recompute
    d, tokens, tp = model.hidden_size, part.tokens, part.tp
    again = {"none": 0.0, "selective": 0.0, "full": 1.0}[recompute]
    weights = 2 * d * (model.num_heads + model.num_kv_heads) * model.head_dim // tp
    moe = model.moe_of(layer)
    if moe is None:
        weights += 3 * d * model.dense_size(layer) // tp
    else:
        inside = moe.gate_hidden_size or moe.num_experts
        gate = d * inside + (0 if moe.gate == "linear" else inside * moe.num_experts)
        weights += 3 * d * moe.beside_hidden_size // tp + gate // tp
    scores = 2 * tokens * part.config.data.sequence_length * model.num_heads * model.head_dim // tp
    return Work(
        dense=2 * tokens * weights * (PASSES + again),
        attention=scores * (ATTENTION_PASSES + (recompute != "none")),
        moved=MOVED_PER_KEPT * (kept.residual + kept.attention + kept.ffn),
    )


def of_experts(part: Part, passed: Passed, kept: Kept) -> Work:
    """A part's forward and backward through what came to the experts of a rank."""
    moe = part.model.moe
    assert moe is not None, "rows have come to experts"
    again = {"none": 0.0, "selective": 2 / 3, "full": 1.0}[part.config.train.recompute]  # 2 / 3: gate and up
    width = moe.expert_hidden_size // part.config.parallel.expert_tensor_parallel_size
    sent = passed.sent * part.model.hidden_size * part.itemsize
    return Work(
        experts=6 * passed.copies * part.model.hidden_size * width * (PASSES + again),
        moved=MOVED_PER_KEPT * (kept.rows + kept.gate_up) + MOVED_PER_SENT * sent,
    )


def of_head(part: Part) -> Work:
    """The head and the loss of a part, forward and backward."""
    return Work(dense=2 * PASSES * part.logits * part.model.hidden_size, moved=MOVED_PER_LOGIT * part.logits)


def of_optimizer(weights: int) -> Work:
    """AdamW's step on a rank's weights."""
    return Work(moved=MOVED_BY_ADAMW * weights)
