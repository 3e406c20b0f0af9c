"""What one rank of benchmarks/nodes.py does: steps and exchanges of every arm in turn, or what devices and links do.

launch/nodes.sh N --bandwidth B -m benchmarks.nodes_rank FOLDER ROUNDS    (FOLDER/arms.json says which; rates if none)
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.ranks import Together, all_times
from benchmarks.rates import device_calls, link_calls
from benchmarks.trained_moe import run_config
from ep_engine.combine import combine
from ep_engine.dispatch import dispatch
from ep_engine.ledger import DIRECTIONS
from ep_engine.mesh import Meshes, World, process_groups
from ep_engine.moe_layer import MoELayer
from ep_engine.plan import make_plan
from ep_engine.resolve import resolve
from ep_engine.training.trainer import Trainer
from ep_engine.transports.transport import Collective

CPU = torch.device("cpu")
ROWS_PER_RANK = 4
Choices = list[tuple[MoELayer, Tensor, Tensor]]


@dataclass
class Arm:
    """One way to route and to send, as a run whose steps are called one by one."""

    trainer: Trainer
    choices: Choices  # layer, experts and weights of this rank's tokens

    @classmethod
    def of(cls, folder: Path, sections: dict[str, Any], world: World, meshes: Meshes) -> "Arm":
        """Load the checkpoint and route one batch."""
        config = run_config(folder, "arm", rows=ROWS_PER_RANK * world.size, **sections)
        trainer = Trainer(resolve(config, world.size, ranks_per_node=world.local_size), meshes, CPU)
        choices: Choices = []
        layers = trainer.stages[0].moe_layers().values()
        hooks = [
            layer.router.register_forward_hook(
                lambda _, __, routing, layer=layer: choices.append(
                    (layer, routing.ids_TK.detach(), routing.weights_TK.detach())
                )
            )
            for layer in layers
        ]
        with torch.no_grad():
            trainer.pipeline.forward(trainer.feed.part(0, 0))
        for hook in hooks:
            hook.remove()
        return cls(trainer, choices)

    def exchange(self) -> None:
        """All exchanges of a step and nothing else: the experts are the identity."""
        for layer, ids_TK, weights_TK in self.choices:
            x_TD = torch.ones(len(ids_TK), layer.hidden_size, requires_grad=True)
            plan = make_plan(ids_TK, layer.way[0])
            rows_RD, _, arrival = dispatch(x_TD, weights_TK.clone().requires_grad_(), plan, layer.way)
            combine(rows_RD, arrival).backward(torch.ones_like(x_TD))

    def sent(self) -> list[list[int]]:
        """[layer * direction][rank]: bytes that leave a node or a rank in one step, from the ledger."""
        ledger = self.trainer.ledger
        ledger.reset()
        self.exchange()
        own = [
            sum(ledger.sent[layer, direction, tier] for tier in ("node", "network"))
            for layer in sorted({layer for layer, _, _ in ledger.sent})
            for direction in DIRECTIONS
        ]
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, own)
        return [list(of_ranks) for of_ranks in zip(*every, strict=True)]


def _rates(meshes: Meshes, threads: int) -> dict[str, Together]:
    links = link_calls(Collective(meshes.dispatch, meshes.down.get("dispatch")))
    calls = {f"link {name}": call for name, call in links.items()}
    calls |= {f"rate {name}": call for name, call in device_calls().items()}
    return {name: Together(call, threads=threads) for name, call in calls.items()}


def main() -> None:
    """Measure, and write FOLDER/measured.json on rank 0."""
    folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
    asked: dict[str, dict[str, Any]] = json.loads((folder / "arms.json").read_text())
    world = World.from_environment()
    with process_groups(world, CPU, world.size, 600.0) as meshes:
        threads = torch.get_num_threads()
        arms = {name: Arm.of(folder, sections, world, meshes) for name, sections in asked.items()}
        calls = {} if arms else _rates(meshes, threads)
        for name, arm in arms.items():
            calls[f"step {name}"] = Together(arm.trainer.one_step, threads=threads)
            calls[f"exchange {name}"] = Together(arm.exchange, threads=threads)
        # Each exchange has been made once, each kind of step too: links of 100 Mbit/s make a round long.
        sent = {name: arm.sent() for name, arm in arms.items()}
        for arm in arms.values():
            arm.trainer.one_step()
        times = all_times(calls, rounds=rounds, warm_up=0 if arms else 1)
        tokens = {name: len(arm.choices[0][1]) for name, arm in arms.items()}
        if world.rank == 0:
            found = {"times_ms": times, "sent": sent, "tokens": tokens}
            (folder / "measured.json").write_text(json.dumps(found))
        dist.barrier()


if __name__ == "__main__":
    main()
