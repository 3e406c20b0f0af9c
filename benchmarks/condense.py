"""What does it cost and save to condense layers with experts, beside dropping them, and how long is the search?

    python -m benchmarks.condense [--smoke] [--out runs/condense] [--json OUT]

A model like DeepSeekMoE (64 experts, top-6, 2 shared, a dense first layer and 8 with experts), small, is trained on the
text of this Python's standard library. Its files are cut in three: to train on, to search on, and held out, on which
all losses are. The searches are timed against brute force (condense_search.py), and then the arms of condense_curve.py
are made with 2, 4, 6 and all 8 layers, which leaves no experts: such a model is not expert-parallel.

Every point is tuned lightly, all on the same batches for as many steps at the same rates: all weights, in every arm and
of the original, for more training helps any of them; and, as CD-MoE does, of condensed layers the matrices alone, the
weights of experts kept apart; but for frequency and mass. There is one seed, so small differences of losses tell
nothing.

FOLDER/text     token files, tokenizer, search.jsonl     FOLDER/runs    runs of training
FOLDER/models   what the searches found, checkpoints     FOLDER/condense.json, condense.png   figures, written last

What is in the folder is not done again, so that a benchmark which was ended goes on.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.condense_curve import RANKS, Made, arms_of, measure, sizes, speeds, tune
from benchmarks.condense_plot import ORIGINAL, draw, show
from benchmarks.condense_search import compare_searches, search_layers
from benchmarks.ranks import on_ranks
from benchmarks.study_report import is_done
from benchmarks.timing import write_results
from benchmarks.training import train_rank
from ep_engine.checkpoint import newest
from ep_engine.config import RunConfig, make_config
from ep_engine.data.corpus import encode_files, read_source, split_by_file, standard_library_files, train_tokenizer
from ep_engine.entries import Shard, expected_entries
from ep_engine.errors import UserError
from ep_engine.initial import initialise
from ep_engine.model_config import ModelConfig, MoEConfig, read_model_config
from ep_engine.output import whole_file
from ep_engine.quickstart import Progress
from ep_engine.whole_model import write_model

SHARED = 2  # experts, in one matrix of their widths together
TUNINGS = {"all": "all", "condensed": "condensed-experts"}  # and train.trainable
_PIECE = 1000  # characters of a text to search on, enough for a row of tokens


@dataclass(frozen=True)
class CondenseSizes:
    """How large everything is; the defaults are meant for twenty minutes on two cores."""

    vocab_size: int = 4096
    hidden_size: int = 128
    num_layers: int = 8  # with experts
    num_heads: int = 4
    num_experts: int = 64
    top_k: int = 6  # and experts that stay in a condensed layer
    expert_hidden_size: int = 64
    merged: int = 8  # experts that a merged layer is left with
    sequence_length: int = 128
    batch_size: int = 16
    steps: int = 600
    tune_steps: int = 30
    learning_rate: float = 2e-3
    tune_learning_rate: float = 2e-4
    heldout_batches: int = 8
    condensed: tuple[int, ...] = (2, 4, 6, 8)  # layers
    search_texts: int = 32  # for searches; weights are counted on all, so that every expert has one
    compared: tuple[int, int] = (2, 64)  # texts and tokens of each on which the searches are compared
    rounds: int = 10  # of forwards that are timed
    files: int | None = None  # of the corpus, on each side; None: all


SMOKE = CondenseSizes(
    vocab_size=512,
    hidden_size=32,
    num_layers=3,
    num_heads=2,
    num_experts=8,
    top_k=2,
    expert_hidden_size=16,
    merged=4,
    sequence_length=32,
    batch_size=4,
    steps=6,
    tune_steps=2,
    heldout_batches=2,
    condensed=(1, 2),
    compared=(2, 16),
    rounds=2,
    files=16,
)


@dataclass
class Condensing:
    """A folder, what is done in it, and how large."""

    out: Path
    sizes: CondenseSizes
    progress: Progress = field(default_factory=Progress)

    def run(self) -> dict[str, Any]:
        """All stages that are not done; returns the results.

        Raises:
            UserError: the folder holds something else, or this benchmark with other sizes.
        """
        self._claim()
        text = self._once("text/text.json", self._text)
        base = self._base()
        texts = self.sizes.sequence_length, self.sizes.search_texts
        made = Made(self.out / "models", base, self.out / "text/search.jsonl", *texts)
        made.folder.mkdir(exist_ok=True)
        search = self._once("search.json", lambda: self._search(made))
        models, tuned = self._models(made)
        measured = self._once("measured.json", lambda: self._measure(models))
        self._tune(tuned)
        trained = json.loads((self.out / "runs/base/summary.json").read_text())
        curve = {name: self._figures(name, folder, measured) for name, folder in models.items()}
        show(curve)
        draw(self.out / "condense.png", curve)
        base_run = {name: trained[name] for name in ("steps", "heldout_loss", "tokens_per_second")}
        orders = {path.stem: json.loads(path.read_text()) for path in sorted(made.folder.glob("layers-*.json"))}
        return {"text": text, "base": base_run, "search": search, "orders": orders, "curve": curve}

    def _claim(self) -> None:
        mark, sizes_text = self.out / "sizes.json", json.dumps(asdict(self.sizes), indent=1) + "\n"
        if mark.is_file():
            if mark.read_text() != sizes_text:
                raise UserError(f"{self.out} holds this benchmark with other sizes; choose another --out, or delete it")
            return
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"{self.out} is there and holds no such benchmark; choose another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        with whole_file(mark) as beside:
            beside.write_text(sizes_text)

    def _once(self, name: str, body: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `body` returns, kept in a file."""
        path = self.out / name
        if not path.is_file():
            found = body()
            with whole_file(path) as beside:
                beside.write_text(json.dumps(found, indent=1) + "\n")
        kept: dict[str, Any] = json.loads(path.read_text())
        return kept

    def _text(self) -> dict[str, Any]:
        """Three parts without a file in common."""
        text = self.out / "text"
        shutil.rmtree(text, ignore_errors=True)
        rest, heldout = split_by_file(standard_library_files(), 0.1, 0)
        train_on, search_on = split_by_file(rest, 0.1, 1)
        parts = {"train": train_on, "search": search_on, "heldout": heldout}
        parts = {name: files[: self.sizes.files] for name, files in parts.items()}
        texts = {
            name: [source for path in files if (source := read_source(path)) is not None]
            for name, files in parts.items()
        }
        train_tokenizer(texts["train"], self.sizes.vocab_size, text / "tokenizer")
        tokens = {
            name: encode_files(parts[name], text / "tokenizer", text / name).num_tokens for name in ("train", "heldout")
        }
        # From within files, for they begin alike; first one piece of each, then another.
        starts = [(source, len(source) * fifth // 5) for fifth in (1, 2, 3, 4) for source in texts["search"]]
        pieces = [source[at : at + _PIECE] for source, at in starts if at + _PIECE <= len(source)]
        (text / "search.jsonl").write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
        self.progress.done(f"text: {tokens['train']:,} tokens to train on, {len(pieces)} texts to search on")
        return {"files": {name: len(files) for name, files in parts.items()}, "tokens": tokens, "texts": len(pieces)}

    def _base(self) -> Path:
        """The trained model."""
        folder, new = self.out / "runs/base", self.out / "new"
        if not is_done(folder, self.sizes.steps):
            shutil.rmtree(new, ignore_errors=True)
            write_new(new, model_config(self.sizes))
            on_ranks(
                train_rank, self._config(folder, new, self.sizes.steps, self.sizes.learning_rate, 0), world_size=RANKS
            )
            loss = json.loads((folder / "summary.json").read_text())["heldout_loss"]
            self.progress.done(f"trained {self.sizes.steps} steps: held-out loss {loss:.4f}")
        checkpoint = newest(folder)
        assert checkpoint is not None, "a run that ends well has written one"
        return checkpoint

    def _config(
        self, folder: Path, checkpoint: Path, steps: int, rate: float, seed: int, trainable: str = "all"
    ) -> RunConfig:
        s, text = self.sizes, self.out / "text"
        raw: dict[str, dict[str, Any]] = {
            "model": {"checkpoint": str(checkpoint)},
            "data": {
                "train": str(text / "train"),
                "heldout": str(text / "heldout"),
                "heldout_batches": s.heldout_batches,
                "sequence_length": s.sequence_length,
                "batch_size": s.batch_size,
                "tokenizer": str(text / "tokenizer"),
            },
            "train": {
                "steps": steps,
                "seed": seed,
                "learning_rate": rate,
                "warmup_steps": steps // 10,
                "trainable": trainable,
            },
            "output": {"folder": str(folder)},
        }
        if not read_model_config(checkpoint / "model.json").is_dense:
            # As many as 64 experts are to be chosen after few steps.
            raw |= {"balance": {"switch": 0.1}, "parallel": {"expert_parallel_size": RANKS}}
        return make_config(raw, f"the benchmark's run {folder.name}")

    def _search(self, made: Made) -> dict[str, Any]:
        given = made.base, made.corpus, made.weights()
        experts = on_ranks(compare_searches, *given, self.sizes.top_k, self.sizes.compared, world_size=1)
        layers = on_ranks(search_layers, *given, experts["choices"], self.sizes.compared, world_size=1)
        seconds, brute = (experts[name] for name in ("seconds", "seconds_of_brute_force"))
        self.progress.done(f"experts searched in {seconds:.1f} s, by brute force in {brute:.1f} s")
        return {"experts": experts, "layers": layers}

    def _models(self, made: Made) -> tuple[dict[str, Path], dict[str, tuple[Path, str]]]:
        """By name, which is of an arm and a number of layers: what is measured, and what is tuned and how."""
        s, most = self.sizes, max(self.sizes.condensed)
        models, tuned = {ORIGINAL: made.base}, {f"{ORIGINAL}, all": (made.base, "all")}
        arms = arms_of(SHARED, s.top_k, s.merged)
        for name, arm in arms.items():
            order = made.order(arms[f"E({SHARED}+{s.top_k})"] if arm.follows else arm, most)
            for layers in s.condensed:
                model = models[point(name, layers)] = made.model(arm, layers, order)
                if arm.is_condensed and arm.experts:
                    model = made.model(arm, layers, order, keep_scales=True)
                for tuning, trainable in TUNINGS.items():
                    if tuning == "all" or (arm.is_condensed and arm.ranking is None):
                        tuned[f"{point(name, layers)}, {tuning}"] = model, trainable
            self.progress.done(f"made {name} with {', '.join(map(str, s.condensed))} layers")
        return models, tuned

    def _measure(self, models: dict[str, Path]) -> dict[str, Any]:
        s = self.sizes
        asked = models, self.out / "text/heldout", (s.heldout_batches, s.batch_size), s.rounds
        found = on_ranks(measure, *asked, world_size=RANKS)
        self.progress.done(f"measured {len(models)} models")
        return found

    def _tune(self, tuned: dict[str, tuple[Path, str]]) -> None:
        s = self.sizes
        configs = [
            self._config(self._run(name), model, s.tune_steps, s.tune_learning_rate, 1, trainable)
            for name, (model, trainable) in tuned.items()
            if not is_done(self._run(name), s.tune_steps)
        ]
        if configs:
            on_ranks(tune, configs, world_size=RANKS)
            self.progress.done(f"tuned {len(configs)} models for {s.tune_steps} steps each")

    def _run(self, name: str) -> Path:
        return self.out / "runs" / name.replace(", ", "-").replace(" ", "-")

    def _figures(self, name: str, model: Path, measured: dict[str, Any]) -> dict[str, Any]:
        """What is known of one point of the curves."""
        found, tokens = measured[name], self.sizes.batch_size * self.sizes.sequence_length
        apart = speeds(found["ms_apart"], measured[ORIGINAL]["ms_apart"], tokens)
        tuned = {
            tuning: json.loads((self._run(f"{name}, {tuning}") / "summary.json").read_text())["heldout_loss"]
            for tuning in TUNINGS
            if self._run(f"{name}, {tuning}").exists()
        }
        return {
            **sizes(model),
            "heldout_loss": found["heldout_loss"],
            "heldout_loss_tuned": tuned,
            "bytes_per_token": found["bytes_per_token"],
            **speeds(found["ms"], measured[ORIGINAL]["ms"], tokens),
            **{f"{what}_without_exchange": value for what, value in apart.items()},
        }


def point(arm: str, layers: int) -> str:
    """The name of an arm with so many layers changed."""
    return f"{arm}, {layers}"


def model_config(sizes: CondenseSizes) -> ModelConfig:
    """A dense layer, about as wide as what a token meets in the others, and layers with experts."""
    s = sizes
    moe = MoEConfig(
        num_experts=s.num_experts,
        top_k=s.top_k,
        expert_hidden_size=s.expert_hidden_size,
        gate="linear",
        score="softmax",
        shared_hidden_size=SHARED * s.expert_hidden_size,
    )
    width = (SHARED + s.top_k) * s.expert_hidden_size
    return ModelConfig(
        vocab_size=s.vocab_size,
        hidden_size=s.hidden_size,
        num_layers=1 + s.num_layers,
        num_heads=s.num_heads,
        num_kv_heads=s.num_heads,
        head_dim=s.hidden_size // s.num_heads,
        intermediate_size=width,
        max_position_embeddings=s.sequence_length,
        moe=moe,
        dense_layers={0: width},
    )


def write_new(folder: Path, model: ModelConfig) -> None:
    """A checkpoint with random weights."""
    weights = {name: torch.empty(size) for name, size in expected_entries(model).items()}
    initialise({name: Shard(weight, weight, 0) for name, weight in weights.items()}, model, seed=0)
    write_model(folder, model, weights)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="all stages on a tiny scale, in a minute")
    parser.add_argument("--out", type=Path, help="[runs/condense, runs/condense-smoke]")
    parser.add_argument("--json", type=Path, help="[condense.json in the folder]")
    args = parser.parse_args()
    out = args.out or Path("runs/condense-smoke" if args.smoke else "runs/condense")
    benchmark = Condensing(out, SMOKE if args.smoke else CondenseSizes())
    try:
        results = benchmark.run()
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from None
    path = args.json or out / "condense.json"
    write_results(path, __doc__.splitlines()[0], asdict(benchmark.sizes), results)
    if path.parent.resolve() != out.resolve():
        shutil.copy(out / "condense.png", path.with_suffix(".png"))


if __name__ == "__main__":
    main()
