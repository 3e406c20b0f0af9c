"""Feed: what a rank reads of every batch of a run, and what is to be told of the data.

Shape letters:  B rows of this rank in a part of a batch   S positions
"""

import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ep_engine.data.batches import PADDING, Batch, rows_of_rank
from ep_engine.errors import Fault, UserError
from ep_engine.mesh import Meshes
from ep_engine.resolve import Run

_log = logging.getLogger(__name__)


class Feed:
    """The rows of one rank.

    Attributes:
        blend: where the run is in its data.
    """

    def __init__(self, run: Run, meshes: Meshes, device: torch.device) -> None:
        self.blend, self._device, self._meshes = run.blend(), device, meshes
        self._config, self._is_first = run.config, dist.get_rank(meshes.world) == 0
        self._told_dry = False
        for name, count in self.blend.cut_documents().items():
            self._tell(
                f"{count} documents of domain {name} are longer than {self._length} tokens and cut there; `ep-engine "
                "tokenize --max-length` shortens questions too"
            )

    def parts(self, step: int) -> list[Batch]:
        """This rank's rows of all parts of the next batch, which is that of `step`, on the device."""
        return [self.part(number, step) for number in range(self._config.train.micro_batches)]

    def part(self, number: int, step: int) -> Batch:
        """Of one part."""
        try:
            return self.blend.read(self._rows_of_part(number)).to(self._device)
        except UserError as error:  # text that only this rank has read: not said before the start, nor by all
            raise Fault(f"step {step + 1} on rank {dist.get_rank(self._meshes.world)}: {error}") from None

    def domains(self) -> list[int]:
        """The domain, by its place in `blend.names`, of every row of `parts`, part after part."""
        return [domain for i in range(self._config.train.micro_batches) for domain, _ in self._rows_of_part(i)]

    def _rows_of_part(self, number: int) -> list[tuple[int, int]]:
        dp = self._meshes.dense["dp"]
        rows = self.blend.ahead(self._config.data.batch_size)
        of_part = len(rows) // self._config.train.micro_batches
        mine = rows_of_rank(of_part, dp.get_local_rank(), dp.size())
        return [rows[number * of_part + i] for i in mine]

    def numbers(self, parts: Sequence[Batch], step: int) -> list[Tensor]:
        """(B, S) int64 for each part: the numbers in the run of its tokens, -1 of padding."""
        of_part = self._config.data.batch_size // len(parts)
        found = []
        for number, batch in enumerate(parts):
            first = (step * len(parts) + number) * of_part
            first += self._meshes.dense["dp"].get_local_rank() * len(batch.inputs_BS)
            tokens = torch.arange(batch.inputs_BS.numel(), device=self._device).view_as(batch.inputs_BS)
            found.append((first * self._length + tokens).masked_fill(batch.documents_BS == PADDING, -1))
        return found

    def counts(self, parts: Sequence[Batch]) -> tuple[int, int]:
        """Tokens of the batch, on all ranks, that are no padding, and those to be learnt; at least 1."""
        if not self.blend.masked:
            whole = self._config.data.batch_size * self._length
            return whole, whole
        of_parts = [((part.documents_BS != PADDING).sum(), (part.targets_BS >= 0).sum()) for part in parts]
        counts_2 = torch.stack([torch.stack(two) for two in of_parts]).sum(dim=0)
        dist.all_reduce(counts_2, group=self._meshes.dense["dp"].get_group())
        tokens, targets = counts_2.tolist()
        return tokens, max(targets, 1)

    @property
    def tokens_read(self) -> int:
        """Positions of all rows that the run has read, in whatever batches, padding among them."""
        return int(self.blend.taken_D.sum()) * self._length

    def advance(self, step: int) -> None:
        """Take the rows of a batch, after which the run is at `step`."""
        for name in self.blend.advance(self._config.data.batch_size):
            self._tell(f"step {step}: all rows of domain {name} were read; they come again in another order")

    def has_run_dry(self, step: int) -> bool:
        """Whether the next batch needs more of a domain than there is, and the run is to end there."""
        data = self._config.data
        dry = self.blend.runs_dry(data.batch_size) if data.when_exhausted == "stop" else None
        if dry is not None and not self._told_dry:
            self._tell(f"domain {dry} has run dry after step {step} of {self._config.train.steps}; the run ends")
        self._told_dry = dry is not None
        return dry is not None

    @property
    def _length(self) -> int:
        return self._config.data.sequence_length

    def _tell(self, sentence: str) -> None:
        if self._is_first:
            _log.warning(sentence)
