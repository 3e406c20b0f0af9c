"""The ledger: exact payload bytes on the wire, per layer, direction and link tier, from the plan's counts.

Beside what was sent stands what two other protocols would have sent for the same routing: one row per copy ("plain"),
and one row per token and rank ("dedup"). Counts that lie on a device stay there until somebody reads the ledger.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

DIRECTIONS = ("dispatch", "combine", "combine_backward", "dispatch_backward")
TIERS = ("self", "node", "network")


@dataclass
class Ledger:
    """Counts of one rank since the last `reset`.

    Attributes:
        tier_of_rank: the link tier of every rank of the expert-parallel group, seen from this one.
        sent: bytes by (layer, direction, tier).
        rows: rows by (layer, protocol, tier), in the forward dispatch; protocol is `sent`, `plain` or `dedup`.
        tokens: tokens routed, by layer.
    """

    tier_of_rank: list[str] = field(default_factory=lambda: ["self"])
    sent: Counter[tuple[int, str, str]] = field(default_factory=Counter)
    rows: Counter[tuple[int, str, str]] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    _unread: dict[tuple[int, str, tuple[str, ...]], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def reset(self) -> None:
        """Begin again from zero."""
        for counts in (self.sent, self.rows, self.tokens, self._unread):
            counts.clear()

    def record_bytes(
        self,
        layer: int,
        direction: str,
        rows_per_rank: list[int],
        bytes_per_row: int,
        tiers: list[str] | None = None,
    ) -> None:
        """Count rows sent to every rank of a group, by default of all ranks; `tiers` are those of its links."""
        for tier, num_rows in zip(tiers or self.tier_of_rank, rows_per_rank, strict=True):
            self.sent[layer, direction, tier] += num_rows * bytes_per_row

    def record_rows(
        self, layer: int, num_tokens: int, tiers: list[str] | None = None, **rows_per_rank: list[int] | Tensor
    ) -> None:
        """Count tokens and rows of one forward dispatch under some protocols, over ranks each; a tensor is int64."""
        self.tokens[layer] += num_tokens
        for protocol, counts in rows_per_rank.items():
            key = layer, protocol, tuple(tiers or self.tier_of_rank)
            if isinstance(counts, list):
                self._add_rows(key, counts)
            elif key in self._unread:
                self._unread[key] += counts
            else:
                self._unread[key] = counts.clone()

    def _add_rows(self, key: tuple[int, str, tuple[str, ...]], counts: list[int]) -> None:
        layer, protocol, tiers = key
        for tier, num_rows in zip(tiers, counts, strict=True):
            self.rows[layer, protocol, tier] += num_rows

    def read(self) -> None:
        """Bring the counts of the device into `rows`; waits for it. What reads the ledger as a whole calls this."""
        for key, counts in self._unread.items():
            self._add_rows(key, counts.tolist())
        self._unread.clear()

    def gathered(self, group: dist.ProcessGroup | None) -> "Ledger":
        """The sum of the ledgers of all ranks of `group`, the same on each."""
        self.read()
        if group is None:
            return self
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, (self.sent, self.rows, self.tokens), group=group)
        total = Ledger(self.tier_of_rank)
        for sent, rows, tokens in parts:
            total.add(Ledger(self.tier_of_rank, sent, rows, tokens))
        return total

    def add(self, other: "Ledger") -> None:
        """Add another ledger's counts."""
        other.read()
        self.sent.update(other.sent)
        self.rows.update(other.rows)
        self.tokens.update(other.tokens)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within the block nothing is counted for good."""
        before = Ledger(self.tier_of_rank)
        before.add(self)
        yield
        self.reset()
        self.add(before)

    def bytes_per_token(self) -> dict[str, float]:
        """Bytes that left a rank, per token and over all layers, by direction and in total."""
        per_token = dict.fromkeys(DIRECTIONS, 0.0)
        for (layer, direction, tier), num_bytes in self.sent.items():
            if tier != "self":
                per_token[direction] += num_bytes / max(self.tokens[layer], 1)
        return {**per_token, "total": sum(per_token.values())}

    def bytes_by_tier(self) -> dict[str, float]:
        """Bytes that left a rank, per token and over all layers and directions, by the tier of the link."""
        found = {tier: 0.0 for tier in TIERS if tier != "self"}
        for (layer, _, tier), num_bytes in self.sent.items():
            if tier != "self":
                found[tier] += num_bytes / max(self.tokens[layer], 1)
        return found

    def rows_per_token(self, protocol: str, *, remote: bool) -> float:
        """Rows per token in the forward dispatch of a layer, on average: all of them, or those that left a rank."""
        self.read()
        found = sum(n for (_, p, tier), n in self.rows.items() if p == protocol and not (remote and tier == "self"))
        return found / max(sum(self.tokens.values()), 1)

    def to_json(self) -> dict[str, Any]:
        """Plain values: the sums, and every layer by itself."""
        self.read()
        layers = [
            {
                "tokens": self.tokens[layer],
                "bytes": {d: {t: self.sent[layer, d, t] for t in TIERS} for d in DIRECTIONS},
                "rows": {p: {t: self.rows[layer, p, t] for t in TIERS} for p in ("sent", "plain", "dedup")},
            }
            for layer in sorted(self.tokens)
        ]
        return {
            "bytes_per_token": self.bytes_per_token(),
            "devices_per_token": self.rows_per_token("dedup", remote=False),
            "remote_rows_per_token": {p: self.rows_per_token(p, remote=True) for p in ("sent", "plain", "dedup")},
            "layers": layers,
        }
