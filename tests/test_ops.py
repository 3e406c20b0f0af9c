"""The ops of csrc/: plans by hand and against plain Python, moves bit by bit, sums against the reference tree."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ep_engine import ops, reference

CPU = torch.device("cpu")


def int32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_a_token_has_one_row_per_rank_and_the_own_rank_stands_last() -> None:
    # experts 0 1 on rank 0, 2 3 on rank 1, 4 5 on rank 2; this is rank 1
    ids_TK = torch.tensor([[5, 0, 1], [3, 2, 4], [0, 1, 2]])
    sent = ops.plan_send(ids_TK, int32(range(6)), num_ranks=3, slots_per_rank=2, own_rank=1, one_row_per_copy=False)

    # rows:         rank 0: token 0, token 2;  rank 2: token 0, token 1;  own: token 1, token 2
    assert sent.rows_per_rank_P.tolist() == [2, 2, 2]
    assert sent.row_token_S.tolist() == [0, 2, 0, 1, 1, 2, -1, -1, -1]
    assert sent.row_slot_SW[:6].tolist() == [[0, 1], [0, 1], [1, -1], [0, -1], [0, 1], [0, -1]]
    assert sent.row_choice_SW[:6].tolist() == [[1, 2], [6, 7], [0, -1], [5, -1], [4, 3], [8, -1]]
    assert sent.visit_row_TC.tolist() == [[0, 2, -1], [4, 3, -1], [1, 5, -1]]
    assert sent.visit_rank_TC.tolist() == [[0, 2, -1], [1, 2, -1], [0, 1, -1]]


def test_one_row_per_copy_stands_in_the_order_of_expert_ids() -> None:
    ids_TK = torch.tensor([[5, 0, 1]])
    slot_of_expert_E = int32([4, 0, 1, 2, 3, 5])  # expert 0 on rank 2
    sent = ops.plan_send(ids_TK, slot_of_expert_E, num_ranks=3, slots_per_rank=2, own_rank=0, one_row_per_copy=True)
    assert sent.rows_per_rank_P.tolist() == [1, 0, 2]
    assert sent.visit_rank_TC.tolist() == [[2, 0, 2]]  # experts 0, 1, 5
    assert sent.visit_row_TC.tolist() == [[0, 2, 1]]
    assert sent.row_slot_SW.tolist() == [[0], [1], [0]]
    assert sent.row_choice_SW.tolist() == [[1], [0], [2]]


def test_arrived_rows_are_grouped_by_slot_in_the_order_of_global_tokens() -> None:
    # from rank 0: rows 0 1; from rank 2: row 2; own (rank 1): rows 3 4, which come between them
    row_slot_RW = int32([[0, 1], [1, -1], [0, 1], [1, -1], [0, 1]])
    tables = ops.plan_arrival(row_slot_RW, int32([2, 1, 2]), int32([0, 2, 1]), num_slots=3)
    assert tables.rows_per_slot_L.tolist() == [3, 5, 0]
    assert tables.copy_row_N.tolist() == [0, 4, 2, 0, 1, 3, 4, 2, -1, -1]
    assert tables.position_RW.tolist() == [[0, 3], [4, -1], [2, 7], [5, -1], [1, 6]]


@st.composite
def routings(draw: Any) -> dict[str, Any]:
    """Distinct ids of some tokens, on ranks with some slots empty."""
    num_ranks, per_rank = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    num_experts = draw(st.integers(1, num_ranks * per_rank))
    top_k = draw(st.integers(1, min(4, num_experts)))
    return {
        "ids": draw(st.lists(st.permutations(range(num_experts)).map(lambda p: list(p[:top_k])), max_size=9)),
        "top_k": top_k,
        "slots": draw(st.permutations(range(num_ranks * per_rank)))[:num_experts],
        "num_ranks": num_ranks,
        "per_rank": per_rank,
        "own": draw(st.integers(0, num_ranks - 1)),
    }


@given(case=routings(), one_row_per_copy=st.booleans())
def test_plan_send_is_the_plain_loop(case: dict[str, Any], one_row_per_copy: bool) -> None:
    ids, slots, per_rank, own = (case[name] for name in ("ids", "slots", "per_rank", "own"))
    ids_TK = torch.tensor(ids, dtype=torch.int64).view(len(ids), case["top_k"])
    sent = ops.plan_send(
        ids_TK,
        int32(slots),
        num_ranks=case["num_ranks"],
        slots_per_rank=per_rank,
        own_rank=own,
        one_row_per_copy=one_row_per_copy,
    )
    by_rank: dict[int, list[Any]] = defaultdict(list)
    for token, chosen in enumerate(ids):
        if one_row_per_copy:
            for expert in sorted(chosen):
                by_rank[slots[expert] // per_rank].append((token, [expert]))
        else:
            for rank in {slots[expert] // per_rank for expert in chosen}:
                here = [expert for expert in chosen if slots[expert] // per_rank == rank]
                by_rank[rank].append((token, sorted(here, key=lambda expert: slots[expert])))
    order = [rank for rank in range(case["num_ranks"]) if rank != own] + [own]
    rows = [(rank, *row) for rank in order for row in by_rank[rank]]

    assert sent.rows_per_rank_P.tolist() == [len(by_rank[rank]) for rank in range(case["num_ranks"])]
    assert sent.row_token_S.tolist()[: len(rows)] == [token for _, token, _ in rows]
    assert set(sent.row_token_S.tolist()[len(rows) :]) <= {-1}
    width = sent.row_slot_SW.shape[1]
    for row, (rank, token, experts) in enumerate(rows):
        empty = [-1] * (width - len(experts))
        assert sent.row_slot_SW[row].tolist() == [slots[e] - rank * per_rank for e in experts] + empty
        assert (
            sent.row_choice_SW[row].tolist() == [token * case["top_k"] + ids[token].index(e) for e in experts] + empty
        )
    for token, visited in enumerate(sent.visit_row_TC.tolist()):
        found = [(sent.visit_rank_TC[token, c].item(), row) for c, row in enumerate(visited) if row >= 0]
        assert sorted(row for _, row in found) == [row for row, (_, t, _) in enumerate(rows) if t == token]
        assert all(rows[row][0] == rank for rank, row in found)
        assert one_row_per_copy or [rank for rank, _ in found] == sorted({rank for rank, _ in found})


@given(case=routings(), seed=st.integers(0, 99))
def test_plan_arrival_is_the_plain_loop(case: dict[str, Any], seed: int) -> None:
    """Runs of random lengths in a random order, each row with some distinct slots."""
    generator = torch.Generator().manual_seed(seed)
    num_slots, width = case["per_rank"], min(case["per_rank"], 3)
    counts = torch.randint(0, 4, (case["num_ranks"],), generator=generator).tolist()
    order = torch.randperm(case["num_ranks"], generator=generator).tolist()
    num_rows = sum(counts)
    slots = [
        sorted(torch.randperm(num_slots, generator=generator)[: int(n)].tolist())
        for n in torch.randint(1, width + 1, (num_rows,), generator=generator)
    ]
    row_slot_RW = int32([row + [-1] * (width - len(row)) for row in slots]).view(num_rows, width)
    tables = ops.plan_arrival(row_slot_RW, int32(counts), int32(order), num_slots=num_slots)

    begins = [sum(counts[:run]) for run in range(len(counts))]
    in_token_order = [row for run in order for row in range(begins[run], begins[run] + counts[run])]
    copies = [(slot, row) for slot in range(num_slots) for row in in_token_order if slot in slots[row]]
    assert tables.rows_per_slot_L.tolist() == [sum(slot in row for row in slots) for slot in range(num_slots)]
    assert tables.copy_row_N.tolist()[: len(copies)] == [row for _, row in copies]
    for row, chosen in enumerate(slots):
        expected = [copies.index((slot, row)) for slot in chosen] + [-1] * (width - len(chosen))
        assert tables.position_RW[row].tolist() == expected


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 8, 64])
def test_gather_copies_bits_and_leaves_rows_without_a_source_alone(dtype: torch.dtype, dim: int) -> None:
    x = torch.randn(5, dim).to(dtype)
    x[0, 0] = torch.nan
    out = torch.full((4, dim), 3.0, dtype=dtype)
    torch.ops.ep_engine.gather_rows(x, int32([4, -1, 0, 4]), None, False, out)
    expected = torch.stack([x[4], torch.full((dim,), 3.0, dtype=dtype), x[0], x[4]])
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_with_weights_rounds_the_float32_product(dtype: torch.dtype) -> None:
    x, weight_N = torch.randn(5, 33).to(dtype), torch.randn(3)
    out = ops.gather_rows(x, int32([1, 1, 4]), weight_N)
    assert torch.equal(out, (x[[1, 1, 4]].float() * weight_N[:, None]).to(dtype))


@st.composite
def trees(draw: Any) -> tuple[list[int], list[list[int]]]:
    """Group sizes, and for some rows the leaves that have a copy, ascending, repeats allowed."""
    sizes = [draw(st.integers(1, 3))]
    for _ in range(draw(st.integers(0, 3))):
        sizes.append(sizes[-1] * draw(st.integers(1, 3)))
    leaves = st.lists(st.integers(0, sizes[-1] - 1), max_size=6).map(sorted)
    return sizes, draw(st.lists(leaves, min_size=1, max_size=5))


@given(tree=trees(), bf16=st.booleans(), weighted=st.booleans(), seed=st.integers(0, 99))
def test_combine_is_the_reference_tree_bit_by_bit(
    tree: tuple[list[int], list[list[int]]], bf16: bool, weighted: bool, seed: int
) -> None:
    sizes, leaves = tree
    dtype = torch.bfloat16 if bf16 else torch.float32
    generator = torch.Generator().manual_seed(seed)
    columns = max(map(len, leaves)) or 1
    num_copies = sum(map(len, leaves))
    y = torch.randn(num_copies + 1, 19, generator=generator).to(dtype)
    order = iter(torch.randperm(num_copies, generator=generator).tolist())
    index = [[next(order) for _ in row] + [-1] * (columns - len(row)) for row in leaves]
    leaf = [row + [-1] * (columns - len(row)) for row in leaves]
    weight_RC = torch.randn(len(leaves), columns, generator=generator) if weighted else None

    out = ops.combine_rows(y, int32(index), int32(leaf), weight_RC, sizes)

    for r, row in enumerate(leaves):
        values = [y[index[r][c]].float() * (1.0 if weight_RC is None else weight_RC[r, c]) for c in range(len(row))]
        expected = reference.tree_sum(list(zip(row, values, strict=True)), sizes, dtype) if row else torch.zeros(19)
        assert torch.equal(out[r], expected.to(dtype))


@given(tree=trees(), seed=st.integers(0, 99))
def test_a_subtree_may_be_summed_elsewhere(tree: tuple[list[int], list[list[int]]], seed: int) -> None:
    """Cut at every level: sums of the parts, then the sum of the rounded parts, give the bits of the whole."""
    sizes, leaves = tree
    generator = torch.Generator().manual_seed(seed)
    for row in leaves:
        values = [(leaf, torch.randn(5, generator=generator)) for leaf in row]
        for cut in range(1, len(sizes)):
            parts = defaultdict(list)
            for leaf, value in values:
                parts[leaf // sizes[cut - 1]].append((leaf, value))
            summed = [
                (rank, reference.tree_sum(part, sizes[:cut], torch.bfloat16).float()) for rank, part in parts.items()
            ]
            above = [size // sizes[cut - 1] for size in sizes[cut:]]
            if summed:
                whole = reference.tree_sum(values, sizes, torch.bfloat16)
                assert torch.equal(reference.tree_sum(summed, above, torch.bfloat16), whole)


@pytest.mark.parametrize("inner", [1, 7, 10, 64])
def test_a_row_of_logits_depends_on_nothing_but_itself(inner: int) -> None:
    x, w = torch.randn(50, inner), torch.randn(9, inner).t()
    found = ops.linear_rows(x, w)
    torch.testing.assert_close(found, x @ w, rtol=1e-5, atol=1e-5)
    for first, last in ((0, 1), (3, 17), (49, 50), (20, 20)):
        alone = torch.empty(last - first, inner + 1)[:, 1:].copy_(x[first:last]).contiguous()
        assert torch.equal(ops.linear_rows(alone, w), found[first:last])


def test_pairs_are_counted_as_in_the_reference() -> None:
    ids_TK = torch.stack([torch.randperm(7)[:3] for _ in range(50)])
    counts_EE = torch.zeros(7, 7, dtype=torch.int64)
    ops.count_pairs(ids_TK[:20], counts_EE)
    ops.count_pairs(ids_TK[20:], counts_EE)
    assert torch.equal(counts_EE, reference.count_pairs(ids_TK, 7))
    assert counts_EE.sum() == 50 * 9


def test_many_rows_are_the_same_on_one_thread_and_on_two() -> None:
    y, index = torch.randn(4000, 64), torch.randperm(4000).view(2000, 2).int()
    leaf, weight_RC = int32([[0, 1]] * 2000), torch.rand(2000, 2)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(ops.combine_rows(y, index, leaf, weight_RC, [1, 2]))
    torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: ops.gather_rows(torch.randn(2, 3).double(), int32([0])), "float32 or bfloat16"),
        (lambda: ops.gather_rows(torch.randn(2, 3), torch.tensor([0])), "row must be contiguous and of the dtype"),
        (lambda: ops.combine_rows(torch.randn(2, 3), int32([[0]]), int32([[0]]), None, []), "1..8 levels, got 0"),
        (lambda: ops.combine_rows(torch.randn(2, 3), int32([[0]]), int32([[0, 0]]), None, [1]), "leaf must have 1 el"),
        (
            lambda: ops.plan_send(
                torch.zeros(1, 33, dtype=torch.int64),
                int32([0]),
                num_ranks=1,
                slots_per_rank=1,
                own_rank=0,
                one_row_per_copy=False,
            ),
            "top_k must be in 1..32, got 33",
        ),
    ],
)
def test_a_wrong_buffer_is_refused(call: Any, sentence: str) -> None:
    with pytest.raises(RuntimeError, match=sentence):
        call()


def test_ops_are_described_to_the_compiler() -> None:
    """Schema, fake and functionalisation of each op, as torch checks them."""
    ids_TK, row = torch.tensor([[0, 1], [1, 2]]), int32([1, 0])
    counts_EE, x = torch.zeros(3, 3, dtype=torch.int64), torch.randn(2, 4)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.ep_engine.count_pairs.default, (ids_TK, counts_EE), test_utils=checks)
    torch.library.opcheck(torch.ops.ep_engine.gather_rows.default, (x, row, None, False, x.clone()), test_utils=checks)
    combine = (x, int32([[0, 1]]), int32([[0, 1]]), None, [2], False, x[:1].clone())
    torch.library.opcheck(torch.ops.ep_engine.combine_rows.default, combine, test_utils=checks)
