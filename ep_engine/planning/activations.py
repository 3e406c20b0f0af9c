"""Activations: bytes of what a layer keeps for its backward on a rank, and of what it needs on the way, by formulas.

They follow what autograd saves of model.py, attention.py, router.py and experts.py, tensor by tensor;
benchmarks/memory.py measures how near they are.

Shape letters as in ops.py; B rows of a part on this rank, S positions, V vocabulary, H heads, G key/value heads, d dim
of a head, F hidden dim. What is split along the sequence counts T = B * S / tp tokens, what is split along heads,
hidden width or vocabulary B * S.
"""

from dataclasses import dataclass, replace

import torch

from ep_engine.config import RunConfig
from ep_engine.message import Message
from ep_engine.model_config import ModelConfig, MoEConfig
from ep_engine.planning.expert_traffic import Passed

_FLOAT, _INT, _LONG = 4, 4, 8


@dataclass(frozen=True)
class Kept:
    """Bytes of one pass of a layer.

    Attributes:
        residual: its input and what is between attention and FFN, where a norm keeps them.
        attention: attention and its norm.
        ffn: the norm before it, a dense FFN or the router and the shared expert, and tables.
        shared: of that, the inside of the shared expert.
        rows: of experts, as they arrived.
        gate_up: of every copy.
        working: most that the FFN's backward needs beside.
        for_weights: what a backward of inputs leaves for that of the weights, where they are apart.
    """

    residual: int = 0
    attention: int = 0
    ffn: int = 0
    shared: int = 0
    rows: int = 0
    gate_up: int = 0
    working: int = 0
    for_weights: int = 0

    @property
    def total(self) -> int:
        """What is kept."""
        return self.residual + self.attention + self.ffn + self.rows + self.gate_up


@dataclass(frozen=True)
class Part:
    """One part of a batch on one rank: what a layer of the model keeps of it."""

    config: RunConfig
    model: ModelConfig
    dp_size: int

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the dtype of computation."""
        dtype: torch.dtype = getattr(torch, self.config.train.dtype)
        return dtype.itemsize

    @property
    def rows(self) -> int:
        """B."""
        return self.config.data.batch_size // self.config.train.micro_batches // self.dp_size

    @property
    def tokens(self) -> int:
        """B * S."""
        return self.rows * self.config.data.sequence_length

    @property
    def tp(self) -> int:
        """Ranks that split heads, hidden width, vocabulary and sequence."""
        return self.config.parallel.tensor_parallel_size

    @property
    def hidden(self) -> int:
        """The hidden states of this rank, (T, D)."""
        return self.tokens // self.tp * self.model.hidden_size * self.itemsize

    @property
    def logits(self) -> int:
        """Elements of this rank's logits, (B * S, V / tp)."""
        return self.tokens * self.model.vocab_size // self.tp

    def norm(self) -> int:
        """Its input, widened if that is another tensor, the normed rows in both dtypes, and a root per token."""
        wide = self.hidden // self.itemsize * _FLOAT if self.itemsize < _FLOAT else 0
        return wide + self.hidden + self.tokens // self.tp * _FLOAT

    def residual(self) -> int:
        """The input of a norm: kept by it in float32; in 16 bits only its widened copy is."""
        return self.hidden if self.itemsize == _FLOAT else 0

    def layer(self, index: int, passed: Passed | None) -> Kept:
        """What one pass of a layer keeps if nothing is computed again; `passed` is what came to its experts."""
        both = Kept(residual=2 * self.residual(), attention=self.norm() + self._attention())
        moe = self.model.moe_of(index)
        if moe is None and self.model.dense_size(index) == 0:
            return replace(both, residual=self.residual())
        if moe is None:
            inside = self.tokens * self.model.dense_size(index) // self.tp * self.itemsize
            ffn = self.norm() + self.hidden * self.tp + 4 * inside  # gate, its silu, up, and their product
            if index in self.model.condensed and self.model.condensed[index].gated:
                ffn += inside + self.tokens * self.itemsize  # the product before the gate as well, and the gate
            later = self._linear_grads() + 3 * inside
            return replace(both, ffn=ffn, working=3 * inside, for_weights=later)
        assert passed is not None, "a MoE layer has been passed"
        return self._moe(both, moe, passed)

    def _attention(self) -> int:
        model, data = self.model, self.config.data
        heads, shared = (n * model.head_dim // self.tp for n in (model.num_heads, model.num_kv_heads))
        per_token = self.hidden * self.tp // self.tokens + (2 * heads + 2 * shared) * self.itemsize
        sums = model.num_heads // self.tp * _FLOAT
        tables = 4 * data.sequence_length * model.head_dim * self.itemsize if self.itemsize < _FLOAT else 0
        window = model.sliding_window or data.sequence_length
        masks = self.rows if data.keeps_documents_apart else int(window < data.sequence_length)
        mask = masks * data.sequence_length**2 * self.itemsize
        normed = 0
        if model.qk_norm is not None:  # queries and keys before and after, and a root for each that is normed
            roots = (model.num_heads + model.num_kv_heads) // self.tp if model.qk_norm == "head" else 2
            normed = (heads + shared) * (_FLOAT + self.itemsize) + roots * _FLOAT
        return self.tokens * (per_token + sums + normed) + tables + mask

    def _moe(self, both: Kept, moe: MoEConfig, passed: Passed) -> Kept:
        parallel, travel = self.config.parallel, self.config.moe
        parts = parallel.expert_tensor_parallel_size
        ranks, per_copy = parallel.expert_parallel_size * parts, travel.combine == "per_expert"
        tokens, d, c = self.tokens // self.tp, self.model.hidden_size, self.itemsize
        inside_gate = 0 if moe.gate == "linear" else (moe.gate_hidden_size or moe.num_experts)
        scores = (2 * moe.num_experts + inside_gate) * _FLOAT + moe.top_k * (_FLOAT + _LONG)
        scores += self._balance(moe)
        columns = moe.top_k * parts if per_copy else min(moe.top_k * parts, ranks)
        plan = columns * (3 + 2 * passed.width) * _INT
        wide = self.hidden // c * _FLOAT  # what the router reads
        stays = ranks == 1 and not per_copy
        if travel.fp8_dispatch:
            rows = passed.rows * d * c
        elif stays:
            rows = 0 if c == _FLOAT else self.hidden  # in float32 they are what the router reads
        else:
            rows = passed.rows * Message(d, getattr(torch, self.config.train.dtype), 2 * passed.width).num_bytes
        # A GPU does not know on the host how many copies there are.
        copies = passed.rows * passed.width if parallel.device == "cuda" else passed.copies
        width = moe.expert_hidden_size // parts
        inside = self.tokens * moe.beside_hidden_size // self.tp * c
        shared = 4 * inside + (self.hidden * self.tp if inside and self.tp > 1 else 0)
        gated = self.hidden + 2 * tokens * c if moe.shared_gate else 0
        if moe.residual_weighting:  # both outputs, and a softmax and what came of it
            gated += 2 * self.hidden + 2 * tokens * (_FLOAT + c)
        scores += moe.top_k * _FLOAT if moe.learned_scale else 0
        tables = tokens * (scores + plan) + passed.rows * passed.width * 2 * (_FLOAT + _INT)
        return replace(
            both,
            ffn=self.norm() + wide + tables + shared + gated,
            shared=shared,
            rows=rows,
            gate_up=copies * 2 * width * c,
            working=(copies + 2 * passed.rows + passed.sent) * d * c + 3 * inside,
            for_weights=self._linear_grads() + copies * 3 * width * c + passed.rows * d * c,
        )

    def _balance(self, moe: MoEConfig) -> int:
        """Bytes of a token that losses keep beside its probabilities, which `switch` and `sequence` share."""
        asked, e = self.config.balance, moe.num_experts
        kept = 2 * e * _FLOAT if asked.mutual_information else 0
        kept += _FLOAT if asked.z else 0
        if asked.noise:  # its numbers and what its deviation came from
            kept += 2 * e * _FLOAT
        if asked.load:  # three steps of a chance, who is in, and who is best
            kept += 3 * e * _FLOAT + e + (moe.top_k + 1) * _LONG
            kept += 2 * e if moe.routing.rule == "c2r" else 0  # which experts are open
        return kept + (moe.top_k if asked.capacity_factor is not None else 0)

    def _linear_grads(self) -> int:
        """Gradients of the outputs of attention's matrices."""
        model = self.model
        width = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim // self.tp + model.hidden_size
        return self.tokens * width * self.itemsize
