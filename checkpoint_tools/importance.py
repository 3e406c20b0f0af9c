"""Importance files: how much each cluster of a corpus needs each neuron, as LLaMA-MoE's gradient split publishes it.

    DIR/<cluster>/layers.{i}.mlp.up_proj.weight.change    a float tensor (N,), saved by torch; .grad is the other type

A cluster is an expert; clusters are taken in the order of their numbers.
"""

from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ep_engine.errors import UserError

FORMAT = "layers.{}.mlp.{}.weight.{}"  # layer, projection, kind
_KINDS = ("change", "grad")


class Importance:
    """Scores of all layers, read layer by layer.

    Args:
        folder: DIR.
        projection: `up_proj` or `gate_proj`, in the names of the files.
        num_experts: E; there are as many clusters, or `spare` more, which are not read.
        width: N.
        spare: clusters of residual experts.
        by_text: take clusters in the order of their numbers as text, 0, 1, 10, 2, as the published code does.

    Raises:
        UserError: there are fewer or more clusters, or their names are no numbers.
    """

    def __init__(
        self, folder: Path, projection: str, num_experts: int, width: int, spare: int = 0, *, by_text: bool = False
    ) -> None:
        self._projection, self._width = projection, width
        if not folder.is_dir():
            raise UserError(f"--importance {folder} is no folder; give that with a folder for each cluster")
        names = [path.name for path in folder.iterdir() if path.is_dir()]
        if not all(name.isdecimal() for name in names) or len(names) not in (num_experts, num_experts + spare):
            raise UserError(
                f"--importance {folder} has folders {sorted(names)[:9]}, expected one with a number for each of "
                f"{num_experts} experts; correct --num-experts or the folder"
            )
        self._clusters = [folder / name for name in sorted(names, key=str if by_text else int)[:num_experts]]

    def layer(self, layer: int) -> NDArray[np.float64]:
        """Scores of a layer, (E, N).

        Raises:
            UserError: a file is missing, is no tensor of this width, or holds what is no number.
        """
        return np.stack([self._read(cluster, layer) for cluster in self._clusters])

    def _read(self, cluster: Path, layer: int) -> NDArray[np.float64]:
        names = [cluster / FORMAT.format(layer, self._projection, kind) for kind in _KINDS]
        paths = [path for path in names if path.is_file()]
        if len(paths) != 1:
            raise UserError(f"there must be one of {names[0]} and .grad, found {len(paths)}; correct --on or the files")
        try:
            found = torch.load(paths[0], map_location="cpu", weights_only=True)
        except (RuntimeError, UnpicklingError, EOFError, ValueError) as error:
            raise UserError(f"{paths[0]} cannot be read ({str(error).splitlines()[0]}); make it again") from None
        if not isinstance(found, Tensor) or found.shape != (self._width,) or not found.isfinite().all():
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UserError(f"{paths[0]} must be a tensor of {self._width} finite numbers, got {what}; make it again")
        return found.double().numpy()
