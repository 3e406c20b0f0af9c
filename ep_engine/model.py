"""A decoder of the LLaMA kind, dense or with mixtures of experts: single-device modules that know of no rank.

Shape letters:  B rows   S positions   T = B * S tokens   D model dim   V vocabulary
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ep_engine.attention import Attention, Positions, keep_apart
from ep_engine.feed_forward import FeedForward
from ep_engine.kv_cache import KVCache
from ep_engine.load_balance import RouterStatistics
from ep_engine.model_config import ModelConfig
from ep_engine.moe_layer import MoELayer
from ep_engine.norm import RMSNorm
from ep_engine.recompute import Recompute, computed_again
from ep_engine.router import Choice
from ep_engine.stopwatch import time_backward, timed

Watch = Callable[[Tensor, dict[int, RouterStatistics]], Tensor]
"""Sees what the routers of a pass did, by place among the MoE layers, and the hidden states, which it returns; it may
add a loss to them."""


class Decoder(nn.Module):
    """Embedding, layers, norm, head, or a stage of them: the first has the embedding, the last norm and head.

    Weights are left as they are made: a checkpoint or `initial.py` fills them.

    Args:
        config: of the whole model.
        layers: of this stage; None: all.
    """

    def __init__(self, config: ModelConfig, layers: range | None = None) -> None:
        super().__init__()
        here = range(config.num_layers) if layers is None else layers
        d, v = config.hidden_size, config.vocab_size
        self.config = config
        self.watch: Watch = _no_watch
        self.is_first, self.is_last = here.start == 0, here.stop == config.num_layers
        head_is_embedding = self.is_last and config.tie_embeddings
        positions = Positions(config)
        self.embed = nn.Embedding(v, d) if self.is_first or head_is_embedding else None
        self.copies = {"embed.weight"} if head_is_embedding and not self.is_first else set()  # of the first stage's
        self.layers = nn.ModuleDict({str(i): DecoderLayer(config, i, positions) for i in here})
        if self.is_last:
            self.norm = RMSNorm(d, config.rms_norm_eps)
            self.head = None if config.tie_embeddings else nn.Linear(d, config.head_size, bias=False)
            self.unembed = Unembed()

    def forward(
        self,
        x: Tensor,
        documents_BS: Tensor | None = None,
        numbers_BS: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Ids (B, S) int64 in [0, V), or hidden states (B, S, D) -> logits (B, S, V), or hidden states; causal.

        A token sees only the document of its own number, int64, that is in its row; None: all of the row before it.
        `numbers_BS` are those of the router's tokens in the run, see `Router`.
        With a cache the tokens follow those that it has seen, and the logits are those of the last alone, (B, 1, V).
        """
        if self.is_first:
            assert self.embed is not None, "the first stage has one"
            x = self.embed(x)
            if torch.is_grad_enabled() and not x.requires_grad:  # what is frozen must not end the backward of a stage
                x.requires_grad_()
        apart = None if documents_BS is None else keep_apart(documents_BS, self.config.sliding_window)
        if cache is not None:
            apart = cache.begin(x.shape[1], self.config.sliding_window)
        routers: dict[int, RouterStatistics] = {}
        for i, layer in self.layers.items():
            x, router = layer(x, apart, numbers_BS, cache)
            if router is not None:
                routers[self.config.moe_index(int(i))] = router
        x = self.watch(x, routers)
        if not self.is_last:
            return x
        of_weights = self.embed if self.head is None else self.head
        assert of_weights is not None, "the last stage has one"
        x = x if cache is None else x[:, -1:]
        logits_BSV: Tensor = self.unembed(self.norm(x), of_weights.weight)
        return logits_BSV

    def recompute(self, what: Recompute) -> None:
        """Keep less for the backward."""
        for layer in self.decoder_layers().values():
            layer.recompute = what
        for moe in self.moe_layers().values():
            moe.recompute(what == "selective")

    def decoder_layers(self) -> dict[int, "DecoderLayer"]:
        """All layers, by their index in the model."""
        return {int(i): layer for i, layer in self.layers.items() if isinstance(layer, DecoderLayer)}

    def moe_layers(self) -> dict[int, MoELayer]:
        """The mixtures of experts, by the index of their layer."""
        return {i: layer.moe for i, layer in self.decoder_layers().items() if layer.is_moe}


def _no_watch(x: Tensor, routers: dict[int, RouterStatistics]) -> Tensor:
    return x


class Unembed(nn.Module):
    """Logits, by weights that may be the embedding's."""

    def forward(self, x_BSD: Tensor, w_VD: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, V)."""
        return F.linear(x_BSD, w_VD)


class DecoderLayer(nn.Module):
    """Attention, then a dense FFN, a mixture of experts or nothing, each on the normed residual stream."""

    def __init__(self, config: ModelConfig, index: int, positions: Positions) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, positions)
        moe, width = config.moe_of(index), config.dense_size(index)
        self.has_ffn = moe is not None or width > 0
        if self.has_ffn:
            self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if moe is None and self.has_ffn:
            condensed = config.condensed.get(index)
            self.ffn = FeedForward(config.hidden_size, width, bias=config.mlp_bias, condensed=condensed)
        elif moe is not None:
            self.moe = MoELayer(moe, config.hidden_size, config.moe_index(index))
        self.is_moe = moe is not None
        self.recompute: Recompute = "none"

    def forward(
        self,
        x_BSD: Tensor,
        apart: Tensor | None = None,
        numbers_BS: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, RouterStatistics | None]:
        """(B, S, D) -> (B, S, D), and what the router did if there is one; `apart` and `cache` as in attention.py."""
        if self.recompute == "full":
            chosen: list[Choice] = []  # experts are chosen once, whatever the second pass would round
            return computed_again(self._forward, x_BSD, apart, numbers_BS, chosen)
        return self._forward(x_BSD, apart, numbers_BS, cache=cache)

    def _forward(
        self,
        x_BSD: Tensor,
        apart: Tensor | None,
        numbers_BS: Tensor | None,
        chosen: list[Choice] | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, RouterStatistics | None]:
        if self.recompute == "selective":
            attended_BSD = computed_again(self._attend, x_BSD, apart)
        else:
            attended_BSD = self._attend(x_BSD, apart, cache)
        x_BSD = x_BSD + attended_BSD
        if not self.has_ffn:
            return x_BSD, None
        h_BSD = self.ffn_norm(x_BSD)
        if not self.is_moe:
            return x_BSD + self.ffn(h_BSD), None
        numbers_T = None if numbers_BS is None else numbers_BS.flatten()
        y_TD, router = self.moe(h_BSD.flatten(0, 1), numbers_T, chosen, num_rows=len(h_BSD))
        return x_BSD + y_TD.view_as(x_BSD), router

    @timed("attention")
    def _attend(self, x_BSD: Tensor, apart: Tensor | None, cache: KVCache | None = None) -> Tensor:
        # By name: tensor parallelism counts the arguments that stand in their place.
        y_BSD: Tensor = self.attention(self.attention_norm(x_BSD), apart, cache=cache)
        time_backward("attention", x_BSD, y_BSD)
        return y_BSD
