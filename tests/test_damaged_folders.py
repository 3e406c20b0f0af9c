"""Ten thousand damaged Hugging Face folders: each is read or refused, in time, and nothing outside of it is opened."""

import copy
import json
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from checkpoint_tools.source import open_source
from ep_engine.errors import UserError
from tests.family_cases import DEEPSEEK, MOLLAMA, family_folder, plain_folder

SECONDS = 20  # that one folder may take; they take a few milliseconds
COUNT = {"header": 4000, "index": 2500, "config": 3600}
FAMILIES = ("llama", "mistral", "mixtral", "qwen2_moe_with_dense", "qwen3_moe", "olmoe")
opened: list[str] | None = None


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and opened is not None and isinstance(arguments[0], str):
        opened.append(arguments[0])


sys.addaudithook(_listen)  # for good: a hook cannot be taken away


@contextmanager
def only_inside(folder: Path) -> Iterator[None]:
    """Fail if a file elsewhere is opened, but for those of Python and of this system."""
    global opened
    opened = []
    try:
        yield
        seen, opened = opened, None
        elsewhere = {path for path in seen if not Path(path).resolve().is_relative_to(folder.resolve())}
        assert not {path for path in elsewhere if not path.startswith((sys.prefix, sys.base_prefix, "/proc", "/sys"))}
    finally:
        opened = None


def outcome(folder: Path, expected: str = "") -> str:
    """`read` or `refused`, within some time and with the words that are expected; anything else fails the test."""
    signal.alarm(SECONDS)  # nobody handles it: the process ends, and says so
    try:
        for tensor in open_source(folder).tensors.values():
            tensor.sum()
    except UserError as error:
        message = str(error)
    else:
        assert not expected, f"it was read: {expected}"
        return "read"
    finally:
        signal.alarm(0)
    assert "\n" not in message
    assert expected in message
    return "refused"


ODD = (None, True, -1, 0, 1, 2**31, 2**63, -(2**63), 10**30, 1.5, float("nan"), float("inf"), "", "x", "8", [], {}, [0],
       [[1, 2], [3]], {"a": 1}, "\0", "../x", "/etc/passwd", "é" * 300)  # fmt: skip


def damaged(value: Any, draw: random.Random, depth: int = 0) -> Any:
    """A JSON value with one part of it replaced, repeated, or taken away."""
    if isinstance(value, (dict, list)) and value and depth < 6 and draw.random() < 0.85:
        changed = copy.copy(value)
        at = draw.choice(list(changed)) if isinstance(changed, dict) else draw.randrange(len(changed))
        kind = draw.random()
        if kind < 0.12:
            del changed[at]
        elif kind < 0.2 and isinstance(changed, dict):
            changed[draw.choice(("x", f"{at}x", "__metadata__", "../up"))] = changed[at]
        elif kind < 0.2:
            changed.insert(at, changed[at])
        else:
            changed[at] = damaged(changed[at], draw, depth + 1)
        return changed
    if isinstance(value, int) and not isinstance(value, bool) and draw.random() < 0.5:
        return value + draw.choice((-1, 1, 8, -value, 2**32))
    return draw.choice(ODD)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Whole models."""
    at = tmp_path_factory.mktemp("whole")
    found = {name: family_folder(at / name, name) for name in FAMILIES}
    found["deepseek"] = plain_folder(at / "deepseek", DEEPSEEK)
    found["mollama"] = plain_folder(at / "mollama", {**MOLLAMA, "gate_type": "gmm", "gating_size": 6})
    return found


def test_damaged_headers(folders: dict[str, Path], tmp_path: Path) -> None:
    draw = random.Random(1)
    folder = Path(shutil.copytree(folders["mixtral"], tmp_path / "model"))
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, body = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    found: Counter[str] = Counter()
    with only_inside(tmp_path):
        for number in range(COUNT["header"]):
            if number % 2:
                text = json.dumps(damaged(header, draw)).encode()
                data = len(text).to_bytes(8, "little") + text + body
            else:
                spoiled = bytearray(whole)
                for _ in range(draw.randint(1, 4)):
                    spoiled[draw.randrange(8 + length)] = draw.randrange(256)
                data = bytes(spoiled)
            if draw.random() < 0.1:
                data = data[: draw.randrange(len(data))]
            file.write_bytes(data)
            found[outcome(folder)] += 1
    assert found["refused"] > COUNT["header"] // 2


def test_damaged_indices(folders: dict[str, Path], tmp_path: Path) -> None:
    draw = random.Random(2)
    folder = Path(shutil.copytree(folders["qwen3_moe"], tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    parts = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / file)
    shutil.copy(folder / "a.safetensors", tmp_path / "a.safetensors")  # what an index that points outside would find
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    found: Counter[str] = Counter()
    with only_inside(folder):
        for number in range(COUNT["index"]):
            changed, expected = damaged(index, draw), ""
            if number % 3 == 0:
                outside = draw.choice(("../a.safetensors", "./../a.safetensors", str(tmp_path / "a.safetensors"), ".",
                                       "..", "a.safetensors/../../a.safetensors", "b.safetensors\0"))  # fmt: skip
                changed = {"weight_map": {**weight_map, draw.choice(names): outside}}
                expected = f"points to {outside!r}, which is outside of its folder"
            text = json.dumps(changed)
            if draw.random() < 0.05:
                text, expected = text[: draw.randrange(len(text))], ""
            (folder / "model.safetensors.index.json").write_text(text)
            found[outcome(folder, expected)] += 1
    assert found["refused"] > COUNT["index"] // 2


def test_damaged_configs(folders: dict[str, Path], tmp_path: Path) -> None:
    draw = random.Random(3)
    found: Counter[str] = Counter()
    for name, whole in folders.items():
        folder = Path(shutil.copytree(whole, tmp_path / name))
        config = json.loads((folder / "config.json").read_text())
        rules = {"top_t": 3, "collaborative_list": [[[1, 2, 0], [0, 2, 1], [0, 1, 2]]], "routing_rule": "c2r"}
        with only_inside(folder):
            for number in range(COUNT["config"] // len(folders)):
                changed = damaged(config | (rules if number % 4 == 0 else {}), draw)
                (folder / "config.json").write_text(json.dumps(changed))
                found[outcome(folder)] += 1
    assert found["refused"] > COUNT["config"] // 4
    assert found["read"] > 0
