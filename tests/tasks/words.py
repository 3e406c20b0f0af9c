"""The data of the tasks beside it, without a network and without a cache."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets.table import InMemoryTable


def load(**_: Any) -> dict[str, Dataset]:
    """Eight solved questions and 32 others."""
    rows = [json.loads(line) for line in Path(__file__).with_name("words.jsonl").read_text().splitlines()]
    parts = {"train": rows[:8], "test": rows[8:]}
    # With fingerprints: those that `Dataset.from_list` makes need dill, which cannot pickle pyarrow 26's tables.
    return {name: Dataset(InMemoryTable.from_pylist(part), fingerprint=name) for name, part in parts.items()}
