"""The Python face of csrc/: each function makes the output buffers and calls one op. Nothing here has a gradient.

Shape letters:
    T tokens of this rank   K top_k   E experts   P ranks of the group   D model dim
    S rows to send, at most T * min(K, P)   R rows received   W slots a row can name   N copies   C columns of a table
Bookkeeping is int32, -1 where there is nothing. Rows are float32 or bfloat16.
"""

from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ep_engine import _C  # type: ignore[attr-defined]  # noqa: F401  (loading it registers the ops)

_ops = torch.ops.ep_engine

_PLAN_CHUNK = 256  # kPlanChunk of csrc/plan.h
MAX_TREE_LEVELS = 8  # kMaxTreeLevels of csrc/combine_rows.h
MAX_TOP_K = 32  # kMaxTopK of csrc/plan.h
FP8_BLOCK = 128  # kFp8Block of csrc/fp8_rows.h
MAX_SHARERS = 64  # kMaxSharers of csrc/shared_memory.h
SHARED_CONTROL_BYTES = 1 << 16  # at least kSharedControlBytes of csrc/shared_memory.h
_STREAM_BYTES = 16 << 20  # outputs of so much are written past the caches: they would not stay in them


class SendTables(NamedTuple):
    """What `plan_send` finds. Rows stand by (rank, token), the own rank last; columns of a token by ascending rank."""

    rows_per_rank_P: Tensor  # own rank included
    row_token_S: Tensor  # token of each row; -1 from the sum of rows_per_rank on, like the next two
    row_slot_SW: Tensor  # local slots the row is for, ascending
    row_choice_SW: Tensor  # which of all T * K choices each of them is
    visit_row_TC: Tensor  # rows of each token
    visit_rank_TC: Tensor  # and the ranks they go to


class ArrivalTables(NamedTuple):
    """What `plan_arrival` finds. Copies stand by slot, then in the order of the global tokens."""

    rows_per_slot_L: Tensor
    position_RW: Tensor  # where each copy of a row stands
    copy_row_N: Tensor  # the row each copy comes from; -1 from the sum of rows_per_slot on


class Selection(NamedTuple):
    """How experts are chosen and weighed, as csrc/choose_experts.h says it; tables lie where the logits do."""

    top_k: int
    rule: Literal["topk", "group_limited", "c2r", "c2r_grouped", "given"] = "topk"
    score: Literal["softmax", "softmax_of_chosen", "sigmoid", "logit"] = "softmax_of_chosen"
    renormalise: bool = False  # not with score `logit`
    scale: float = 1.0
    bias_E: Tensor | None = None  # float32, for the selection alone
    lists_EN: Tensor | None = None  # int32, of c2r and c2r_grouped
    group_of_E: Tensor | None = None  # int32, of c2r_grouped
    top_t: int = 0
    num_groups: int = 1
    max_groups: int = 1
    group_top: int = 1

    def weighing(self) -> tuple[int, bool, float]:
        """What the weights and their gradients need."""
        return _SCORES.index(self.score), self.renormalise, self.scale


_RULES = ("topk", "group_limited", "c2r", "c2r_grouped", "given")  # enum Rule
_SCORES = ("softmax", "softmax_of_chosen", "sigmoid", "logit")  # enum Score


def choose_experts(logits_TE: Tensor, how: Selection, ids_TK: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Ids (T, K) int64, the best first, and weights (T, K) float32 of float32 logits; ids only of rule `given`."""
    if ids_TK is None:
        ids_TK = torch.empty(len(logits_TE), how.top_k, dtype=torch.int64, device=logits_TE.device)
    weights_TK = torch.empty(ids_TK.shape, dtype=torch.float32, device=logits_TE.device)
    _ops.choose_experts(
        logits_TE.contiguous(),
        how.bias_E,
        how.lists_EN,
        how.group_of_E,
        _RULES.index(how.rule),
        how.top_t,
        how.num_groups,
        how.max_groups,
        how.group_top,
        *how.weighing(),
        ids_TK,
        weights_TK,
    )
    return ids_TK, weights_TK


def choose_experts_backward(grad_TK: Tensor, logits_TE: Tensor, ids_TK: Tensor, how: Selection) -> Tensor:
    """Gradients of the logits (T, E) from those of the weights."""
    grad_TE = torch.empty_like(logits_TE, memory_format=torch.contiguous_format)
    _ops.choose_experts_backward(
        grad_TK.contiguous(), logits_TE.contiguous(), ids_TK.contiguous(), *how.weighing(), grad_TE
    )
    return grad_TE


def plan_send(
    ids_TK: Tensor,
    slot_of_expert_E: Tensor,
    *,
    num_ranks: int,
    slots_per_rank: int,
    own_rank: int,
    one_row_per_copy: bool,
) -> SendTables:
    """Plan the rows of this rank's tokens: csrc/plan.h.

    `ids_TK` is int64, distinct ids in a row, -1 for none; T may be 0.
    """
    num_tokens, top_k = ids_TK.shape
    columns = top_k if one_row_per_copy else min(top_k, num_ranks)
    width = 1 if one_row_per_copy else min(top_k, slots_per_rank)
    capacity = num_tokens * columns
    empty = partial(torch.empty, dtype=torch.int32, device=ids_TK.device)
    tables = SendTables(
        rows_per_rank_P=empty(num_ranks),
        row_token_S=empty(capacity),
        row_slot_SW=empty(capacity, width),
        row_choice_SW=empty(capacity, width),
        visit_row_TC=empty(num_tokens, columns),
        visit_rank_TC=empty(num_tokens, columns),
    )
    scratch = empty(_scratch_size(num_tokens, num_ranks))
    _ops.plan_send(
        ids_TK.contiguous(),
        slot_of_expert_E,
        num_ranks,
        slots_per_rank,
        own_rank,
        one_row_per_copy,
        *tables,
        scratch,
    )
    return tables


def plan_arrival(row_slot_RW: Tensor, rows_of_run: Tensor, run_order: Tensor, *, num_slots: int) -> ArrivalTables:
    """Group arrived rows by local slot: csrc/plan.h. R may be 0."""
    num_rows, width = row_slot_RW.shape
    empty = partial(torch.empty, dtype=torch.int32, device=row_slot_RW.device)
    tables = ArrivalTables(
        rows_per_slot_L=empty(num_slots),
        position_RW=empty(num_rows, width),
        copy_row_N=empty(num_rows * width),
    )
    scratch = empty(_scratch_size(num_rows, num_slots))
    _ops.plan_arrival(row_slot_RW.contiguous(), rows_of_run, run_order, *tables, scratch)
    return tables


def choice_weights(weights_TK: Tensor, choice_SW: Tensor, out_SW: Tensor) -> None:
    """out[s, w] = the weight of choice[s, w], 0 where that is -1; `out_SW` may be a part of longer rows."""
    _ops.choice_weights(weights_TK.contiguous(), choice_SW, out_SW)


def choice_weights_backward(grad_SW: Tensor, choice_SW: Tensor, num_tokens: int, top_k: int) -> Tensor:
    """The transpose of `choice_weights`: gradients (T, K) float32."""
    grad_TK = torch.zeros(num_tokens, top_k, dtype=torch.float32, device=grad_SW.device)
    _ops.choice_weights_backward(grad_SW, choice_SW, grad_TK)
    return grad_TK


def gather_rows(
    x: Tensor, row_N: Tensor, weight_N: Tensor | None = None, *, out: Tensor | None = None, streaming: bool = False
) -> Tensor:
    """out[n] = weight[n] * x[row[n]], (N, D) in the dtype of x; a copy bit by bit without weights (float32).

    Rows of x and of `out` must be contiguous each. `streaming` writes past the CPU's caches, for readers on another
    core.
    """
    if out is None:
        out = x.new_empty(row_N.numel(), x.shape[1])
    _ops.gather_rows(x, row_N, weight_N, streaming or out.nbytes >= _STREAM_BYTES, out)
    return out


def combine_rows(
    y: Tensor,
    index_RC: Tensor,
    leaf_RC: Tensor,
    weight_RC: Tensor | None,
    sizes: list[int],
    *,
    out: Tensor | None = None,
    streaming: bool = False,
) -> Tensor:
    """out[r] = sum over c of weight[r, c] * y[index[r, c]] along the tree of group sizes: csrc/combine_rows.h.

    Each group sums its children in float32 in their order and rounds to the dtype of y; rows without a copy are 0.
    `out` and `streaming` as in `gather_rows`.
    """
    if out is None:
        out = y.new_empty(index_RC.shape[0], y.shape[1])
    _ops.combine_rows(y, index_RC, leaf_RC, weight_RC, sizes, streaming or out.nbytes >= _STREAM_BYTES, out)
    return out


def quantise_rows(x: Tensor, row_N: Tensor, values_ND: Tensor, scales_NB: Tensor) -> None:
    """Write x[row[n]] as e4m3 (uint8) with a float32 scale per FP8_BLOCK elements: csrc/fp8_rows.h."""
    _ops.quantise_rows(x, row_N, values_ND, scales_NB)


def dequantise_rows(values_ND: Tensor, scales_NB: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows (N, D) of what `quantise_rows` wrote."""
    out = torch.empty(values_ND.shape, dtype=dtype, device=values_ND.device)
    _ops.dequantise_rows(values_ND, scales_NB, out)
    return out


def swiglu(gate_up_NF: Tensor, out_NF: Tensor) -> Tensor:
    """silu(gate) * up, computed in float32 and rounded once; gate_up (N, 2F) holds gate, then up. All contiguous."""
    _ops.swiglu(gate_up_NF, out_NF)
    return out_NF


class SwigluGrads(NamedTuple):
    """What `swiglu_backward` finds."""

    gate_up_NF: Tensor  # (N, 2F)
    hidden_NF: Tensor  # weight * silu(gate) * up
    weight_N: Tensor  # float32


def swiglu_backward(grad_NF: Tensor, gate_up_NF: Tensor, weight_N: Tensor, out: SwigluGrads) -> None:
    """Gradients where row n's output is multiplied by weight[n]: csrc/swiglu.h. `grad_NF` is without the weight."""
    _ops.swiglu_backward(grad_NF, gate_up_NF, weight_N, *out)


def experts_forward(x_RD: Tensor, tables: ArrivalTables, w_gate_up: Tensor, w_down: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up (N, 2F) and output (N, D) of each expert on its copies: csrc/expert_products.h. CPU only.

    Weights are (L, 2F, D), gate first, and (L, D, F), contiguous, in the dtype of x.
    """
    num_copies = int(tables.rows_per_slot_L.sum())
    gate_up_NF, y_ND = (x_RD.new_empty(num_copies, w.shape[1]) for w in (w_gate_up, w_down))
    _ops.experts_forward(x_RD, tables.copy_row_N, tables.rows_per_slot_L, w_gate_up, w_down, gate_up_NF, y_ND)
    return gate_up_NF, y_ND


def experts_gate_up(x_RD: Tensor, tables: ArrivalTables, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """The first result of `experts_forward` alone."""
    gate_up_NF = x_RD.new_empty(int(tables.rows_per_slot_L.sum()), w_gate_up.shape[1])
    _ops.experts_forward(x_RD, tables.copy_row_N, tables.rows_per_slot_L, w_gate_up, w_down, gate_up_NF, None)
    return gate_up_NF


class ExpertsBackward(NamedTuple):
    """What the backward of the experts is given."""

    grad_RD: Tensor  # of each row's weighted sum
    x_RD: Tensor
    tables: ArrivalTables
    w_gate_up: Tensor
    w_down: Tensor
    gate_up_NF: Tensor  # of the forward
    weight_N: Tensor  # float32

    def call(self, grad_x_ND: Tensor, grad_weight_N: Tensor, *rest: Tensor | None) -> None:
        """The op, with its outputs."""
        grad_RD, x_RD, tables, *others = self
        _ops.experts_backward(
            grad_RD, x_RD, tables.copy_row_N, tables.rows_per_slot_L, *others, grad_x_ND, grad_weight_N, *rest
        )


def experts_backward(given: ExpertsBackward) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Gradients of the copies (N, D), of their weights (N,), and of the experts' weights."""
    grad_x_ND, grad_weight_N = _like_copies(given)
    grads = torch.empty_like(given.w_gate_up), torch.empty_like(given.w_down)
    given.call(grad_x_ND, grad_weight_N, None, None, *grads)
    return grad_x_ND, grad_weight_N, grads


def experts_rows_backward(given: ExpertsBackward) -> tuple[Tensor, SwigluGrads]:
    """Gradients of the copies (N, D) and of their weights, and what `experts_weight_grads` needs."""
    grad_x_ND, grad_weight_N = _like_copies(given)
    num_copies, width = given.gate_up_NF.shape
    inside = SwigluGrads(torch.empty_like(given.gate_up_NF), grad_x_ND.new_empty(num_copies, width // 2), grad_weight_N)
    given.call(grad_x_ND, grad_weight_N, inside.gate_up_NF, inside.hidden_NF, None, None)
    return grad_x_ND, inside


def experts_weight_grads(given: ExpertsBackward, inside: SwigluGrads) -> tuple[Tensor, Tensor]:
    """Gradients of the experts' weights after `experts_rows_backward`."""
    grads = torch.empty_like(given.w_gate_up), torch.empty_like(given.w_down)
    tables = given.tables
    _ops.experts_weight_grads(
        given.grad_RD,
        given.x_RD,
        tables.copy_row_N,
        tables.rows_per_slot_L,
        inside.gate_up_NF,
        inside.hidden_NF,
        *grads,
    )
    return grads


def _like_copies(given: ExpertsBackward) -> tuple[Tensor, Tensor]:
    return given.gate_up_NF.new_empty(len(given.gate_up_NF), given.x_RD.shape[1]), torch.empty_like(given.weight_N)


def linear_rows(x_TD: Tensor, w_DE: Tensor) -> Tensor:
    """x @ w in float32, (T, E), each row's bits a function of that row alone: csrc/linear_rows.h. CPU only."""
    out_TE = x_TD.new_empty(len(x_TD), w_DE.shape[1])
    _ops.linear_rows(x_TD.contiguous(), w_DE, out_TE)
    return out_TE


def count_pairs(ids_TK: Tensor, counts_EE: Tensor) -> None:
    """Add to `counts_EE` (int64) how often two experts serve one token; the diagonal counts the tokens of an expert.

    Ids below 0 are no choices.
    """
    _ops.count_pairs(ids_TK.contiguous(), counts_EE)


def checksum(elements: Tensor, columns: int, *, first: int, row_step: int, column_step: int) -> int:
    """csrc/checksum.h of contiguous elements on the CPU, in 0..2**64-1."""
    total: int = _ops.checksum(elements, columns, first, row_step, column_step)
    return total % (1 << 64)


class SharedArenas(NamedTuple):
    """The arenas of all ranks of a machine, mapped here, and which rank this is: csrc/shared_memory.h."""

    arenas: list[Tensor]  # uint8 each, at least SHARED_CONTROL_BYTES
    process_P: Tensor  # int32, a pidfd of every rank, or -1
    rank: int
    timeout_s: float

    def open(self, number: int, place_P: Tensor, expected_P: Tensor, sending_P: Tensor) -> tuple[int, Tensor]:
        """Begin exchange `number`; a result for `shared_fault` and the place in every rank's arena, int64 all."""
        destination_P = torch.empty_like(place_P)
        return _ops.shared_memory_open(*self, number, place_P, expected_P, sending_P, destination_P), destination_P

    def close(self, number: int) -> int:
        """Say that all is written and wait for the others."""
        result: int = _ops.shared_memory_close(*self, number)
        return result

    def counts(self, number: int, counts_PN: Tensor) -> tuple[int, Tensor]:
        """Exchange rows of int32 counts."""
        received_PN = torch.empty_like(counts_PN)
        return _ops.shared_memory_counts(*self, number, counts_PN.contiguous(), received_PN), received_PN

    def fail(self) -> None:
        """Tell all others that this rank gives up."""
        _ops.shared_memory_fail(self.arenas, self.process_P, self.rank)


def shared_fault(result: int) -> tuple[int, str] | None:
    """The peer and what is the matter with it, of the result of an exchange; None if all went well."""
    reasons = ("", "did not come within the time-out", "died", "failed", "expects another number of bytes")
    return None if result == 0 else (result // 8, reasons[result % 8])


def built_for_cuda() -> bool:
    """Whether the ops were built for GPUs: with nvcc at hand and a CUDA build of torch."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("ep_engine::plan_send", "CUDA"))


def _scratch_size(num_items: int, num_buckets: int) -> int:
    return -(-num_items // _PLAN_CHUNK) * num_buckets + num_buckets


def _register_fakes() -> None:
    for name in (
        "plan_send",
        "plan_arrival",
        "choose_experts",
        "choose_experts_backward",
        "choice_weights",
        "choice_weights_backward",
        "gather_rows",
        "combine_rows",
        "quantise_rows",
        "dequantise_rows",
        "swiglu",
        "swiglu_backward",
        "experts_forward",
        "experts_backward",
        "experts_weight_grads",
        "linear_rows",
        "count_pairs",
    ):
        torch.library.register_fake(f"ep_engine::{name}", lambda *_: None)  # outputs are the caller's: no shape to say


_register_fakes()
