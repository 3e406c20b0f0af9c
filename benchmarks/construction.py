"""How long does it take to cut an FFN into experts, and how well is it cut?

    python -m benchmarks.construction [--neurons 11008] [--dim 4096] [--experts 16] [--json OUT]

One layer of the shape of LLaMA-2-7B, rows drawn with a seed: mostly noise, with as many groups as experts, and nothing
but noise.

    clusters l2, cos    `split --method clustering`, in a process of its own whose peak memory is asked for
    k-means-constrained the library that LLaMA-MoE takes, on the same rows, if it is installed; it knows l2 alone, and
                        its clusters are scored by directions as well
    assignment          `split --method gradient`: exact, and the published greedy, on the same scores
    graph               `split --method coactivation`, in a process of its own: counts of 4096 tokens whose features are
                        noise and as many groups as experts, the graph of nine tenths of all pairs, its partition
"""

import argparse
import importlib.util
import multiprocessing
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.timing import write_results
from checkpoint_tools.assignment import greedy, optimal
from checkpoint_tools.balanced_kmeans import balanced_kmeans
from checkpoint_tools.coactivation import CoActivation, Graph


def rows(neurons: int, dim: int, experts: int, signal: float) -> Tensor:
    """Rows of length one: noise, and `signal` of the direction of a group."""
    draw = torch.Generator().manual_seed(0)
    centre_ED = torch.nn.functional.normalize(torch.randn(experts, dim, generator=draw), dim=1)
    hidden_N = torch.randint(experts, (neurons,), generator=draw)
    noise_ND = torch.nn.functional.normalize(torch.randn(neurons, dim, generator=draw), dim=1)
    return torch.nn.functional.normalize(signal * centre_ED[hidden_N] + noise_ND, dim=1)


def ours(neurons: int, dim: int, experts: int, signal: float, metric: str) -> dict[str, float]:
    """Balanced k-means."""
    x_ND = rows(neurons, dim, experts, signal)
    started = time.perf_counter()
    found = balanced_kmeans(x_ND, experts, metric=metric)  # type: ignore[arg-type]
    return {"seconds": time.perf_counter() - started, "inertia": found.inertia, "steps": found.steps}


def theirs(neurons: int, dim: int, experts: int, signal: float) -> dict[str, float]:
    """The library, as LLaMA-MoE calls it but for one start instead of ten."""
    from k_means_constrained import KMeansConstrained

    x_ND = rows(neurons, dim, experts, signal).numpy()
    size = neurons // experts
    started = time.perf_counter()
    found = KMeansConstrained(experts, size_min=size, size_max=size, n_init=1, random_state=0, tol=1e-4).fit(x_ND)
    told = {"seconds": time.perf_counter() - started, "inertia": float(found.inertia_), "steps": float(found.n_iter_)}
    return told | {"inertia of directions": inertia_of_directions(x_ND, found.labels_, experts)}


def inertia_of_directions(x_ND: NDArray[np.float32], label_N: NDArray[np.integer], experts: int) -> float:
    """Sum of squared distances of rows of length one to the direction of their cluster's mean."""
    mean_ED = np.stack([x_ND[label_N == expert].mean(axis=0, dtype=np.float64) for expert in range(experts)])
    centre_ED = mean_ED / np.linalg.norm(mean_ED, axis=1, keepdims=True)
    return float((2 - 2 * np.einsum("nd,nd->n", x_ND, centre_ED[label_N])).sum())


def assignments(neurons: int, experts: int) -> dict[str, Any]:
    """Both ways on scores like those of importance: positive, with long tails."""
    score_EN = np.random.default_rng(0).lognormal(size=(experts, neurons))
    found: dict[str, Any] = {}
    for name, way in (("exact", optimal), ("greedy", lambda scores: greedy(scores, neurons // experts))):
        started = time.perf_counter()
        chosen = way(score_EN)
        seconds = time.perf_counter() - started
        total = sum(float(score_EN[expert, of].sum()) for expert, of in enumerate(chosen))
        found[name] = {"seconds": seconds, "sum_of_scores": total}
    return found


def graph(neurons: int, experts: int, tokens: int = 4096) -> dict[str, float]:
    """Co-activation of neurons in hidden groups."""
    draw = torch.Generator().manual_seed(0)
    hidden_N = torch.randperm(neurons, generator=draw) % experts
    topic_T = torch.randint(experts, (tokens,), generator=draw)
    features_TN = 0.2 * torch.rand(tokens, neurons, generator=draw)
    features_TN += (topic_T[:, None] == hidden_N).float()
    started = time.perf_counter()
    counted = CoActivation(neurons, "l1_norm", float("inf"))
    counted.add(features_TN)
    counting = time.perf_counter() - started
    del features_TN
    started = time.perf_counter()
    found = Graph.of(counted.sum_NN.numpy())
    del counted
    making = time.perf_counter() - started
    started = time.perf_counter()
    parts, cut = found.partition(experts, seed=0)
    return {
        "counting_seconds": counting,
        "graph_seconds": making,
        "partition_seconds": time.perf_counter() - started,
        "seconds": making + time.perf_counter() - started,
        "entries": float(len(found.neighbour)),
        "sizes_exact": float({len(part) for part in parts} == {neurons // experts}),
        "cut_partitioned": cut.partitioned,
        "cut_balanced": cut.balanced,
        "groups_found": float(np.mean([hidden_N[part].bincount().max().item() / len(part) for part in parts])),
    }


def alone(body: Callable[..., dict[str, float]], *sizes: object) -> dict[str, float]:
    """What `body` returns, and the peak memory of a process that does nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_with_peak, body, *sizes).result()


def _with_peak(body: Callable[..., dict[str, float]], *sizes: object) -> dict[str, float]:
    return body(*sizes) | {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurons", type=int, default=11_008)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    library = importlib.util.find_spec("k_means_constrained") is not None
    results: dict[str, Any] = {}
    for title, signal in (("groups", 0.3), ("noise", 0.0)):
        sizes = args.neurons, args.dim, args.experts, signal
        found: dict[str, Any] = {f"clusters {metric}": alone(ours, *sizes, metric) for metric in ("l2", "cos")}
        if library:
            found["k-means-constrained"] = alone(theirs, *sizes)
            library_found = found["k-means-constrained"]
            found["inertia_vs_library"] = found["clusters l2"]["inertia"] / library_found["inertia"]
            found["cos_vs_library"] = found["clusters cos"]["inertia"] / library_found["inertia of directions"]
        results[title] = found
    results["assignment"] = assignments(args.neurons, args.experts)
    results["graph"] = alone(graph, args.neurons, args.experts)
    setting = {"neurons": args.neurons, "dim": args.dim, "experts": args.experts, "seed": 0}
    write_results(args.json, __doc__.splitlines()[0], setting, results)


if __name__ == "__main__":
    main()
