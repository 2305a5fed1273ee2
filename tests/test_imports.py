"""House rules that code can check: the direction of imports, and which module may know which names."""

import ast
from pathlib import Path

import pytest

from util.settings.registry import DATASETS, DETECTORS, PRETEXTS, PROPOSALS, import_object

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"main", "finetune_main", "hubconf", "detr_main", "run_with_submitit"}
# Modules import only from lower layers.
LAYERS = {
    "predetr": 0,
    "util": 0,
    "models": 1,
    "datasets": 1,
    "engine": 2,
    **dict.fromkeys(("trainer", "memory", "evaluation", "predictor", "visualization"), 3),
    **dict.fromkeys(SCRIPTS, 4),
    "tools": 4,
    "predetr.runs": 5,
}
PACKAGES = ("predetr", "util", "models", "datasets", "tools")
FILES = sorted(
    [*ROOT.glob("*.py"), *(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))]
)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Return the full names of all modules that a file imports; `from a import b` gives `a` and `a.b`."""
    package = path.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def test_the_modules_are_found() -> None:
    names = {module_name(path) for path in FILES}
    assert {
        "main",
        "finetune_main",
        "engine",
        "models.detr",
        "models.pretext",
        "datasets.labelled.coco",
        "util.settings.table",
    } <= names


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    """Runs from Python -> scripts, tools -> trainer, evaluation, predictor -> engine -> models, datasets -> util.

    `models` and `datasets` never import each other.
    """
    name = module_name(path)
    top = name if name in LAYERS else name.split(".")[0]
    assert top in LAYERS, f"{path} belongs to no layer"
    ours = {name.split(".")[0] for name in imported(path)} & set(LAYERS)
    wrong = {other for other in ours - {top} if LAYERS[other] >= LAYERS[top]}
    if LAYERS[top] == LAYERS["trainer"]:
        wrong -= {name for name, layer in LAYERS.items() if layer == LAYERS["trainer"]}
    # A tool may start an entry script, and detr_main.py is one by another name; no entry script needs a tool.
    if top in ("tools", "detr_main"):
        wrong -= SCRIPTS
    assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_detectors_do_not_know_pretexts() -> None:
    for path in (ROOT / "models").glob("*.py"):
        if path.name != "__init__.py":
            assert not any(name.startswith("models.pretext") for name in imported(path)), path.name


def test_pretexts_know_only_the_interface_of_a_detector() -> None:
    """Every pretext works on every detector, because it depends on none of them."""
    builders = {entry.builder.split(":")[0] for entry in DETECTORS.values()}
    assert builders
    for path in (ROOT / "models" / "pretext").glob("*.py"):
        assert not builders & imported(path), path.name


def strings(path: Path) -> set[str]:
    """Return the string constants of a file, without docstrings."""
    tree = ast.parse(path.read_text())
    holders = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    docstrings = {
        id(node.body[0].value)
        for node in holders
        if node.body and isinstance(node.body[0], ast.Expr)
    }
    found = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    return {node.value for node in found if id(node) not in docstrings}


def test_engine_never_looks_at_names() -> None:
    names = {*DETECTORS, *PRETEXTS, *DATASETS}
    words = strings(ROOT / "engine.py")
    assert not names & words
    assert not any(name in word for name in names - {"coco", "detr"} for word in words)
    attributes = {
        node.attr
        for node in ast.walk(ast.parse((ROOT / "engine.py").read_text()))
        if isinstance(node, ast.Attribute)
    }
    assert not attributes & {"detector", "pretext", "dataset_file", "proposals", "classification"}


def test_every_registry_entry_can_be_imported() -> None:
    paths = [
        *PROPOSALS.values(),
        *(entry.builder for entry in (*DETECTORS.values(), *DATASETS.values())),
    ]
    paths += [entry.images for entry in DATASETS.values() if entry.images]
    paths += [path for entry in PRETEXTS.values() for path in (entry.pretext, entry.dataset)]
    for path in paths:
        assert callable(import_object(path)), path


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_library_code_does_not_exit_or_print(path: Path) -> None:
    tree = ast.parse(path.read_text())
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert "print" not in calls
    is_script = path.parent.name == "tools" or "__main__" in strings(path)
    if not is_script and module_name(path) != "util.runs.session":
        assert not calls & {"exit", "quit", "sys.exit", "os._exit"}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_torch_load_has_weights_only(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "torch.load",
            "torch.hub.load_state_dict_from_url",
        ):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("weights_only") == "True", f"{path.relative_to(ROOT)}:{node.lineno}"
