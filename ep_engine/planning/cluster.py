"""Clusters: what their devices and links can do, as a TOML file says, and how long that takes.

    name = "two emulated nodes"
    origin = "measured"            # or "modelled": of published figures
    sources = ["benchmarks/nodes.py"]
    nodes = 2                      # unless a command says otherwise
    devices_per_node = 1
    overlap = 0.0                  # share of the exchanges of experts' rows that computation can hide

    [device]
    memory_gb = 12
    dense_tflops = 0.05            # matrix products outside of experts, of experts, and attention
    experts_tflops = 0.04
    attention_tflops = 0.03
    moved_gb_per_s = 5             # what is read and written by all else

    [network]                      # between nodes; [node], the same inside of one, is needed with several devices
    gbit_per_s = 0.1               # nominal, in each direction
    shared = true                  # by the devices of a node; else each has as much
    latency_us = 500               # of an exchange of few bytes
    rows = {share = 0.95, software_gbit_per_s = 0.8}     # experts' rows: an all-to-all
    gather = {share = 0.6, software_gbit_per_s = 0.9}    # weights, and sequences of tensor parallelism
    reduce = {share = 0.5, software_gbit_per_s = 0.7}    # gradients

    [validated]                    # where predictions have been compared with measurements
    nodes = [2, 4]
    network_gbit_per_s = [0.1, 1.0]
    hidden_size = [512, 512]
    rules = ["topk", "c2r", "c2r_grouped"]
    mean_error = 0.08

A byte takes 1 / (share * nominal) for the link and 1 / software for the processors that send and receive it.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from ep_engine.config import read_toml
from ep_engine.errors import UserError
from ep_engine.model_config import first_sentence

Kind = Literal["rows", "gather", "reduce"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Carried(_Part):
    """How much of a link an exchange of some kind gets."""

    share: FiniteFloat = Field(1.0, gt=0, le=1)
    software_gbit_per_s: FiniteFloat | None = Field(None, gt=0)


class Tier(_Part):
    """Links of one kind."""

    gbit_per_s: FiniteFloat = Field(gt=0)
    latency_us: FiniteFloat = Field(ge=0)
    shared: bool = False
    rows: Carried = Carried()
    gather: Carried = Carried()
    reduce: Carried = Carried()

    def ms(self, kind: Kind, num_bytes: float) -> float:
        """Milliseconds that bytes take, without the latency."""
        carried: Carried = getattr(self, kind)
        ns_per_bit = 1 / (self.gbit_per_s * carried.share)
        if carried.software_gbit_per_s is not None:
            ns_per_bit += 1 / carried.software_gbit_per_s
        return num_bytes * 8 * ns_per_bit * 1e-6


class Device(_Part):
    """What one device has and does."""

    memory_gb: FiniteFloat = Field(gt=0)
    dense_tflops: FiniteFloat = Field(gt=0)
    experts_tflops: FiniteFloat = Field(gt=0)
    attention_tflops: FiniteFloat = Field(gt=0)
    moved_gb_per_s: FiniteFloat = Field(gt=0)


class Validated(_Part):
    """The range in which predictions have been compared with measurements, and how far off they were on average."""

    nodes: tuple[int, int]
    network_gbit_per_s: tuple[float, float]
    hidden_size: tuple[int, int]
    rules: tuple[str, ...]
    mean_error: FiniteFloat = Field(ge=0)


class Cluster(_Part):
    """See above."""

    name: str
    origin: Literal["measured", "modelled"]
    sources: tuple[str, ...] = ()
    nodes: int = Field(ge=1)
    devices_per_node: int = Field(ge=1)
    overlap: FiniteFloat = Field(0.0, ge=0, le=1)
    device: Device
    node: Tier | None = None
    network: Tier | None = None
    validated: Validated | None = None

    @model_validator(mode="after")
    def _check(self) -> "Cluster":
        if self.devices_per_node > 1 and self.node is None:
            raise ValueError(f"[node], its links, is needed with devices_per_node {self.devices_per_node}; add it")
        if self.nodes > 1 and self.network is None:
            raise ValueError(f"[network], its links, is needed with nodes {self.nodes}; add it")
        return self

    @property
    def devices(self) -> int:
        """In all."""
        return self.nodes * self.devices_per_node

    def tier(self, name: str) -> Tier:
        """Links of the tier `node` or `network`."""
        found = self.node if name == "node" else self.network
        assert found is not None, "checked above"
        return found

    def changed(self, nodes: int | None, network_gbit_per_s: float | None) -> "Cluster":
        """The same with another number of nodes, or another network."""
        raw = self.model_dump()
        if nodes is not None:
            raw["nodes"] = nodes
        if network_gbit_per_s is not None:
            if self.network is None:
                raise UserError(
                    f"cluster {self.name} has no [network] for --network-gbit ({network_gbit_per_s}); add one"
                )
            raw["network"]["gbit_per_s"] = network_gbit_per_s
        return make_cluster(raw, f"cluster {self.name}")


def read_cluster(path: Path) -> Cluster:
    """Read a cluster's file; UserError with the first thing that is wrong with it."""
    return make_cluster(read_toml(path, "cluster"), f"cluster {path}")


def make_cluster(raw: dict[str, object], where: str) -> Cluster:
    """Cluster of nested dictionaries; `where` names the source in a UserError."""
    try:
        return Cluster.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{where}: {first_sentence(error)}") from None
