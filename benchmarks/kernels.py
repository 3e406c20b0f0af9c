"""How far are the ops from the speed of memory, and from torch?

    python -m benchmarks.kernels [--json OUT]

gather and combine beside a memcpy of as many bytes (torch's copy_ on the same threads); the plan beside a stable int16
argsort and a bincount; the choice of experts beside the same rule in torch, eager and compiled; and what it costs to
count which experts work together. Bytes: every row that is read and every row that is written counts, also if a cache
holds it.
"""

import argparse
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import print_table, time_in_turn, write_results
from ep_engine import ops

TOKENS, DIM, TOP_K = 16384, 2048, 8


def plan_of(ids_TK: Tensor, num_experts: int) -> tuple[ops.SendTables, ops.ArrivalTables]:
    """The whole plan of one rank that holds all experts."""
    table, one = torch.arange(num_experts, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    sent = ops.plan_send(ids_TK, table, num_ranks=1, slots_per_rank=num_experts, own_rank=0, one_row_per_copy=False)
    return sent, ops.plan_arrival(sent.row_slot_SW, sent.rows_per_rank_P, one, num_slots=num_experts)


def move_calls(ids_TK: Tensor, num_experts: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Gather and combine, each with a memcpy of as many bytes."""
    num_tokens, top_k = ids_TK.shape
    sent, arrival = plan_of(ids_TK, num_experts)
    x, rows = torch.randn(num_tokens, DIM).to(dtype), torch.randn(num_tokens * top_k, DIM).to(dtype)
    copies, sums = torch.empty_like(rows), torch.empty_like(x)
    weights = torch.rand(sent.row_slot_SW.shape)
    # Combine reads K rows and writes one for each token: as many bytes as a copy of (K + 1) / 2 rows.
    half = rows[: num_tokens * (top_k + 1) // 2]
    half_copy = torch.empty_like(half)
    return {
        "gather": lambda: ops.gather_rows(x, arrival.copy_row_N, out=copies),
        "gather memcpy": lambda: copies.copy_(rows),
        "combine": lambda: ops.combine_rows(
            rows, arrival.position_RW, sent.row_slot_SW, weights, [num_experts], out=sums
        ),
        "combine memcpy": lambda: half_copy.copy_(half),
    }


def plan_calls(ids_TK: Tensor, num_experts: int) -> dict[str, Callable[[], object]]:
    """Grouping by expert as torch does it and as the plan does it, and the plan as a whole."""
    sent, _ = plan_of(ids_TK, num_experts)
    one = torch.zeros(1, dtype=torch.int32)
    flat = ids_TK.reshape(-1)
    pairs_EE = torch.zeros(num_experts, num_experts, dtype=torch.int64)

    def by_torch() -> tuple[Tensor, Tensor]:
        return flat.to(torch.int16).argsort(stable=True), flat.bincount(minlength=num_experts)

    return {
        "group": lambda: ops.plan_arrival(sent.row_slot_SW, sent.rows_per_rank_P, one, num_slots=num_experts),
        "plan": lambda: plan_of(ids_TK, num_experts),
        "plan torch": by_torch,
        "count pairs": lambda: ops.count_pairs(ids_TK, pairs_EE),
    }


def topk_in_torch(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over all, the K best, their weights."""
    weights_TK, ids_TK = logits_TE.softmax(dim=1).topk(TOP_K, dim=1)
    return ids_TK, weights_TK


def c2r_in_torch(logits_TE: Tensor, allowed_EE: Tensor) -> tuple[Tensor, Tensor]:
    """The best expert, then the K - 1 best of those that may go with it."""
    scores_TE = logits_TE.softmax(dim=1)
    first_T1 = scores_TE.argmax(dim=1, keepdim=True)
    open_TE = allowed_EE[first_T1[:, 0]]
    rest_TK = scores_TE.masked_fill(~open_TE, -1.0).topk(TOP_K - 1, dim=1).indices
    ids_TK = torch.cat((first_T1, rest_TK), dim=1)
    return ids_TK, scores_TE.gather(1, ids_TK)


def choice_calls(logits_TE: Tensor) -> dict[str, Callable[[], object]]:
    """Plain top-k and C2R, fused, in torch, and in torch compiled."""
    num_experts = logits_TE.shape[1]
    top_t = num_experts // 2
    others = torch.stack([torch.randperm(num_experts - 1) for _ in range(num_experts)])
    lists_EN = others + (others >= torch.arange(num_experts)[:, None])  # all but the expert itself
    allowed_EE = torch.zeros(num_experts, num_experts, dtype=torch.bool).scatter_(1, lists_EN[:, :top_t], True)
    plain = ops.Selection(TOP_K, score="softmax")
    c2r = plain._replace(rule="c2r", lists_EN=lists_EN.int(), top_t=top_t)
    compiled = cache(torch.compile)  # when it is called for the first time
    for how, by_torch in ((plain, topk_in_torch(logits_TE)), (c2r, c2r_in_torch(logits_TE, allowed_EE))):
        ids_TK, weights_TK = ops.choose_experts(logits_TE, how)
        # All but the few whose scores torch's softmax rounds together.
        assert (ids_TK == by_torch[0]).float().mean() > 0.999, "both choose the same"
        torch.testing.assert_close(weights_TK, by_torch[1])
    return {
        "topk": lambda: ops.choose_experts(logits_TE, plain),
        "topk torch": lambda: topk_in_torch(logits_TE),
        "topk compiled": lambda: compiled(topk_in_torch)(logits_TE),
        "c2r": lambda: ops.choose_experts(logits_TE, c2r),
        "c2r torch": lambda: c2r_in_torch(logits_TE, allowed_EE),
        "c2r compiled": lambda: compiled(c2r_in_torch)(logits_TE, allowed_EE),
    }


def ratios_of(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """The named ratios, above 1 where the op is faster."""

    def over(other: str, name: str) -> float:
        return found[other]["median_ms"] / found[name]["median_ms"]

    return {
        "gather_vs_memcpy": over("gather memcpy", "gather"),
        "combine_vs_memcpy": over("combine memcpy", "combine"),
        "plan_vs_torch": over("plan torch", "group"),
        "whole_plan_vs_torch": over("plan torch", "plan"),
        "topk_vs_torch": over("topk torch", "topk"),
        "topk_vs_compiled": over("topk compiled", "topk"),
        "c2r_vs_torch": over("c2r torch", "c2r"),
        "c2r_vs_compiled": over("c2r compiled", "c2r"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    results: dict[str, Any] = {}
    torch.manual_seed(0)
    for num_experts in (64, 256):
        logits_TE = torch.randn(args.tokens, num_experts)
        ids_TK = logits_TE.topk(TOP_K, dim=1).indices
        for dtype in (torch.float32, torch.bfloat16):
            calls = {
                **move_calls(ids_TK, num_experts, dtype),
                **plan_calls(ids_TK, num_experts),
                **choice_calls(logits_TE),
            }
            found = time_in_turn(calls, rounds=args.rounds)
            case = f"E={num_experts} {str(dtype).removeprefix('torch.')}"
            results[case] = {"times": found, "ratios": ratios_of(found)}
            print_table(f"kernels, {case}", found, results[case]["ratios"])
    setting = {"tokens": args.tokens, "dim": DIM, "top_k": TOP_K, "rounds": args.rounds}
    write_results(args.json, "ops against memory and torch", setting, results)


if __name__ == "__main__":
    main()
