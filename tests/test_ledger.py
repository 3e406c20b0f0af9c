"""The ledger's sums by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_engine.ledger import DIRECTIONS, Ledger

TIERS_OF_RANKS = ["node", "self", "network", "network"]  # seen from rank 1 of four


def small_ledger() -> Ledger:
    """Two layers: 10 tokens in layer 0, 5 in layer 1, of which most rows go to rank 2."""
    ledger = Ledger(TIERS_OF_RANKS)
    ledger.record_rows(0, 10, sent=[3, 4, 6, 1], plain=[5, 6, 8, 1], dedup=[3, 4, 6, 1])
    ledger.record_rows(1, 5, sent=[0, 2, 5, 0], plain=[0, 2, 8, 0], dedup=[0, 2, 5, 0])
    ledger.record_bytes(0, "dispatch", [3, 4, 6, 1], 100)
    ledger.record_bytes(0, "combine", [2, 4, 7, 1], 50)
    ledger.record_bytes(1, "dispatch", [0, 2, 5, 0], 100)
    ledger.record_bytes(1, "dispatch_backward", [1, 0, 0, 0], 10)
    return ledger


def test_bytes_are_kept_by_layer_direction_and_tier() -> None:
    ledger = small_ledger()
    assert dict(ledger.sent) == {
        (0, "dispatch", "node"): 300,
        (0, "dispatch", "self"): 400,
        (0, "dispatch", "network"): 700,
        (0, "combine", "node"): 100,
        (0, "combine", "self"): 200,
        (0, "combine", "network"): 400,
        (1, "dispatch", "node"): 0,
        (1, "dispatch", "self"): 200,
        (1, "dispatch", "network"): 500,
        (1, "dispatch_backward", "node"): 10,
        (1, "dispatch_backward", "self"): 0,
        (1, "dispatch_backward", "network"): 0,
    }
    assert dict(ledger.tokens) == {0: 10, 1: 5}
    assert [ledger.rows[0, "plain", tier] for tier in ("self", "node", "network")] == [6, 5, 9]


def test_bytes_per_token_are_those_that_left_the_rank() -> None:
    # layer by layer over its own tokens: dispatch 1000 / 10 + 500 / 5, combine 500 / 10, dispatch_backward 10 / 5
    assert small_ledger().bytes_per_token() == {
        "dispatch": 200.0,
        "combine": 50.0,
        "combine_backward": 0.0,
        "dispatch_backward": 2.0,
        "total": 252.0,
    }


def test_rows_per_token_are_a_mean_over_tokens_and_layers() -> None:
    ledger = small_ledger()
    assert ledger.rows_per_token("dedup", remote=False) == pytest.approx((14 + 7) / 15)
    assert ledger.rows_per_token("dedup", remote=True) == pytest.approx((10 + 5) / 15)
    assert ledger.rows_per_token("plain", remote=True) == pytest.approx((14 + 8) / 15)


def test_recording_twice_adds_up_and_reset_begins_again() -> None:
    ledger = small_ledger()
    ledger.record_bytes(0, "combine", [1, 0, 0, 0], 50)
    ledger.record_rows(0, 30, sent=[1, 0, 0, 0], plain=[1, 0, 0, 0], dedup=[1, 0, 0, 0])
    assert (ledger.sent[0, "combine", "node"], ledger.tokens[0], ledger.rows[0, "sent", "node"]) == (150, 40, 4)
    ledger.reset()
    assert (ledger.sent, ledger.rows, ledger.tokens) == ({}, {}, {})
    assert ledger.tier_of_rank == TIERS_OF_RANKS


def test_a_ledger_of_another_number_of_ranks_is_no_ledger() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Ledger(TIERS_OF_RANKS).record_bytes(0, "dispatch", [1, 2, 3], 100)


def test_nothing_sent_is_nothing_per_token() -> None:
    alone = Ledger()
    assert alone.bytes_per_token() == {**dict.fromkeys(DIRECTIONS, 0.0), "total": 0.0}
    assert alone.rows_per_token("sent", remote=False) == 0.0
    alone.record_rows(0, 8, sent=[8], plain=[16], dedup=[8])
    alone.record_bytes(0, "dispatch", [8], 64)
    assert alone.bytes_per_token()["total"] == 0.0
    assert (alone.rows_per_token("plain", remote=False), alone.rows_per_token("plain", remote=True)) == (2.0, 0.0)


def test_adding_is_adding_every_count() -> None:
    total = small_ledger()
    other = Ledger(TIERS_OF_RANKS)
    other.record_rows(1, 5, sent=[1, 1, 1, 1], plain=[2, 2, 2, 2], dedup=[1, 1, 1, 1])
    other.record_bytes(2, "combine", [0, 0, 1, 0], 7)
    total.add(other)
    assert dict(total.tokens) == {0: 10, 1: 10}
    assert total.rows[1, "plain", "network"] == 8 + 4
    assert total.sent[2, "combine", "network"] == 7
    assert total.sent[0, "dispatch", "network"] == 700
    assert dict(other.tokens) == {1: 5}


def test_without_a_group_the_sum_over_ranks_is_the_ledger() -> None:
    ledger = small_ledger()
    assert ledger.gathered(None) == ledger


counts = st.lists(st.integers(0, 99), min_size=4, max_size=4)


@given(
    parts=st.lists(st.tuples(st.integers(0, 2), st.sampled_from(DIRECTIONS), counts, st.integers(0, 64)), max_size=9)
)
def test_parts_add_up_to_the_whole_in_any_order(parts: list[tuple[int, str, list[int], int]]) -> None:
    whole, forwards, backwards = Ledger(TIERS_OF_RANKS), Ledger(TIERS_OF_RANKS), Ledger(TIERS_OF_RANKS)
    pieces = []
    for layer, direction, rows, size in parts:
        piece = Ledger(TIERS_OF_RANKS)
        for ledger in (whole, piece):
            ledger.record_bytes(layer, direction, rows, size)
            ledger.record_rows(layer, size, sent=rows, plain=rows, dedup=rows)
        pieces.append(piece)
    for piece in pieces:
        forwards.add(piece)
    for piece in reversed(pieces):
        backwards.add(piece)
    assert whole == forwards == backwards
    sent = sum(sum(rows) * size for _, _, rows, size in parts)
    assert sum(whole.sent.values()) == sent


def test_json_holds_the_sums_and_every_layer() -> None:
    ledger = small_ledger()
    shown = ledger.to_json()
    none = {"self": 0, "node": 0, "network": 0}
    assert shown["bytes_per_token"] == ledger.bytes_per_token()
    assert shown["devices_per_token"] == pytest.approx(21 / 15)
    assert shown["remote_rows_per_token"] == {"sent": 1.0, "plain": pytest.approx(22 / 15), "dedup": 1.0}
    assert shown["layers"][1] == {
        "tokens": 5,
        "bytes": {
            "dispatch": {"self": 200, "node": 0, "network": 500},
            "combine": none,
            "combine_backward": none,
            "dispatch_backward": {"self": 0, "node": 10, "network": 0},
        },
        "rows": {
            "sent": {"self": 2, "node": 0, "network": 5},
            "plain": {"self": 2, "node": 0, "network": 8},
            "dedup": {"self": 2, "node": 0, "network": 5},
        },
    }
    assert len(shown["layers"]) == 2
    assert ledger == small_ledger()  # showing counts nothing
