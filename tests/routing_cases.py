"""Routing as the specification tells it, one token at a time, and random cases for it."""

import random
from typing import Any

from hypothesis import strategies as st

from tests.small_models import random_lists


def select_by_hand(
    scores: list[float], k: int, row_of: list[list[int]] | None, top_t: int, device: list[int] | None, m: int
) -> list[int]:
    """The selection rule of one token, as the specification tells it."""
    order = sorted(range(len(scores)), key=lambda e: (-scores[e], e))
    devices: list[int] = []
    for e in order if device is not None else []:
        if device[e] not in devices and len(devices) < m:
            devices.append(device[e])
    if row_of is None:
        return [e for e in order if device is None or device[e] in devices][:k]
    first, row = order[0], row_of[order[0]]
    candidates = row[:top_t]
    if device is not None:
        candidates = [e for e in row[:top_t] if device[e] in devices]
        for e in row[top_t:]:
            if len(candidates) < k - 1 and e != first and device[e] in devices:
                candidates.append(e)
    return [first, *sorted(candidates, key=lambda e: (-scores[e], e))[: k - 1]]


@st.composite
def routing_cases(draw: Any) -> dict[str, Any]:
    """Scores with ties, lists, and a placement whose smallest M devices hold at least k experts."""
    num_experts = draw(st.integers(2, 9))
    k = draw(st.integers(1, num_experts))
    num_devices = draw(st.integers(1, num_experts))
    device = [e % num_devices for e in draw(st.permutations(range(num_experts)))]
    sizes = sorted(device.count(d) for d in set(device))
    least = next(m for m in range(1, num_devices + 1) if sum(sizes[:m]) >= k)
    scores = st.lists(st.integers(0, 5), min_size=num_experts, max_size=num_experts)
    return {
        "scores": draw(st.lists(scores, min_size=1, max_size=6)),
        "k": k,
        "lists": random_lists(num_experts, random.Random(draw(st.integers(0, 999)))),
        "top_t": draw(st.integers(k - 1, num_experts - 1)),
        "device": device,
        "m": draw(st.integers(least, num_devices)),
    }
