"""Routing metrics: what the routers and the ledgers of all ranks say of a run, window by window and in all.

Every rank of a job calls the same methods in the same order.

Shape letters:  L MoE layers   E experts   P ranks of an expert-parallel group
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ep_engine.c2r.collaboration import Profile
from ep_engine.ledger import Ledger
from ep_engine.placement import Placement
from ep_engine.training.watch import RouterWatch


class RoutingMetrics:
    """Of a MoE model.

    Args:
        placement: in use.
        ep_size: ranks that share the experts.
        top_k: K.
        watch: what this rank's routers did.
        ledger: what this rank sent.
        group: all ranks.
    """

    def __init__(
        self,
        placement: Placement,
        ep_size: int,
        top_k: int,
        watch: RouterWatch,
        ledger: Ledger,
        group: dist.ProcessGroup,
    ) -> None:
        self._watch, self._ledger, self._group, self._top_k = watch, ledger, group, top_k
        device, layers = watch.load_LE.device, range(watch.num_layers)
        self._ep_size, per_rank = ep_size, placement.devices // ep_size
        # Where there are fewer experts than in another layer, nobody counts what is beyond.
        homes = [placement.device_of_expert(layer) for layer in layers]
        filled = [devices + [0] * (watch.load_LE.shape[1] - len(devices)) for devices in homes]
        homes_LE = torch.tensor(filled, device=device)
        self._rank_of_expert_LE = homes_LE // per_rank
        self._together_LEE = homes_LE[:, :, None] == homes_LE[:, None, :]
        self._pairs_seen_L2 = torch.zeros(watch.num_layers, 2, dtype=torch.int64, device=device)
        self._pairs_taken_LEE: Tensor | None = None  # by the last `recent`
        self._load_LE = torch.zeros_like(watch.load_LE, dtype=torch.float64)
        self._total = Ledger(ledger.tier_of_rank)

    def line(self, steps: int) -> dict[str, Any]:
        """Of the `steps` since the last line: what every layer's router did, and bytes and devices of a token.

        `layers` has a dictionary for each layer with experts: its number, `load` and `importance` of its experts
        (tokens, and sums of probabilities), `max_violation` (largest load over the mean, minus 1), `entropy` of the
        mean probabilities and `token_entropy`, the mean entropy of a token's, in nats, and `dropped` choices, with
        `dropped_of_expert` where there are any.
        """
        watch = self._watch
        load_LE, importance_LE, dropped_LE, tokens_L, entropy_L, *losses = watch.taken(self._group)
        self._load_LE += load_LE
        ledger = self._ledger.gathered(self._group)
        self._ledger.reset()
        self._total.add(ledger)
        most = max_over_mean(load_LE, watch.experts_L)
        line: dict[str, Any] = {
            "load_max_over_mean": most,
            "load_violation": most - 1,
            "device_load_max_over_mean": max_over_mean(self._of_ranks(load_LE)),
            "bytes_per_token": ledger.bytes_per_token(),
            "bytes_per_token_by_tier": ledger.bytes_by_tier(),
            "devices_per_token": ledger.rows_per_token("dedup", remote=False),
            "balance_losses": {name: float(sum_) / steps for name, sum_ in zip(watch.losses, losses, strict=True)},
            "layers": [
                describe_layer(*(of_E[:width] for of_E in of_experts), *of_layer.tolist()) | {"layer": layer}
                for layer, width, of_experts, of_layer in zip(
                    watch.layers,
                    watch.experts_L,
                    torch.stack((load_LE, importance_LE, dropped_LE), dim=1),
                    torch.stack((tokens_L, entropy_L), dim=1),
                    strict=True,
                )
            ],
        }
        if watch.counts_pairs:
            line["intra_device_fraction"] = self._inside()
        return line

    def forget(self) -> None:
        """The steps since the last line do not count."""
        self._watch.forget()
        self._ledger.reset()

    def summary(self, changed_share: float | None) -> dict[str, Any]:
        """Of all lines so far."""
        return {
            "changed_share": changed_share,
            "load_max_over_mean": max_over_mean(self._load_LE, self._watch.experts_L),
            "device_load_max_over_mean": max_over_mean(self._of_ranks(self._load_LE)),
            "ledger": self._total.to_json(),
        }

    def recent(self, about: dict[str, Any]) -> Profile | None:
        """Who worked with whom since the last call, on all ranks; None if nobody counts."""
        if not self._watch.counts_pairs:
            return None
        now_LEE = self._watch.pairs_LEE.clone()
        recent_LEE = now_LEE - (0 if self._pairs_taken_LEE is None else self._pairs_taken_LEE)
        self._pairs_taken_LEE = now_LEE
        dist.all_reduce(recent_LEE, group=self._group)
        return Profile.of_pairs(recent_LEE.cpu().numpy(), self._top_k, about, self._watch.experts_L)

    def _inside(self) -> float:
        """Share of pairs inside a device, as the mean over layers."""
        pairs_LEE = self._watch.pairs_LEE
        alone_L = pairs_LEE.diagonal(dim1=1, dim2=2).sum(dim=1)
        inside_L = (pairs_LEE * self._together_LEE).sum(dim=(1, 2)) - alone_L
        seen_L2 = torch.stack([inside_L, pairs_LEE.sum(dim=(1, 2)) - alone_L], dim=1)
        since_L2 = seen_L2 - self._pairs_seen_L2
        self._pairs_seen_L2 = seen_L2
        dist.all_reduce(since_L2, group=self._group)
        inside, total = since_L2.double().unbind(dim=1)
        return float((inside / total.clamp(min=1)).mean())

    def _of_ranks(self, load_LE: Tensor) -> Tensor:
        """Copies that each rank of an expert-parallel group works on, (L, P)."""
        load_LP = load_LE.new_zeros(len(load_LE), self._ep_size)
        return load_LP.scatter_add_(1, self._rank_of_expert_LE, load_LE)


def max_over_mean(load: Tensor, widths: list[int] | None = None) -> float:
    """Mean over layers of the largest load relative to the mean load; 1 is perfect balance.

    `widths` are the numbers of experts of the layers; None: every row is full.
    """
    rows = load if widths is None else [row[:width] for row, width in zip(load, widths, strict=True)]
    return float(torch.stack([row.max() / row.mean() for row in rows]).mean())


def describe_layer(
    load_E: Tensor, importance_E: Tensor, dropped_E: Tensor, tokens: float, entropy: float
) -> dict[str, Any]:
    """What a line says of one layer, from sums over tokens."""
    told = {"dropped_of_expert": dropped_E.long().tolist()} if dropped_E.any() else {}
    return {
        "load": load_E.long().tolist(),
        "importance": [round(value, 3) for value in importance_E.tolist()],
        "max_violation": float(load_E.max() / load_E.mean()) - 1,
        "entropy": float(torch.special.entr(importance_E / importance_E.sum()).sum()),
        "token_entropy": entropy / tokens,
        "dropped": int(dropped_E.sum()),
        **told,
    }
