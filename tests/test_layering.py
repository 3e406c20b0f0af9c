"""The dependency rule: folders look one way, and a file of ep_engine only at files that stand before it in a list."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = (  # a folder, "" for ep_engine itself, and files of it; a folder may come more than once
    ("", "errors output direct_file run_folder job progress machine version deferred draft stages model_config"),
    ("data", "domain_tables"),
    ("", "config debug ops checksum placement ledger reference message stopwatch"),
    ("transports", "transport regions shared_control shared_memory cuda_ipc"),
    ("", "selection weight_grads noise capacity router plan dispatch"),  # the data path
    ("", "grouped_experts threaded_experts experts combine"),
    ("", "recompute norm feed_forward entropy balance_losses load_balance moe_layer kv_cache attention model"),
    ("data", "documents conversations encoder tokens batches blend corpus"),
    ("", "entries checkpoint"),
    ("data", "vocabulary tokenization"),
    ("", "whole_model initial"),
    ("c2r", "plain_pickle collaboration published constrain locality solver place placement_watch"),
    ("", "metrics mesh"),
    ("transports", "connect"),
    ("", "parallelize pipeline"),
    ("training", "schedule trained optimizer evaluate watch balancing agreement"),
    ("", "layout resolve"),
    ("training", "routing_metrics mfu guard stopping feed domain_losses heldout saver trainer"),
    ("planning", "routing_trace expert_traffic activations weight_groups memory dense_traffic"),
    ("planning", "cluster work plan_run simulate what_if"),
    ("inference", "loaded_model generate perplexity task_suites lm_eval_model scores"),
    ("c2r", "collaboration_report profile"),
    ("reports", "report run_numbers drawing run_report"),
    ("", "command_line command_options quickstart"),
    ("data", "data_commands"),
    ("inference", "model_commands"),
    ("", "cli"),
)
FOLDERS = {folder for folder, _ in LAYERS}
ORDER = [f"{folder}.{name}".lstrip(".") for folder, names in LAYERS for name in names.split()]

ENGINE = ROOT / "ep_engine"
ENGINE_FILES = sorted(path for path in ENGINE.rglob("*.py") if path.stem != "__init__")
TORCH_HEADER = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10|pybind11|Python\.h).*', re.MULTILINE)


def imported_modules(source: str) -> Iterator[str]:
    """Full names of everything imported; `from a import b` gives `a.b`, which may be a name in a instead of a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(path: Path) -> str:
    """As ORDER has it."""
    return ".".join(path.relative_to(ENGINE).with_suffix("").parts)


def engine_imports(source: str) -> Iterator[str]:
    """The files of ep_engine that `source` imports, in any of the three ways."""
    for name in imported_modules(source):
        package, *rest = name.split(".")
        if package == "ep_engine":
            yield ".".join(rest[: 2 if rest and rest[0] in FOLDERS else 1]) or "__init__"


def layering_faults(file: str, source: str) -> list[str]:
    if file not in ORDER:
        path = f"ep_engine/{file.replace('.', '/')}.py"
        return [f"{path} is not in the list LAYERS of tests/test_layering.py; put it where it belongs"]
    faults = []
    for name in engine_imports(source):
        if (file, name) in (("ops", "_C"), ("c2r.solver", "_solver")):  # the compiled libraries stand below everything
            continue
        if name not in ORDER:
            faults.append(f"{file} imports ep_engine.{name}, which is no file in LAYERS; import from the file itself")
        elif ORDER.index(name) >= ORDER.index(file):
            faults.append(f"{file} imports {name}, which does not stand before it in LAYERS")
    return faults


@pytest.mark.parametrize("path", ENGINE_FILES, ids=name_of)
def test_imports_point_backwards(path: Path) -> None:
    assert layering_faults(name_of(path), path.read_text()) == []


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
    assert layering_faults("plan", source) == ["plan imports moe_layer, which does not stand before it in LAYERS"]


@pytest.mark.parametrize("source", ["import ep_engine", "from ep_engine import MoELayer"])
def test_an_import_from_the_package_itself_is_refused(source: str) -> None:
    assert "which is no file in LAYERS" in layering_faults("plan", source)[0]


def test_a_file_that_is_not_in_the_list_is_named() -> None:
    assert layering_faults("helpers", "") == [
        "ep_engine/helpers.py is not in the list LAYERS of tests/test_layering.py; put it where it belongs"
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
