"""Profiles of several ranks are those of one, halves are halves, and what is said of collaboration is by the book."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from ep_engine.c2r.collaboration import Profile, agreement
from ep_engine.c2r.collaboration_report import describe_collaboration, draw_collaboration
from ep_engine.c2r.profile import profile
from ep_engine.data.corpus import text_files
from ep_engine.data.tokens import TokenFile
from ep_engine.errors import UserError
from ep_engine.mesh import World
from tests.counts import COUNTS, DATA, LOAD, profile_of, published
from tests.distributed import run_ranks
from tests.run_files import make_files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


def _profile_on_a_rank(rank: int, world_size: int, files: Path, out: Path) -> None:
    found = profile(
        files / "moe",
        TokenFile(files / "train"),
        max_tokens=48 * 16 + 9,
        sequence_length=16,
        keep_ids=True,
        world=World(rank=rank, size=world_size),
    )
    if rank == 0:
        found.profile.save(out / f"{world_size}.npz")
        np.save(out / f"{world_size}.npy", found.ids_LTK)
        (out / f"{world_size}.json").write_text(json.dumps(found.halves))
    else:
        assert found.ids_LTK is None
    assert dist.is_initialized()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_count_together_what_one_counts(world_size: int, files: Path, tmp_path: Path) -> None:
    """48 windows: the same ones for every number of ranks, though 4 ranks have them in one pass."""
    alone = profile(
        files / "moe", TokenFile(files / "train"), max_tokens=48 * 16 + 9, sequence_length=16, keep_ids=True
    )
    run_ranks(_profile_on_a_rank, files, tmp_path, world_size=world_size)
    with np.load(tmp_path / f"{world_size}.npz") as found:
        assert np.array_equal(found["counts"], alone.profile.counts)
        assert np.array_equal(found["load"], alone.profile.load)
        assert int(found["tokens"]) == alone.profile.about["tokens"] == 48 * 16
        assert str(found["model_hash"]) == alone.profile.about["model_hash"]
    assert alone.ids_LTK is not None
    ids_LTK = np.load(tmp_path / f"{world_size}.npy")
    assert np.array_equal(ids_LTK, alone.ids_LTK)  # in the same order: windows follow each other over ranks
    assert json.loads((tmp_path / f"{world_size}.json").read_text())[-1] == pytest.approx(alone.halves[-1])
    pairs = sum(np.isin(alone.ids_LTK[0], [a]).any(axis=1) & np.isin(alone.ids_LTK[0], [b]).any(axis=1)
                for a, b in [(2, 5)])  # fmt: skip
    assert alone.profile.counts[0, 2, 5] == pairs.sum()


def test_halves_are_windows_with_even_and_odd_numbers(files: Path) -> None:
    found = profile(files / "moe", TokenFile(files / "train"), max_tokens=40 * 16, sequence_length=16, keep_ids=True)
    assert found.ids_LTK is not None
    assert [tokens for tokens, _ in found.halves] == [8 * 16, 16 * 16, 20 * 16]  # after 1, 2 and all of 3 passes
    windows = found.ids_LTK.reshape(2, 40, 16, 2)
    halves = []
    for parity in range(2):
        counts = np.zeros((2, 8, 8), dtype=np.int64)
        for layer in range(2):
            for one, other in windows[layer, parity::2].reshape(-1, 2):
                counts[layer, one, other] += 1
                counts[layer, other, one] += 1
        halves.append(counts)
    assert np.array_equal(halves[0] + halves[1], found.profile.counts)
    assert found.halves[-1][1] == pytest.approx(np.mean(agreement(*halves)))


def test_a_rank_with_too_little_text_is_told_so(files: Path) -> None:
    text = TokenFile(files / "train")
    with pytest.raises(UserError, match=r"--max-tokens \(31\) must be at least one window of 16 tokens for each of 2"):
        profile(files / "moe", text, max_tokens=31, sequence_length=16, world=World(size=2))


def test_agreement_is_the_correlation_of_pairs() -> None:
    random = np.random.default_rng(0)
    one, other = (random.integers(0, 50, (2, 6, 6)) for _ in range(2))
    rows, columns = np.triu_indices(6, 1)
    expected = [np.corrcoef(one[i][rows, columns], other[i][rows, columns])[0, 1] for i in range(2)]
    assert agreement(one, other) == pytest.approx(expected)
    assert agreement(one, 3 * one) == pytest.approx([1.0, 1.0])
    assert all(math.isnan(value) for value in agreement(one, np.ones_like(one)))


def test_collaboration_by_hand() -> None:
    found = describe_collaboration(Profile(COUNTS[None], LOAD[None], 2, {}))
    shares = [[5, 1, 3], [5, 3, 3], [1, 3], [3, 3]]
    entropies = [-sum(n / sum(row) * math.log(n / sum(row)) for n in row) for row in shares]
    assert found["entropy"] == pytest.approx(np.mean(entropies))
    assert found["collaboration"] == pytest.approx(np.mean(entropies) / math.log(3))
    assert found["partners"] == 2.5
    assert found["top_partner_share"] == pytest.approx(np.mean([5 / 9, 5 / 11, 3 / 4, 1 / 2]))
    assert found["load_cv"] == pytest.approx(np.std([9, 11, 4, 6]) / 7.5)
    assert found["load_max_over_mean"] == pytest.approx(11 / 7.5)
    assert found["layers"] == [{key: found[key] for key in found if key != "layers"}]


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_few_experts_and_no_pairs_have_figures_too(experts: int) -> None:
    nothing = np.zeros((1, experts, experts), dtype=np.int64)
    assert describe_collaboration(Profile(nothing, np.zeros((1, experts), dtype=np.int64), 1, {}))["entropy"] == 0.0


@published
@pytest.mark.parametrize(
    ("name", "entropy", "collaboration", "partners", "top", "cv", "most"),
    [
        ("base", 1.2102, 0.6219, 6.914, 0.5243, 0.1320, 1.269),
        ("topt_1", 0.1503, 0.0772, 1.234, 0.9063, 0.3148, 1.575),
        ("topt_2", 0.6742, 0.3465, 2.305, 0.6423, 0.1938, 1.325),
    ],
)
def test_published_collaboration(
    name: str, entropy: float, collaboration: float, partners: float, top: float, cv: float, most: float
) -> None:
    found = describe_collaboration(profile_of(np.load(DATA / "llama_moe_collaboration.npz")[name]))
    # as many digits as are printed: specs/c2r.md 5.2
    assert found["entropy"] == pytest.approx(entropy, abs=5e-5)
    assert found["collaboration"] == pytest.approx(collaboration, abs=5e-5)
    assert found["partners"] == pytest.approx(partners, abs=5e-4)
    assert found["top_partner_share"] == pytest.approx(top, abs=5e-5)
    assert found["load_cv"] == pytest.approx(cv, abs=5e-5)
    assert found["load_max_over_mean"] == pytest.approx(most, abs=5e-4)


@pytest.mark.parametrize("layers", [1, 5, 12])
def test_a_picture_has_a_map_for_each_of_the_first_layers(layers: int) -> None:
    figure = draw_collaboration(profile_of(np.stack([COUNTS] * layers)), [(100, 0.5), (200, 0.7)])
    maps = [axis for axis in figure.axes if axis.images]
    assert len(maps) == min(layers, 8)
    (bars, _, trust) = figure.axes[-3:]
    assert len(bars.patches) == layers
    assert trust.lines[0].get_xydata().tolist() == [[100, 0.5], [200, 0.7]]


def test_text_files_of_folders_come_in_order_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b/two.txt", "a.txt", "b/.hidden/x.txt", ".git/config", "b/one.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = text_files([tmp_path / "b", tmp_path])
    assert [str(file.relative_to(tmp_path)) for file in found] == [
        "b/one.txt", "b/two.txt", "a.txt", "b/one.txt", "b/two.txt",
    ]  # fmt: skip
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"corpus .*/empty holds 0 files"):
        text_files([tmp_path / "empty"])
