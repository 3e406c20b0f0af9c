"""Agreement: what several ranks hold or decide alike, compared while a run goes on (EP_DEBUG=1).

Compared are the parts of weights and moments that lie on more than one rank, the rows that the ranks of one
data-parallel index read, and the experts that every rank of a stage would choose for the same made-up tokens, which
covers the gathered router weights and the tables of the rule.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from ep_engine.checksum import checksum
from ep_engine.data.batches import Batch
from ep_engine.entries import Shard
from ep_engine.errors import Fault
from ep_engine.mesh import Meshes
from ep_engine.model import Decoder

_PROBES = 64  # made-up tokens


def check_agreement(
    stages: Sequence[Decoder], entries: Mapping[str, Shard], batch: Batch, meshes: Meshes, step: int
) -> None:
    """Fault on every rank that names the first thing, in the order of the model, that two ranks have differently.

    Args:
        stages: of this rank, after a step.
        entries: its weights and moments.
        batch: rows that this rank has read.
        meshes: the ranks.
        step: for the sentence.
    """
    mine = _choices(stages)
    mine[f"the rows of data-parallel index {meshes.dense['dp'].get_local_rank()}"] = checksum(batch.inputs_BS)
    for name, shard in entries.items():
        part = f"{name} from element {shard.first} on, {tuple(shard.tensor.shape)}"
        mine[part] = checksum(shard.tensor, first=shard.first, pitch=shard.pitch)
    of_rank: list[dict[str, int]] = [{}] * dist.get_world_size(meshes.world)
    dist.all_gather_object(of_rank, mine, group=meshes.world)
    for name in {name: None for values in of_rank for name in values}:
        held = {rank: values[name] for rank, values in enumerate(of_rank) if name in values}
        first = min(held)
        for rank, value in held.items():
            if value != held[first]:
                raise Fault(
                    f"step {step}: {name} differs between ranks {first} and {rank} (checksums {held[first]:016x} and "
                    f"{value:016x}), which must have the same; look at what changes it on one of them alone",
                    everywhere=True,
                )


@torch.no_grad()
def _choices(stages: Sequence[Decoder]) -> dict[str, int]:
    """A checksum of what each router chooses for the same tokens."""
    chosen: dict[str, int] = {}
    for stage in stages:
        for i, moe in stage.moe_layers().items():
            router = moe.router
            probe_TD = torch.randn(_PROBES, moe.hidden_size, generator=torch.Generator().manual_seed(i))
            gathered = [m for m in (stage.decoder_layers()[i], router) if isinstance(m, FSDPModule)]
            for module in gathered:
                module.unshard()
            ids_TK = router(probe_TD.to(router.w_in.device)).ids_TK
            for module in gathered:
                module.reshard()
            chosen[f"the routing of layer {i}"] = checksum(ids_TK)
    return chosen
