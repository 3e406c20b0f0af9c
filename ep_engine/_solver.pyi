import numpy as np
from numpy.typing import NDArray

def solve(
    *,
    devices: int,
    nodes: int,
    node_weight: int,
    pairs: NDArray[np.int64] | None,
    tokens: NDArray[np.int16] | None,
    load: NDArray[np.int64],
    room: int,
    seed: int,
    starts: int,
    refined: int,
    steps: int,
    partitions: int,
    seconds: float,
) -> tuple[NDArray[np.int32], int, int, bool, bool]: ...
