"""Who imports whom: the package's folders follow the paper's sections, and imports run one way.

Also: diffusers in bench alone, ipywidgets in widgets alone, nothing that unpickles, and nothing that is installed by
luck, because another package needs it.
"""

import ast
import functools
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "ldm_edu").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
installed = functools.cache(packages_distributions)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# A room imports only from itself and from rooms above it in this list.
ORDER = [
    "errors", "runtime", "parts", "checkpoint", "layers", "autoencoder", "diffusion", "unet", "conditioning",
    "datasets", "pipeline", "tasks", "training", "evaluation", "interop", "widgets", "exercises", "bench", "cli",
    "__main__",
]  # fmt: skip
# These know even less of the rest.
ONLY = {
    "diffusion": {"runtime"},
    "datasets": {"runtime"},
    "conditioning": {"runtime", "layers"},
    "autoencoder": {"runtime", "parts", "checkpoint", "layers"},
    "unet": {"runtime", "checkpoint", "layers"},
}
RESERVED = {"ipywidgets": "widgets", "diffusers": "bench"}
UNPICKLING = {"pickle", "dill", "cloudpickle", "shelve", "joblib"}


def room_of(path: Path) -> str:
    """The room a file is in: `layers` for ldm_edu/layers/attention.py, `runtime` for ldm_edu/runtime.py."""
    return path.relative_to(ROOT / "ldm_edu").parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """The full dotted names that a file imports anywhere, in functions too, relative ones resolved."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = (
                path.relative_to(ROOT).with_suffix("").parts
            )  # the file itself; one level up is its package
            base = [*here[: len(here) - node.level]] if node.level else []
            base += (node.module or "").split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in {"import_module", "find_spec"}:
            yield from (
                a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
            )


def rooms_imported(path: Path) -> set[str]:
    """The rooms of the package, other than its own, that a file imports from."""
    ours = [name.split(".") for name in imports(path) if name.split(".")[0] == "ldm_edu" and "." in name]
    return {parts[1] for parts in ours} - {"__version__", room_of(path)}


ids = {"ids": lambda p: p.relative_to(ROOT).as_posix()}


@pytest.mark.parametrize(
    "path", [p for p in PACKAGE if p.parent != ROOT / "ldm_edu" or p.stem != "__init__"], **ids
)
def test_imports_run_one_way(path: Path):
    room = room_of(path)
    assert room in ORDER, f"{room} is not a room of the design"
    above = set(ORDER[: ORDER.index(room)])
    assert rooms_imported(path) <= ONLY.get(room, above)


def test_importing_the_package_imports_no_room():
    assert not rooms_imported(ROOT / "ldm_edu/__init__.py")


@pytest.mark.parametrize("path", PACKAGE, **ids)
def test_reserved_and_unsafe_imports(path: Path):
    top = {name.split(".")[0] for name in imports(path)}
    assert not {name for name, room in RESERVED.items() if name in top and room_of(path) != room}
    assert not top & UNPICKLING
    assert not [name for name in imports(path) if name.endswith(".*")], "star import"


def undeclared(path: Path, lines: list[str]) -> set[str]:
    """What a file imports from elsewhere that none of these requirement lines installs."""
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    ours = {"ldm_edu"} | ({p.stem for p in TESTS} if path in TESTS else set())
    others = {name.split(".")[0] for name in imports(path)} - ours - set(sys.stdlib_module_names)
    return {n for n in others if not declared & {canonicalize_name(d) for d in installed().get(n, [n])}}


@pytest.mark.parametrize("path", PACKAGE + TESTS, **ids)
def test_what_is_imported_is_declared(path: Path):
    lines = list(PROJECT["dependencies"])
    if path in TESTS or room_of(path) == "bench":
        lines += PROJECT["optional-dependencies"]["test"]
    assert not undeclared(path, lines), "missing in pyproject.toml"


@pytest.mark.parametrize("path", PACKAGE, **ids)
def test_nothing_loaded_can_run_code(path: Path):
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or getattr(node.func, "attr", "") != "load":
            continue
        owner = getattr(getattr(node.func, "value", None), "id", "")
        said = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        if owner == "torch" and said.get("weights_only") is not True:
            found.append(f"line {node.lineno}: torch.load without weights_only=True")
        if owner in {"np", "numpy"} and said.get("allow_pickle", False) is not False:
            found.append(f"line {node.lineno}: numpy.load with allow_pickle")
    assert not found


def test_the_rules_see_what_they_are_about():
    """There are files, and imports are found in them: else every test above would pass on nothing."""
    assert len(PACKAGE) > 1
    here = set(imports(Path(__file__)))
    assert {"ast", "pathlib.Path", "collections.abc.Iterator"} <= here
    assert undeclared(Path(__file__), []) == {"packaging", "pytest"}
