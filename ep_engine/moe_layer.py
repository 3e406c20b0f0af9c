"""The data path, top to bottom. Every step is one call into the file of the same name.

tokens -> router -> plan -> dispatch -> experts -> combine
"""

from torch import Tensor, nn

from ep_engine.balance_losses import BalanceLoss
from ep_engine.combine import combine
from ep_engine.dispatch import dispatch
from ep_engine.experts import Experts
from ep_engine.feed_forward import FeedForward, ResidualExperts, ResidualGate, SharedGate
from ep_engine.ledger import Ledger
from ep_engine.load_balance import RouterStatistics, router_statistics
from ep_engine.model_config import MoEConfig
from ep_engine.placement import Placement
from ep_engine.plan import Site, make_plan, record, way_to
from ep_engine.recompute import computed_again
from ep_engine.router import Choice, Router
from ep_engine.transports.transport import Alone, Link


class MoELayer(nn.Module):
    """A mixture of experts in the place of a decoder's FFN, and what every token goes through beside it, if anything.

    It is built for one rank that holds all experts in the order of their ids; `join` makes it part of a group. `layer`
    is its place among the MoE layers.
    """

    def __init__(self, moe: MoEConfig, hidden_size: int, layer: int) -> None:
        super().__init__()
        placement = Placement.contiguous(moe.num_experts, 1, layer + 1)
        self.moe, self.hidden_size = moe, hidden_size
        self.router = Router(moe, hidden_size, layer)
        self.shared = FeedForward(hidden_size, moe.shared_hidden_size) if moe.shared_hidden_size else None
        self.shared_gate = SharedGate(hidden_size) if moe.shared_gate else None
        self.residual = None
        if moe.residual_experts:
            width, count = moe.residual_hidden_size, moe.residual_experts
            self.residual = ResidualExperts(hidden_size, width, count, moe.residual_scale)
        self.residual_weighting = ResidualGate(hidden_size, 2) if moe.residual_weighting else None
        self.keeps_less = False
        self.losses: tuple[BalanceLoss, ...] = ()  # whose sums its statistics have
        self.has_padding = False  # whether numbers of tokens may be -1, which then count for nothing
        self.join(Site.of(placement, layer, 1, 0), Link(Alone(), Ledger(), layer))

    def join(self, site: Site, *links: Link, fp8: bool = False, fixed_rows: int | None = None) -> None:
        """Become the part of the layer that `site` describes; makes new, empty expert weights of its size.

        Args:
            site: the experts of this rank.
            links: to all ranks; or to this rank's peers on other nodes, and to the ranks of its node.
            fp8: see `dispatch`.
            fixed_rows: see `Hop`.
        """
        self.site, self.ledger, self.fp8 = site, links[0].ledger, fp8
        self.way = way_to(site, links, fixed_rows)
        self.experts = Experts(
            site.slots_per_rank,
            self.hidden_size,
            self.moe.expert_hidden_size // site.parts,
            site.cut.group_sizes_of_slots,
        )

    def recompute(self, keeps_less: bool) -> None:
        """Whether the insides of the experts, and of what is beside them, are computed again for the backward."""
        self.keeps_less = self.experts.recompute = keeps_less

    def forward(
        self,
        x_TD: Tensor,
        numbers_T: Tensor | None = None,
        chosen: list[Choice] | None = None,
        *,
        num_rows: int = 1,
    ) -> tuple[Tensor, RouterStatistics]:
        """(T, D) -> (T, D) in the same dtype; T may be 0 and may differ between ranks.

        Args:
            x_TD: tokens, of `num_rows` rows of a batch.
            numbers_T: see `Router`.
            chosen: for a layer that is computed twice: the first time its choices are put there, then they are taken.
            num_rows: of the batch.
        """
        again = bool(chosen)
        routing = self.router(x_TD, numbers_T, chosen[0] if chosen else None)
        ids_TK, weights_TK = self.site.in_parts(routing.served, routing.weights_TK)
        plan = make_plan(ids_TK, self.way[0], may_lack=routing.kept_TK is not None)
        rows_RD, weights_RW, arrival = dispatch(x_TD, weights_TK, plan, self.way, fp8=self.fp8)
        if not again:
            record(ids_TK, self.site, arrival.plans)
        if chosen == []:
            chosen.append(Choice(routing.ids_TK, routing.kept_TK))
        z_RD = self.experts(rows_RD, weights_RW, arrival)
        y_TD = combine(z_RD, arrival)
        if self.shared is not None:
            shared_TD = computed_again(self.shared, x_TD) if self.keeps_less else self.shared(x_TD)
            y_TD = y_TD + (shared_TD if self.shared_gate is None else self.shared_gate(x_TD) * shared_TD)
        if self.residual is not None:
            residual_TD = computed_again(self.residual, x_TD) if self.keeps_less else self.residual(x_TD)
            if self.residual_weighting is not None:
                shares_T2 = self.residual_weighting(x_TD)
                y_TD, residual_TD = shares_T2[:, :1] * y_TD, shares_T2[:, 1:] * residual_TD
            y_TD = y_TD + residual_TD
        counts_T = None if numbers_T is None or not self.has_padding else numbers_T >= 0
        return y_TD, router_statistics(routing, self.moe.score, self.losses, counts_T, num_rows)
