"""Made routing with a known good placement: groups of experts that serve tokens together, between noise and skew.

Shape letters:  L layers   E experts   T tokens   K top_k
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep_engine.c2r.collaboration import Profile


@dataclass(frozen=True)
class Planted:
    """A generator of layers.

    Attributes:
        experts, top_k: of the model.
        devices, nodes: of the groups that are hidden in it; experts of a group have no ids in common with their
            neighbours.
        bonus: of an expert's log-score where it is in the groups that a token is at home in, infinity for no noise.
        skew: standard deviation of the experts' log-popularity; groups are equally popular.
    """

    experts: int
    top_k: int
    devices: int
    nodes: int = 1
    bonus: float = 3.0
    skew: float = 0.5

    def layer(self, tokens: int, seed: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
        """Experts of tokens (T, K), distinct, and the hidden device of every expert (E,)."""
        random = np.random.default_rng(seed)
        size = self.experts // self.devices
        device_E = random.permutation(np.arange(self.experts) * self.devices // self.experts)
        popularity = np.exp(self.skew * random.standard_normal(self.experts))
        popularity /= np.bincount(device_E, weights=popularity)[device_E]

        node_T = random.integers(0, self.nodes, tokens)
        per_node = self.devices // self.nodes
        homes = -(-self.top_k // size)  # groups that a token needs
        inside = random.random((tokens, per_node)).argsort(axis=1)[:, :homes]
        home_TG = node_T[:, None] * per_node + inside
        is_home_TE = (device_E[None, None, :] == home_TG[:, :, None]).any(axis=1)
        score_TE = np.log(popularity)[None, :] + random.gumbel(size=(tokens, self.experts))
        score_TE += np.where(is_home_TE, min(self.bonus, 1e9), 0.0)
        ids_TK = np.argpartition(-score_TE, self.top_k - 1, axis=1)[:, : self.top_k]
        return ids_TK.astype(np.int16), device_E

    def layers(self, count: int, tokens: int, seed: int) -> tuple[NDArray[np.int16], Profile, list[list[int]]]:
        """Experts (L, T, K), their profile, and the hidden devices of every layer."""
        made = [self.layer(tokens, seed + number) for number in range(count)]
        ids_LTK = np.stack([ids for ids, _ in made])
        return ids_LTK, profile_of_tokens(ids_LTK, self.experts), [device_E.tolist() for _, device_E in made]


def profile_of_tokens(ids_LTK: NDArray[np.int16], num_experts: int) -> Profile:
    """Count pairs of tokens whose experts are known."""
    layers, tokens, top_k = ids_LTK.shape
    pairs = np.empty((layers, num_experts, num_experts), dtype=np.int64)
    for layer in range(layers):
        chosen_TE = np.zeros((tokens, num_experts), dtype=np.float32)
        np.put_along_axis(chosen_TE, ids_LTK[layer].astype(np.int64), 1.0, axis=1)
        pairs[layer] = np.rint(chosen_TE.T.astype(np.float64) @ chosen_TE).astype(np.int64)
    return Profile.of_pairs(pairs, top_k, {"tokens": tokens})
