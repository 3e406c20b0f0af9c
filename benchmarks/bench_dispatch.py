"""What does one row per device save, against one row per copy, in bytes and in time?

    torchrun --standalone --nproc-per-node 2 -m benchmarks.bench_dispatch [--tokens 1024] [--json OUT]

Plan, dispatch and combine with their backwards; the experts are the identity, so that only the way is timed. Random
routing, not forced to balance; experts in the order of their ids, so no placement helps.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.timing import time_in_turn, write_results
from ep_engine.combine import combine
from ep_engine.dispatch import dispatch
from ep_engine.ledger import Ledger
from ep_engine.placement import Placement
from ep_engine.plan import Site, make_plan, record, way_to
from ep_engine.transports.transport import Collective, Link


def there_and_back(link: Link, site: Site, tokens: int, hidden: int, top_k: int) -> Callable[[], None]:
    """One pass of this rank's tokens, forward and backward; ranks start together."""
    generator = torch.Generator().manual_seed(link.transport.rank)
    num_experts = len(site.slot_of_expert)
    x = torch.randn(tokens, hidden, generator=generator).requires_grad_()
    weights, ids = torch.rand(tokens, num_experts, generator=generator).topk(top_k)
    weights.requires_grad_()
    grad = torch.randn(tokens, hidden, generator=generator)

    way = way_to(site, (link,))

    def call() -> None:
        dist.barrier()
        rows_RD, _, arrival = dispatch(x, weights, make_plan(ids, way[0]), way)
        record(ids, site, arrival.plans)
        combine(rows_RD, arrival).backward(grad)
        dist.barrier()

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 1024), ("hidden", 1024), ("experts", 64), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    dist.init_process_group("gloo")
    transport = Collective(dist.group.WORLD)
    placement = Placement.contiguous(args.experts, transport.size, 1)
    tiers = ["self" if rank == transport.rank else "node" for rank in range(transport.size)]
    results = {}
    for top_k in (2, 4, 8):
        calls, ledgers = {}, {}
        for name, one_row_per_copy in (("per_expert", True), ("per_device", False)):
            ledgers[name] = Ledger(tiers)
            site = Site.of(placement, 0, transport.size, transport.rank, one_row_per_copy=one_row_per_copy)
            link = Link(transport, ledgers[name], 0)
            calls[name] = there_and_back(link, site, args.tokens, args.hidden, top_k)
        times = time_in_turn(calls, rounds=args.rounds)
        for name, ledger in ledgers.items():
            bytes_per_token = ledger.gathered(dist.group.WORLD).bytes_per_token()["total"]
            results[f"top-{top_k} {name}"] = {**times[name], "bytes_per_token": bytes_per_token}
    if transport.rank == 0:
        setting = {"ranks": transport.size, **{name: value for name, value in vars(args).items() if name != "json"}}
        write_results(args.json, "plan, dispatch and combine, forward and backward, float32, gloo", setting, results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
