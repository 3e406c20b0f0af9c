"""Blend: which row of which domain comes next, by weights that stay or that follow the losses.

    corpus (text) -> token files -> [blend -> batches] -> model

Every row goes to the domain with the most credit: all domains get their weight as credit, and the one that is read pays
1. So any run of rows holds a domain as often as its weight says, to within a row or so, and what is read depends on
nothing but the state below: not on ranks, nor on the parts of a batch.

Shape letters:  D domains
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep_engine.config import Packing
from ep_engine.data.batches import Batch, Rows, WholeDocuments, check_rows, rows_of, shuffled, stacked
from ep_engine.data.domain_tables import LOSSES, WEIGHTS, DynamicRule, NamedLosses, NamedWeights
from ep_engine.data.tokens import TokenFile
from ep_engine.errors import UserError

_SUM_TOLERANCE = 1e-6
_SMOOTHING = 1e-4  # share that is spread evenly, so that no domain is lost


def domain_weights(given: NamedWeights | Mapping[str, float] | None, domains: tuple[str, ...]) -> NDArray[np.float64]:
    """Weights of domains, in their order.

    Raises:
        UserError: they are of other domains, negative, or do not sum to 1.
    """
    if given == "uniform" or (given is None and len(domains) == 1):
        return np.full(len(domains), 1 / len(domains))
    if given is None:
        raise UserError(
            f"data.train has {len(domains)} domains and data.weights is missing; give a weight for each, or a name: "
            f"uniform, {', '.join(WEIGHTS)}"
        )
    weights = _of_domains("data.weights", WEIGHTS[given] if isinstance(given, str) else given, domains)
    for name, weight in zip(domains, weights, strict=True):
        if weight < 0:
            raise UserError(f"data.weights of {name} is {weight}, and no domain is read less than never; use 0 or more")
    total = float(weights.sum())
    if abs(total - 1) > _SUM_TOLERANCE:
        raise UserError(f"data.weights sum to {total:.6g} and must sum to 1; divide each by {total:.6g}")
    return weights


def reference_losses(given: NamedLosses | Mapping[str, float], domains: tuple[str, ...]) -> NDArray[np.float64]:
    """Losses, in nats per token, that domains should come down to, in their order; UserError for other domains."""
    table = LOSSES[given] if isinstance(given, str) else given
    return _of_domains("data.reference_losses", table, domains)


def updated_weights(
    rule: DynamicRule, weights_D: NDArray[np.float64], losses_D: NDArray[np.float64], reference_D: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Weights after an evaluation: domains that are far above their reference get more.

    `sheared_llama`, as LLM-Shearing's code has it: softmax(log w + loss - reference), of which 1e-4 is spread evenly.
    `sheared_llama_paper`, arXiv:2310.06694 algorithm 1: w * exp(max(loss - reference, 0)), normalised.
    """
    excess_D = losses_D - reference_D
    if rule == "sheared_llama_paper":
        scaled_D: NDArray[np.float64] = weights_D * np.exp(np.maximum(excess_D, 0))
        return scaled_D / float(scaled_D.sum())
    scaled_D = weights_D * np.exp(excess_D - excess_D.max())
    smooth_D: NDArray[np.float64] = (1 - _SMOOTHING) * scaled_D / scaled_D.sum() + _SMOOTHING / len(weights_D)
    return smooth_D / float(smooth_D.sum())


class Blend:
    """The endless stream of rows of a run: of every domain all rows, in a new seeded order every time around.

    Args:
        files: Token file of every domain.
        sequence_length: S.
        packing: What a row is.
        weights: (D,), in the order of the files.
        seed: Of the orders.

    Attributes:
        weights_D: In force; may be replaced.
        taken_D: (D,) int64, rows read of every domain.
        rows: Of every domain.

    Raises:
        UserError: a token file is shorter than a row.
    """

    def __init__(
        self,
        files: Mapping[str, TokenFile],
        *,
        sequence_length: int,
        packing: Packing,
        weights: NDArray[np.float64],
        seed: int,
    ) -> None:
        self.names = tuple(files)
        self.rows: list[Rows] = [rows_of(tokens, sequence_length, packing) for tokens in files.values()]
        for rows in self.rows:
            check_rows(rows, sequence_length, 1)
        self._order = {"seed": seed, "sequence_length": sequence_length, "packing": packing}
        self.weights_D = weights
        self.taken_D = np.zeros(len(files), np.int64)
        self._credits_D = np.zeros(len(files))
        self._ahead: list[tuple[int, int]] = []  # domain and row, to be read after the rows taken
        self._credits_ahead_D = self._credits_D.copy()

    def ahead(self, count: int) -> list[tuple[int, int]]:
        """The next `count` rows, each a domain and the number of the row in the endless stream of that domain."""
        if len(self._ahead) != count:
            credits_D, taken = self._credits_D.copy(), self.taken_D.tolist()
            self._ahead = []
            for _ in range(count):
                credits_D += self.weights_D
                domain = int(credits_D.argmax())
                credits_D[domain] -= 1
                self._ahead.append((domain, taken[domain]))
                taken[domain] += 1
            self._credits_ahead_D = credits_D
        return self._ahead

    def read(self, rows: list[tuple[int, int]]) -> Batch:
        """Rows that `ahead` has named."""
        found = []
        for domain, number in rows:
            of_domain = self.rows[domain]
            epoch, position = divmod(number, of_domain.num_rows)
            name = f"{self.names[domain]}/" if len(self.names) > 1 else ""
            key = f"{self._order['seed']}/{name}{epoch}"
            found.append(of_domain.read(shuffled(position, of_domain.num_rows, key)))
        return stacked(found)

    def advance(self, count: int) -> list[str]:
        """Take the next `count` rows; returns the domains that were begun again with them."""
        rows = self.ahead(count)
        again = [self.names[d] for d, number in rows if number and number % self.rows[d].num_rows == 0]
        np.add.at(self.taken_D, [domain for domain, _ in rows], 1)
        self._credits_D, self._ahead = self._credits_ahead_D, []
        return list(dict.fromkeys(again))

    def reweigh(self, weights_D: NDArray[np.float64]) -> None:
        """Other weights from the next row on."""
        self.weights_D, self._ahead = weights_D, []

    def runs_dry(self, count: int) -> str | None:
        """A domain of which the next `count` rows want more than there are; None if there is none."""
        return next((self.names[d] for d, number in self.ahead(count) if number >= self.rows[d].num_rows), None)

    @property
    def masked(self) -> bool:
        """Whether some targets are not to be learnt."""
        return any(rows.tokens.mask is not None or isinstance(rows, WholeDocuments) for rows in self.rows)

    def cut_documents(self) -> dict[str, int]:
        """Documents of a domain that are longer than a row, and lose their end."""
        cut = {n: r.num_cut for n, r in zip(self.names, self.rows, strict=True) if isinstance(r, WholeDocuments)}
        return {name: count for name, count in cut.items() if count}

    def by_domain(self) -> dict[str, dict[str, float]]:
        """Weight and rows read of every domain."""
        values = zip(self.names, self.weights_D.tolist(), self.taken_D.tolist(), strict=True)
        return {name: {"weight": weight, "rows": taken} for name, weight, taken in values}

    def state(self) -> dict[str, Any]:
        """JSON values from which another Blend of the same files goes on with the next row."""
        size = {name: rows.num_rows for name, rows in zip(self.names, self.rows, strict=True)}
        credit = dict(zip(self.names, self._credits_D.tolist(), strict=True))
        domains = {name: value | {"of": size[name], "credit": credit[name]} for name, value in self.by_domain().items()}
        return {**self._order, "domains": domains}

    def restore(self, state: Mapping[str, Any], *, weights: bool) -> None:
        """Go on where another Blend was; `weights`: with its weights as well.

        Raises:
            UserError: it had other files, or rows in another order, so its place means nothing here.
        """
        mine = self.state()
        for key in self._order:
            if state[key] != mine[key]:
                section = "train" if key == "seed" else "data"
                raise UserError(
                    f"{section}.{key} is {mine[key]}, the checkpoint was made with {state[key]}, which orders the "
                    "data; keep it, or start a new run from model.checkpoint"
                )
        sizes, theirs = ({n: d["of"] for n, d in s["domains"].items()} for s in (mine, state))
        if sizes != theirs:
            raise UserError(
                f"data.train has rows {sizes}, the checkpoint was made with {theirs}; keep the token files, or start a "
                "new run from model.checkpoint"
            )
        domains = [state["domains"][name] for name in self.names]
        self.taken_D = np.array([domain["rows"] for domain in domains], np.int64)
        self._credits_D = np.array([domain["credit"] for domain in domains])
        if weights:
            self.weights_D = np.array([domain["weight"] for domain in domains])
        self._ahead = []


def _of_domains(key: str, given: Mapping[str, float], domains: tuple[str, ...]) -> NDArray[np.float64]:
    if set(given) != set(domains):
        raise UserError(
            f"{key} are of {', '.join(sorted(given))}, data.train of {', '.join(sorted(domains))}; name the same"
        )
    return np.array([given[name] for name in domains], np.float64)
