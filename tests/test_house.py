"""The house as a reader finds it: layout, dependencies, and the limits that keep the package readable."""

import ast
import functools
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
FIXED = {"torch", "jupyterlab", "ipywidgets", "matplotlib", "torchvision", "einops", "transformers", "nbval"}
PACKAGE = sorted((ROOT / "ldm_edu").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|home|Users|farm)/[\w.-]+|[A-Z]:\\+Users|\.\./shared")


@functools.cache
def project_files() -> list[Path]:
    """What git tracks, or would once added; without git (a ZIP of the project), every file not hidden."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True,
    )  # fmt: skip
    if listed.returncode == 0 and listed.stdout:
        return [p for name in listed.stdout.split("\0") if name and (p := ROOT / name).is_file()]
    hidden = re.compile(r"^\.(?!ci$|gitignore$)|^__pycache__$|\.egg-info$")
    every = (p for p in ROOT.rglob("*") if p.is_file())
    return [p for p in every if not any(hidden.search(part) for part in p.relative_to(ROOT).parts)]


def names(lines: list[str]) -> set[str]:
    """The canonical package names of requirement lines."""
    return {canonicalize_name(Requirement(line).name) for line in lines}


def conda_requirements() -> list[str]:
    """The requirement lines that environment.yml comes down to: `-e .[extra]` is what it stands for."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    lines = []
    for line in pip:
        if line.startswith("-e "):
            editable = re.fullmatch(r"-e \.(?:\[([\w,]+)\])?", line)
            assert editable, f"environment.yml installs something other than this project: {line}"
            lines += PYPROJECT["project"]["dependencies"]
            for extra in filter(None, (editable[1] or "").split(",")):
                lines += EXTRAS[extra]
        elif not line.startswith("-c "):
            lines.append(line)
    return lines


def locked() -> dict[str, str]:
    """Name and version of every line of requirements.lock."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    pins = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", text, flags=re.MULTILINE)
    return {canonicalize_name(name): version for name, version in pins}


def test_layout():
    wanted = [
        "README.md", "LICENSE", "CITATION.cff", "environment.yml", "pyproject.toml", "requirements.lock",
        "Makefile", ".ci/run", "notebooks", "ldm_edu/__init__.py", "data/README.md", "tests",
    ]  # fmt: skip
    assert not [name for name in wanted if not (ROOT / name).exists()]
    allowed = {Path(name).parts[0] for name in wanted} | {".gitignore", "CHANGELOG.md", "CONTRIBUTING.md"}
    assert not {p.relative_to(ROOT).parts[0] for p in project_files()} - allowed


def test_readme_names_the_two_commands_and_ci_runs_one():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {"lab", "test"} <= set(re.findall(r"^make (\w+)", readme, flags=re.MULTILINE))
    assert re.search(r"^make test$", (ROOT / ".ci/run").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_the_fixed_packages_are_installed_by_pip_and_by_conda():
    by_pip = names(PYPROJECT["project"]["dependencies"] + EXTRAS["test"])
    assert not FIXED - by_pip, "missing in pyproject.toml"
    assert not FIXED - names(conda_requirements()), "missing in environment.yml"


def test_conda_installs_what_pyproject_says_at_the_locked_versions():
    assert set(conda_requirements()) == set(PYPROJECT["project"]["dependencies"] + EXTRAS["test"])
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    (python,) = [d for d in environment["dependencies"] if isinstance(d, str) and d.startswith("python=")]
    assert SpecifierSet(PYPROJECT["project"]["requires-python"]).contains(
        python.removeprefix("python=") + ".0"
    )
    assert "-c requirements.lock" in environment["dependencies"][-1]["pip"]


def test_the_lock_pins_every_dependency_and_names_no_address():
    pins = locked()
    for line in PYPROJECT["project"]["dependencies"] + [line for extra in EXTRAS.values() for line in extra]:
        wanted = Requirement(line)
        version = pins.get(canonicalize_name(wanted.name))
        assert version, f"requirements.lock does not pin {wanted.name}: make lock"
        assert wanted.specifier.contains(version), (
            f"requirements.lock has {wanted.name} {version}, not {wanted.specifier}"
        )
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert not re.search(r"://|^--| @ ", text, flags=re.MULTILINE)


def test_citation_names_the_paper_and_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PYPROJECT["project"]["version"]
    assert "arXiv:2112.10752" in [i["value"] for i in citation["preferred-citation"]["identifiers"]]


def test_no_file_names_a_path_of_one_machine():
    found = []
    for path in project_files():
        if path.suffix in {".png", ".jpg", ".jpeg", ".safetensors"}:
            continue
        match = MACHINE_PATH.search(path.read_text(encoding="utf-8", errors="replace"))
        if match:
            found.append(f"{path.relative_to(ROOT)}: {match[0]}")
    assert not found


def test_a_clone_stays_small():
    sizes = {p.relative_to(ROOT).as_posix(): p.stat().st_size / 2**20 for p in project_files()}
    assert not {name: size for name, size in sizes.items() if size > 15}
    assert sum(sizes.values()) < 55


def lines_of_code(path: Path) -> int:
    """Lines that run: without blank ones, comments and docstrings."""
    text = path.read_text(encoding="utf-8")
    owners = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
    docstrings = [n.body[0] for n in owners if ast.get_docstring(n)]
    silent = {number for d in docstrings for number in range(d.lineno, d.end_lineno + 1)}
    lines = enumerate(map(str.strip, text.splitlines()), start=1)
    return sum(bool(line) and line[0] != "#" and number not in silent for number, line in lines)


def test_files_are_short_and_the_package_can_be_read_in_an_afternoon():
    lines = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in PACKAGE + TESTS}
    assert not {str(p.relative_to(ROOT)): n for p, n in lines.items() if n > 300}
    # Nobody reads the checks of exercises, tables of other people's names or a bench to learn how the system works.
    aside = [p for p in PACKAGE if p.parent.name in {"exercises", "interop", "bench"}]
    assert sum(map(lines_of_code, set(PACKAGE) - set(aside))) < 5800
    assert sum(map(lines_of_code, PACKAGE)) < 7600
    assert not [p for p in PACKAGE if p.stem in {"utils", "util", "helpers", "misc", "common"}]


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_public_names_are_documented_and_typed(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            found.append(f"line {node.lineno}: {node.name} has no docstring")
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            untyped = [a.arg for a in arguments if a.annotation is None]
            if untyped or node.returns is None:
                found.append(
                    f"line {node.lineno}: {node.name} lacks type hints ({', '.join(untyped) or 'return'})"
                )
    if tree.body and not ast.get_docstring(tree):
        found.append("the file does not say what it holds (module docstring)")
    assert not found
