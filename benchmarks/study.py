"""Which way from a dense model to experts is best, and what do constraints on routing cost and save?

    python -m benchmarks.study [--smoke] [--seeds N] [--out runs/study]

A dense model is trained on the text of this Python's standard library and of what documentation is installed, and made
into experts in six ways. All go on for the same tokens, as does the dense model: for as many tokens, and for as many
FLOPs (of `mfu.flops_of_token`) as the split and the upcycled models take. A seed is an order of the batches, the same
for all arms, and the draw of a construction; the parent is one.

    random, clustering, gradient  its FFN split into 16 experts, top-4: a quarter of its FFN's FLOPs
    residual                      by gradient too: 2 experts for all tokens, top-2 of 14 others
    upcycled                      8 copies, top-2: twice its FFN's FLOPs
    upcycled halves               8 copies of halves, top-2: its FFN's FLOPs

Then every seed's trained `gradient` (chosen beforehand, not by its loss) is profiled, placed on 4 devices, and goes on
on 4 ranks: top-k by id and placed, C2R at several T, C2R on at most M devices, and M groups with consecutive ids.

FOLDER/text        token files, tokenizer      FOLDER/runs/ARM-SEED  a run of training, with ARM-SEED.start.json beside
FOLDER/models      what was made of the parent FOLDER/study.json, study.png  the figures and the curves, written last

What is in the folder is not done again, so that a study which was ended goes on with the run at which it was, and one
of few seeds with more.
"""

import argparse
import json
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.ranks import on_ranks
from benchmarks.study_report import Arms, against, best, draw, figures, is_done, over_seeds, rivals_of, sentence, show
from benchmarks.timing import write_results
from benchmarks.training import train_rank
from ep_engine.c2r.place import place
from ep_engine.c2r.profile import profile
from ep_engine.checkpoint import newest
from ep_engine.config import RunConfig, make_config
from ep_engine.data.corpus import encode_files, read_source, split_by_file, standard_library_files, train_tokenizer
from ep_engine.data.tokens import TokenFile
from ep_engine.errors import UserError
from ep_engine.inference.loaded_model import Rule
from ep_engine.inference.scores import Asked, evaluate_checkpoint
from ep_engine.mesh import World
from ep_engine.model_config import read_model_config
from ep_engine.output import whole_file
from ep_engine.quickstart import Progress, run_tool
from ep_engine.training.mfu import flops_of_token

RANKS = 2
BASE = "gradient"
DOCUMENTATION = (Path(sysconfig.get_path("data")) / "share/doc", Path("/usr/share/doc"))
Sections = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class StudySizes:
    """How large everything is; the defaults are meant for two hours on two cores."""

    vocab_size: int = 4096
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 512
    sequence_length: int = 128
    batch_size: int = 16
    heldout_batches: int = 8
    parent_steps: int = 1500
    steps: int = 250
    tune_steps: int = 120
    seeds: int = 3
    profile_tokens: int = 65_536
    cluster_tokens: int = 4096  # of every cluster, for importance
    num_experts: int = 16  # of splits, residual ones included
    top_k: int = 4
    copies: int = 8  # of upcycled models, top-2
    devices: int = 4  # of the second part, a rank each
    top_t: tuple[int, ...] = (4, 8, 12)
    max_devices: tuple[int, ...] = (1, 2)
    files: int | None = None  # of the corpus; None: all

    @property
    def tokens_of_step(self) -> int:
        """Of a batch."""
        return self.batch_size * self.sequence_length


SMOKE = StudySizes(
    heldout_batches=4,
    parent_steps=120,
    steps=20,
    tune_steps=10,
    seeds=2,
    profile_tokens=16_384,
    cluster_tokens=1024,
    top_t=(4, 8),
)


@dataclass
class Study:
    """A folder, what is done in it, and how many runs there are to do."""

    out: Path
    sizes: StudySizes
    trained: int = 0  # runs of this call
    progress: Progress = field(default_factory=Progress)

    def run(self) -> dict[str, Any]:
        """All stages that are not done; returns the results.

        Raises:
            UserError: the folder holds something else, or a study of other sizes.
        """
        self._claim()
        self._text()
        parent = self._train("parent", None, self.sizes.parent_steps, 0)
        self.progress.done(f"dense parent: held-out loss {parent['end']:.4f}")
        constructed = self._constructions()
        tuned = self._constraints()
        return self._report(parent, constructed, tuned)

    def _claim(self) -> None:
        same = {name: size for name, size in asdict(self.sizes).items() if name != "seeds"}  # there may be more later
        mark, sizes = self.out / "sizes.json", json.dumps(same, indent=1) + "\n"
        if mark.is_file():
            if mark.read_text() != sizes:
                raise UserError(f"{self.out} holds a study of other sizes; choose another --out, or delete it")
            return
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"{self.out} is there and holds no study; choose another --out")
        for name in ("runs", "models"):
            (self.out / name).mkdir(parents=True, exist_ok=True)
        with whole_file(mark) as beside:
            beside.write_text(sizes)

    def _text(self) -> None:
        """Token files, a tokenizer, and documents for `cluster`."""
        text, mark = self.out / "text", self.out / "text/text.json"
        if mark.is_file():
            return
        shutil.rmtree(text, ignore_errors=True)
        found = {"library": standard_library_files(), "documentation": documentation()}
        sides = split_by_file([path for files in found.values() for path in files], 0.1, 0, root=Path("/"))
        sources, heldout = (files[: self.sizes.files] for files in sides)
        texts = [source for path in sources if (source := read_source(path)) is not None]
        train_tokenizer(texts, self.sizes.vocab_size, text / "tokenizer")
        tokens = {
            name: encode_files(files, text / "tokenizer", text / name).num_tokens
            for name, files in (("train", sources), ("heldout", heldout))
        }
        long = [source for source in texts if len(source) > 2000]  # enough for a row of tokens
        (text / "documents.jsonl").write_text("".join(json.dumps({"text": source}) + "\n" for source in long))
        with whole_file(mark) as beside:
            beside.write_text(json.dumps({"files": {name: len(files) for name, files in found.items()}} | tokens))
        self.progress.done(f"text: {tokens['train']:,} tokens to train on, {tokens['heldout']:,} held out")

    def _constructions(self) -> Arms:
        """The models with experts, and the dense one for as many tokens and for as many FLOPs."""
        arms: Arms = {}
        dense = self._last("parent", 0)
        for seed in range(self.sizes.seeds):
            made = {name: self._made(name, dense, seed) for name in self._ways()}
            steps = self.sizes.steps
            arms.setdefault("dense, tokens", []).append(self._train("dense-tokens", dense, steps, seed))
            for model in ("split", "upcycled"):
                more = self._flops(made["random" if model == "split" else model]) / self._flops(dense)
                run = self._train(f"dense-flops-{model}", dense, max(round(steps * more), 1), seed)
                arms.setdefault(f"dense, FLOPs of {model}", []).append(run)
            for name, checkpoint in made.items():
                arms.setdefault(name, []).append(self._train(name, checkpoint, steps, seed))
        return arms

    def _ways(self) -> dict[str, Callable[[int], list[object]]]:
        """What `checkpoint_tools` is asked for, by seed."""
        s = self.sizes
        residual = max(s.num_experts // 8, 1)
        split = ["split", "--num-experts", s.num_experts, "--top-k", s.top_k, "--method"]
        by_gradient = ["--importance", self.out / "models/importance"]
        fewer = ["split", "--num-experts", s.num_experts - residual, "--top-k", s.top_k - residual]
        upcycle = ["upcycle", "--num-experts", s.copies, "--top-k", 2]
        return {
            "random": lambda seed: [*split, "random", "--seed", seed],
            "clustering": lambda seed: [*split, "clustering", "--seed", seed],
            "gradient": lambda seed: [*split, "gradient", *by_gradient, "--seed", seed],
            "residual": lambda seed: [
                *fewer, "--method", "gradient", *by_gradient, "--residual-experts", residual, "--seed", seed
            ],
            "upcycled": lambda seed: [*upcycle, "--seed", seed],
            "upcycled-halves": lambda seed: [*upcycle, "--granularity", 2, "--seed", seed],
        }  # fmt: skip

    def _made(self, name: str, dense: Path, seed: int) -> Path:
        """A model made from the dense one; importance is measured once, when it is first needed."""
        models = self.out / "models"
        clusters, importance, made = models / "clusters", models / "importance", models / f"{name}-{seed}"
        if not clusters.exists():
            asked = ("--clusters", self.sizes.num_experts, "--out", clusters)
            run_tool("cluster", self.out / "text/documents.jsonl", *asked)
        if not importance.exists():
            rows = ("--sequence-length", self.sizes.sequence_length, "--max-tokens", self.sizes.cluster_tokens)
            run_tool("importance", dense, importance, "--clusters", clusters, *rows)
            self.progress.done("measured what each cluster of the text needs")
        if not (made / "model.json").is_file():
            command, *options = self._ways()[name](seed)
            run_tool(str(command), dense, made, *options, "--overwrite")
        return made

    def _constraints(self) -> Arms:
        """Every seed's base goes on under rules of routing."""
        arms: Arms = {}
        for seed in range(self.sizes.seeds):
            base, folder = self._last(BASE, seed), self.out / "models" / f"placed-{seed}"
            self._place(base, folder)
            for name, (word, sections) in self._rules(folder).items():
                rule = Rule(word, folder / "profile.npz" if word.startswith("c2r") else None, folder / "placed.json")
                run = self._train(name, base, self.sizes.tune_steps, seed, rule, sections)
                arms.setdefault(name.replace("-", " "), []).append(run)
        return arms

    def _rules(self, folder: Path) -> dict[str, tuple[str, Sections]]:
        """Of every arm: the rule as `evaluate` names it, and the sections of its run file."""
        t, lists = max(self.sizes.top_t), {"profile": str(folder / "profile.npz")}
        placed = {"moe": {"placement": str(folder / "placed.json")}}
        groups, grouped = (
            {"rule": "group_limited", "num_groups": self.sizes.devices},
            {"rule": "c2r_grouped", "top_t": t, **lists},
        )
        arms: dict[str, tuple[str, Sections]] = {"topk": ("topk", {}), "placed": ("topk", placed)}
        for few in self.sizes.top_t:
            arms[f"c2r-T{few}"] = f"c2r:{few}", placed | {"routing": {"rule": "c2r", "top_t": few, **lists}}
        for m in self.sizes.max_devices:
            arms[f"grouped-M{m}"] = f"c2r_grouped:{t}:{m}", placed | {"routing": {**grouped, "max_devices": m}}
            arms[f"group_limited-M{m}"] = (
                f"group_limited:{self.sizes.devices}:{m}",
                {"routing": {**groups, "max_devices": m}},
            )
        return arms

    def _place(self, base: Path, folder: Path) -> None:
        if (folder / "placed.json").is_file():
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        text = TokenFile(self.out / "text/train", vocab_size=self.sizes.vocab_size)
        asked = {"max_tokens": self.sizes.profile_tokens, "sequence_length": self.sizes.sequence_length}
        found = profile(base, text, **asked, keep_ids=True)
        found.profile.save(folder / "profile.npz")
        placement, _ = place(found.profile, self.sizes.devices, objective="distinct-devices", ids_LTK=found.ids_LTK)
        placement.save(folder / "placed.json")

    def _train(
        self,
        name: str,
        checkpoint: Path | None,
        steps: int,
        seed: int,
        rule: Rule | None = None,
        sections: Sections | None = None,
    ) -> dict[str, Any]:
        """The figures of a run, which is made if it is not in the folder.

        Args:
            name: of the arm.
            checkpoint: to go on from; None: a new dense model.
            steps: of the optimiser.
            seed: of the arm.
            rule: of the second part, by which the start is evaluated.
            sections: of the second part.
        """
        folder, ranks = self.out / "runs" / f"{name}-{seed}", self.sizes.devices if rule else RANKS
        start = None if checkpoint is None else self._start(folder, checkpoint, rule or Rule())
        if not is_done(folder, steps):
            began = time.perf_counter()
            config = self._config(folder, checkpoint, steps, seed, sections or {}, ranks)
            on_ranks(train_rank, config, world_size=ranks, start_method="forkserver")
            self.trained += 1
            told = f"{steps} steps in {time.perf_counter() - began:.0f} s"
            self.progress.done(f"run {self._done()} of {self._runs()}: {folder.name}, {told}")
        return figures(folder, start, self._flops(self._last(name, seed)), self.sizes.tokens_of_step)

    def _config(
        self, folder: Path, checkpoint: Path | None, steps: int, seed: int, sections: Sections, ranks: int
    ) -> RunConfig:
        s, text = self.sizes, self.out / "text"
        names = ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size")
        dense = checkpoint is None or read_model_config(checkpoint / "model.json").moe is None
        often = max(steps // 4, 1)
        raw: Sections = {
            "model": {"checkpoint": str(checkpoint)} if checkpoint else {name: getattr(s, name) for name in names},
            "data": {
                "train": str(text / "train"),
                "heldout": str(text / "heldout"),
                "heldout_every": often,
                "heldout_batches": s.heldout_batches,
                "sequence_length": s.sequence_length,
                "batch_size": s.batch_size,
                "tokenizer": str(text / "tokenizer"),
            },
            "train": {
                "steps": steps,
                "seed": seed + 1 if checkpoint else 0,
                "learning_rate": 1e-3 if checkpoint else 2e-3,
                "warmup_steps": steps // 10,
                "log_every": often,
            },
            "parallel": {"expert_parallel_size": 1 if dense else ranks},
            "output": {"folder": str(folder)},
        }
        return make_config({**raw, **sections}, f"the study's run {folder.name}")

    def _start(self, folder: Path, checkpoint: Path, rule: Rule) -> float:
        """Held-out loss before the first step, on what a run is evaluated on, under its rule."""
        kept, s = folder.with_name(f"{folder.name}.start.json"), self.sizes
        if not kept.is_file():
            tokens = s.heldout_batches * s.tokens_of_step
            asked = Asked(dict, None, self.out / "text/heldout", s.sequence_length, tokens, s.batch_size)
            found = evaluate_checkpoint(checkpoint, asked, World(), rule, timeout_s=300.0)["heldout"]
            with whole_file(kept) as beside:
                beside.write_text(json.dumps(found) + "\n")
        return float(json.loads(kept.read_text())["loss"])

    def _flops(self, checkpoint: Path) -> float:
        return flops_of_token(read_model_config(checkpoint / "model.json"), self.sizes.sequence_length)

    def _last(self, name: str, seed: int) -> Path:
        checkpoint = newest(self.out / "runs" / f"{name}-{seed}")
        assert checkpoint is not None, "a run that ends well has written one"
        return checkpoint

    def _done(self) -> int:
        """Runs of this study's seeds; an earlier one may have had more."""
        seeds = (int(path.parent.name.rpartition("-")[2]) for path in (self.out / "runs").glob("*/summary.json"))
        return sum(seed < self.sizes.seeds for seed in seeds)

    def _runs(self) -> int:
        return 1 + self.sizes.seeds * (3 + len(self._ways()) + len(self._rules(self.out)))

    def _report(self, parent: dict[str, Any], constructed: Arms, tuned: Arms) -> dict[str, Any]:
        console = Console(stderr=True, width=150)
        ways, rivals = list(self._ways()), rivals_of(list(self._ways()))
        show("Constructions, beside the dense model at equal tokens and at equal FLOPs", constructed, rivals, console)
        beside = {name: [] if name == "placed" else ["placed"] for name in tuned}
        show(f"Rules, from {BASE}, beside plain top-k with the same placement", tuned, beside, console)
        split = [name for name in ways if not name.startswith("upcycled")]
        says = {
            f"{part} {key}s": best(constructed, names, key)
            for part, names in (("of all", ways), ("of equal activated size", split))
            for key in ("start", "end")
        }
        for what, found in says.items():
            console.print(sentence(what, found), soft_wrap=True)
        if (seeds := self.sizes.seeds) > 1:
            console.print(
                f"of pairs without a difference 1 in {2 ** (seeds - 1)} would look like one with {seeds} seeds"
            )
        draw(self.out / "study.png", {"constructions": constructed, "rules": tuned})
        arms = {"constructions": constructed, "rules": tuned}
        return {
            "text": json.loads((self.out / "text/text.json").read_text()),
            "parent": parent,
            "runs": arms,
            "means": {part: {name: over_seeds(runs) for name, runs in of.items()} for part, of in arms.items()},
            "best": says,
            "judged": {"constructions": against(constructed, rivals), "rules": against(tuned, beside)},
        }


def documentation() -> list[Path]:
    """Text files of the documentation that is installed, each once."""
    below = (path for folder in DOCUMENTATION for path in folder.rglob("*") if path.suffix in (".txt", ".rst", ".md"))
    return sorted({path.resolve() for path in below if path.is_file()})


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--smoke", action="store_true", help="all stages on a small scale, meant for less than 15 minutes"
    )
    parser.add_argument("--seeds", type=int, help="[3; 2 of --smoke]")
    parser.add_argument("--out", type=Path, help="[runs/study, runs/study-smoke]")
    args = parser.parse_args()
    if args.seeds is not None and args.seeds < 1:
        parser.error(f"--seeds ({args.seeds}) must be at least 1")
    sizes = SMOKE if args.smoke else StudySizes()
    sizes = replace(sizes, seeds=args.seeds or sizes.seeds)
    out = args.out or Path("runs/study-smoke" if args.smoke else "runs/study")
    study = Study(out, sizes)
    try:
        results = study.run()
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from None
    write_results(out / "study.json", __doc__.splitlines()[0], asdict(study.sizes), results)


if __name__ == "__main__":
    main()
