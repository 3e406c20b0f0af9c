"""The Python face of csrc/: each function makes the output buffers and calls one op. Nothing here has a gradient.

Shape letters:
    T tokens of this rank   K top_k   E experts   P ranks of the group   D model dim
    S rows to send, at most T * min(K, P)   R rows received   W slots a row can name   N copies   C columns of a table
Bookkeeping is int32, -1 where there is nothing. Rows are float32 or bfloat16.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ep_engine import _C  # type: ignore[attr-defined]  # noqa: F401  (loading it registers the ops)

_ops = torch.ops.ep_engine

_PLAN_CHUNK = 256  # kPlanChunk of csrc/plan.h
MAX_TREE_LEVELS = 8  # kMaxTreeLevels of csrc/combine_rows.h
MAX_TOP_K = 32  # kMaxTopK of csrc/plan.h


class SendTables(NamedTuple):
    """What `plan_send` finds. Rows stand by (rank, token), the own rank last; columns of a token by ascending rank."""

    rows_per_rank_P: Tensor  # own rank included
    row_token_S: Tensor  # token of each row; -1 from the sum of rows_per_rank on, like the next two
    row_slot_SW: Tensor  # local slots the row is for, ascending
    row_choice_SW: Tensor  # which of the token's K choices each of them is
    visit_row_TC: Tensor  # rows of each token
    visit_rank_TC: Tensor  # and the ranks they go to


class ArrivalTables(NamedTuple):
    """What `plan_arrival` finds. Copies stand by slot, then in the order of the global tokens."""

    rows_per_slot_L: Tensor
    position_RW: Tensor  # where each copy of a row stands
    copy_row_N: Tensor  # the row each copy comes from; -1 from the sum of rows_per_slot on


def plan_send(
    ids_TK: Tensor,
    slot_of_expert_E: Tensor,
    *,
    num_ranks: int,
    slots_per_rank: int,
    own_rank: int,
    one_row_per_copy: bool,
) -> SendTables:
    """Plan the rows of this rank's tokens: csrc/plan.h. `ids_TK` is int64, distinct ids in a row; T may be 0."""
    num_tokens, top_k = ids_TK.shape
    columns = top_k if one_row_per_copy else min(top_k, num_ranks)
    width = 1 if one_row_per_copy else top_k
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


def plan_arrival(row_slot_RW: Tensor, rows_from_rank_P: Tensor, *, own_rank: int, num_slots: int) -> ArrivalTables:
    """Group arrived rows by local slot: csrc/plan.h. R may be 0."""
    num_rows, width = row_slot_RW.shape
    empty = partial(torch.empty, dtype=torch.int32, device=row_slot_RW.device)
    tables = ArrivalTables(
        rows_per_slot_L=empty(num_slots),
        position_RW=empty(num_rows, width),
        copy_row_N=empty(num_rows * width),
    )
    scratch = empty(_scratch_size(num_rows, num_slots))
    _ops.plan_arrival(row_slot_RW.contiguous(), rows_from_rank_P, own_rank, *tables, scratch)
    return tables


def gather_rows(x: Tensor, row_N: Tensor, weight_N: Tensor | None = None) -> Tensor:
    """out[n] = weight[n] * x[row[n]], (N, D) in the dtype of x; a copy bit by bit without weights (float32)."""
    out = x.new_empty(row_N.numel(), x.shape[1])
    _ops.gather_rows(x.contiguous(), row_N, weight_N, out)
    return out


def combine_rows(y: Tensor, index_RC: Tensor, leaf_RC: Tensor, weight_RC: Tensor | None, sizes: list[int]) -> Tensor:
    """out[r] = sum over c of weight[r, c] * y[index[r, c]] along the tree of group sizes: csrc/combine_rows.h.

    Each group sums its children in float32 in their order and rounds to the dtype of y; rows without a copy are 0.
    """
    out = y.new_empty(index_RC.shape[0], y.shape[1])
    _ops.combine_rows(y.contiguous(), index_RC, leaf_RC, weight_RC, sizes, out)
    return out


def combine_rows_weight_grad(grad_out: Tensor, y: Tensor, index_RC: Tensor) -> Tensor:
    """<grad_out[r], y[index[r, c]]>, (R, C) float32; 0 where the index is -1."""
    grad_RC = torch.empty(index_RC.shape, dtype=torch.float32, device=y.device)
    _ops.combine_rows_weight_grad(grad_out.contiguous(), y.contiguous(), index_RC, grad_RC)
    return grad_RC


def linear_rows(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """x @ w.T in float32, (T, E), each row's bits a function of that row alone: csrc/linear_rows.h. CPU only."""
    out_TE = x_TD.new_empty(len(x_TD), len(w_ED))
    _ops.linear_rows(x_TD.contiguous(), w_ED.contiguous(), out_TE)
    return out_TE


def count_pairs(ids_TK: Tensor, counts_EE: Tensor) -> None:
    """Add to `counts_EE` (int64) how often two experts serve one token; the diagonal counts the tokens of an expert."""
    _ops.count_pairs(ids_TK.contiguous(), counts_EE)


def built_for_cuda() -> bool:
    """Whether the ops were built for GPUs: with nvcc at hand and a CUDA build of torch."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("ep_engine::plan_send", "CUDA"))


def _scratch_size(num_items: int, num_buckets: int) -> int:
    return -(-num_items // _PLAN_CHUNK) * num_buckets + num_buckets


def _register_fakes() -> None:
    for name in (
        "plan_send",
        "plan_arrival",
        "gather_rows",
        "combine_rows",
        "combine_rows_weight_grad",
        "linear_rows",
        "count_pairs",
    ):
        torch.library.register_fake(f"ep_engine::{name}", lambda *_: None)  # outputs are the caller's: no shape to say


_register_fakes()
