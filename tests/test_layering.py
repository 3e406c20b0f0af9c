"""The dependency rule: folders look one way, and a file of ep_engine only at files that stand before it in a list."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ORDER = [
    "errors", "output", "run_folder", "job", "progress", "machine", "version", "deferred", "draft",  # foundations
    "stages", "model_config", "domain_tables", "config",
    "debug", "ops", "checksum", "placement", "ledger", "reference", "message", "stopwatch",
    "transport",
    "regions", "shared_control", "shared_memory", "cuda_ipc",  # what is below
    "selection", "weight_grads", "noise", "capacity", "router", "plan", "dispatch",  # the data path
    "grouped_experts", "threaded_experts", "experts", "combine",
    "recompute", "norm", "feed_forward", "entropy", "balance_losses", "load_balance",  # what it is part of
    "moe_layer", "kv_cache", "attention", "model",
    "documents", "conversations", "encoder",  # what it reads and writes
    "tokens", "batches", "blend", "corpus", "entries", "checkpoint", "vocabulary", "tokenization",
    "whole_model", "saver", "initial",
    "plain_pickle", "collaboration", "published", "constrain",
    "locality", "solver", "place", "placement_watch", "metrics",
    "mesh", "connect", "parallelize", "pipeline", "schedule", "trained", "optimizer", "evaluate",  # what shares it
    "watch", "balancing", "agreement",
    "layout", "resolve", "routing_metrics", "mfu", "guard", "stopping", "feed", "heldout", "trainer",  # what trains it
    "routing_trace", "expert_traffic", "activations", "weight_groups", "memory", "dense_traffic",  # what foretells it
    "cluster", "work", "plan_run", "simulate", "what_if",
    "loaded_model", "generate", "perplexity", "task_suites", "lm_eval_model", "scores",  # what asks it
    "collaboration_report", "profile", "report", "run_numbers", "drawing", "run_report",  # what a user calls
    "command_line", "quickstart", "model_commands", "cli",
]  # fmt: skip

ENGINE_FILES = sorted((ROOT / "ep_engine").glob("*.py"))
TORCH_HEADER = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10|pybind11|Python\.h).*', re.MULTILINE)


def imported_modules(source: str) -> Iterator[str]:
    """Full names of everything imported; `from a import b` gives `a.b`, which may be a name in a instead of a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def engine_imports(source: str) -> Iterator[str]:
    """The files of ep_engine that `source` imports, in any of the three ways."""
    for name in imported_modules(source):
        package, _, rest = f"{name}.".partition(".")
        if package == "ep_engine":
            yield rest.partition(".")[0] or "__init__"


def layering_faults(stem: str, source: str) -> list[str]:
    if stem not in ORDER:
        return [f"ep_engine/{stem}.py is not in the list ORDER of tests/test_layering.py; put it where it belongs"]
    faults = []
    for name in engine_imports(source):
        if (stem, name) in (("ops", "_C"), ("solver", "_solver")):  # the compiled libraries stand below everything
            continue
        if name not in ORDER:
            faults.append(f"{stem}.py imports ep_engine.{name}, which is no file in ORDER; import from the file itself")
        elif ORDER.index(name) >= ORDER.index(stem):
            faults.append(f"{stem}.py imports {name}, which does not stand before it in ORDER")
    return faults


@pytest.mark.parametrize("path", [p for p in ENGINE_FILES if p.stem != "__init__"], ids=lambda path: path.stem)
def test_imports_point_backwards(path: Path) -> None:
    assert layering_faults(path.stem, path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from ep_engine import moe_layer",
        "from ep_engine.moe_layer import moe_forward",
        "import ep_engine.moe_layer",
        "def f():\n    from ep_engine import moe_layer as m",
    ],
)
def test_an_import_that_points_forwards_is_named(source: str) -> None:
    assert layering_faults("plan", source) == ["plan.py imports moe_layer, which does not stand before it in ORDER"]


@pytest.mark.parametrize("source", ["import ep_engine", "from ep_engine import MoELayer"])
def test_an_import_from_the_package_itself_is_refused(source: str) -> None:
    assert "which is no file in ORDER" in layering_faults("plan", source)[0]


def test_a_file_that_is_not_in_the_list_is_named() -> None:
    assert layering_faults("helpers", "") == [
        "ep_engine/helpers.py is not in the list ORDER of tests/test_layering.py; put it where it belongs"
    ]


@pytest.mark.parametrize(
    ("folder", "above"),
    [
        ("ep_engine", {"checkpoint_tools", "benchmarks", "tests", "launch"}),
        ("checkpoint_tools", {"benchmarks", "tests", "launch"}),
    ],
)
def test_folders_never_import_what_stands_on_them(folder: str, above: set[str]) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name in imported_modules(path.read_text()):
            assert name.partition(".")[0] not in above, f"{path.relative_to(ROOT)} imports {name}"


def test_only_ops_names_the_compiled_ops() -> None:
    for folder in ("ep_engine", "checkpoint_tools", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text())
            named = any(ast.unparse(n) == "torch.ops.ep_engine" for n in ast.walk(tree) if isinstance(n, ast.Attribute))
            assert not named or path.name == "ops.py", f"{path.relative_to(ROOT)} names torch.ops.ep_engine"


def test_the_reference_imports_nothing_of_ours() -> None:
    for path in ENGINE_FILES:
        if path.stem == "reference":
            assert list(engine_imports(path.read_text())) == []


def test_contracts_and_kernels_include_no_torch_header() -> None:
    for pattern in ("*.h", "cpu/*", "cuda/*"):
        for path in sorted((ROOT / "csrc").glob(pattern)):
            found = TORCH_HEADER.search(path.read_text())
            assert found is None, f"{path.relative_to(ROOT)} has {found[0].strip()!r}: only csrc/bindings may see torch"
