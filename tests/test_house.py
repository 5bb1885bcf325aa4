"""The rules no single module can hold: import order, a light import, documented names, tidy files."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "netdeconv"

# The first name after "netdeconv" -> its rank; "" is netdeconv/__init__ itself. An import never goes to a higher rank.
RANKS = {
    "errors": 0, "config": 0, "functional": 0, "reference": 0, "zoo": 0,
    "nn": 1,
    "surgery": 2, "inspect": 2,
    "": 3,
    "lab": 4,
    "cli": 5, "__main__": 5,
}  # fmt: skip
SELF_CONTAINED = {"reference", "zoo"}  # import nothing of ours
PUBLIC_TO_LAB = {"", "functional", "inspect", "zoo", "reference"}  # where the lab may take public names from
LAB_LIBRARIES = {
    "lightning", "pytorch_lightning", "lightning_fabric", "torchvision", "torchmetrics", "matplotlib", "sklearn",
    "scipy", "pandas", "jsonargparse", "jinja2", "tensorboard", "yaml", "onnx", "onnxruntime",
}  # fmt: skip
MAX_LINES = 400
MACHINE_PATH = re.compile(r"(?<![\w.~$}-])/(?:home|root|work|Users|tmp)/[\w.]")


class Import(NamedTuple):
    """``from base import name`` (or ``import base``, name None) at a line; base is one of our modules, absolute."""

    line: int
    base: str
    name: str | None


def our_modules(package: Path) -> dict[str, Path]:
    """Absolute module name -> file, for every module below the package folder."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def our_imports(module: str, path: Path) -> Iterator[Import]:
    """Every import of ours in a file: absolute, relative, inside functions, and by a constant ``import_module``."""
    top = module.split(".")[0]
    parents = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]

    def absolute(name: str, level: int) -> str:
        return ".".join([*parents[: len(parents) - level + 1], *filter(None, [name])]) if level else name

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        found: list[tuple[str, str | None]] = []
        if isinstance(node, ast.Import):
            found = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node.module or "", node.level)
            found = [(base, alias.name) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                plain = argument.value.lstrip(".")
                found = [(absolute(plain, len(argument.value) - len(plain)), None)]
        yield from (Import(node.lineno, base, name) for base, name in found if base.split(".")[0] == top)


def public_names(path: Path) -> set[str] | None:
    """The literal ``__all__`` of a file, None where it has none."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return None


def section(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def lab_may_take(imported: Import, modules: dict[str, Path]) -> bool:
    """Whether the lab may write this import of something outside the lab."""
    if imported.base.count(".") > 1 or section(imported.base) not in PUBLIC_TO_LAB:
        return False
    if imported.name is None or imported.name == "__version__":
        return True
    public = public_names(modules[imported.base]) if imported.base in modules else None
    if public is not None and imported.name in public:
        return True
    submodule = f"{imported.base}.{imported.name}"
    if submodule in modules:
        return submodule.count(".") == 1 and section(submodule) in PUBLIC_TO_LAB
    return public is None and not imported.name.startswith("_")


def import_violations(package: Path) -> list[str]:
    """One line for each import that breaks the order."""
    modules = our_modules(package)
    problems = []
    for module, path in modules.items():
        own = section(module)
        if own not in RANKS:
            problems.append(f"{module}: '{own}' has no rank; give it one in RANKS")
            continue
        for imported in our_imports(module, path):
            submodule = f"{imported.base}.{imported.name}"
            target = submodule if submodule in modules else imported.base
            theirs = section(target)
            where = f"{module}:{imported.line} imports {imported.base}" + f".{imported.name}" * bool(imported.name)
            if theirs == own and own:
                continue
            if own in SELF_CONTAINED:
                problems.append(f"{where}: {own} imports nothing of ours")
            elif theirs not in RANKS:
                problems.append(f"{where}: '{theirs}' has no rank; give it one in RANKS")
            elif RANKS[theirs] > RANKS[own]:
                problems.append(f"{where}: goes up, from rank {RANKS[own]} to {RANKS[theirs]}")
            elif own == "lab" and not lab_may_take(imported, modules):
                problems.append(f"{where}: the lab takes public names only")
    return problems


def print_calls(package: Path) -> list[str]:
    """Where the library prints; cli.py and lab/ are there to print."""
    return [
        f"{module}:{node.lineno}"
        for module, path in our_modules(package).items()
        if section(module) not in {"cli", "__main__", "lab"}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def long_files(package: Path) -> list[str]:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in package.rglob("*.py")}
    return [f"{path.relative_to(package.parent)}: {n} lines" for path, n in lengths.items() if n >= MAX_LINES]


def repository_files(root: Path) -> list[Path]:
    """Files that git tracks or would track; without git, those of the folders that hold sources."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=root, capture_output=True, check=True, text=True).stdout.split("\0")
        files = [root / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        folders = [root / "src", root / "tests", root / "docs"]
        found = [*root.glob("*"), *(path for folder in folders for path in folder.rglob("*"))]
        caches = re.compile(r"/(?:\.|__pycache__)")
        files = [path for path in found if not caches.search("/" + path.relative_to(root).as_posix())]
    return [path for path in files if path.is_file()]


def machine_paths(files: list[Path]) -> list[str]:
    """Lines of text files that name a folder of somebody's machine."""
    found = []
    for path in files:
        content = path.read_bytes()
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), start=1):
            found += [f"{path}:{number}: {line.strip()[:100]}"] if MACHINE_PATH.search(line) else []
    return found


def hold(problems: list[str]) -> None:
    assert not problems, "\n".join(problems)


def is_documented(value: object) -> bool:
    """A docstring of its own: not a constant's type's, not the signature that dataclasses and named tuples get."""
    if not (inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value)):
        return True
    doc = (value.__doc__ or "").strip()
    return bool(doc) and not doc.startswith(f"{value.__name__}(")


# ------------------------------------------------------------------------------------------------ the repository


def test_imports_only_go_down() -> None:
    assert len(our_modules(PACKAGE)) > 5  # the checker sees the package
    hold(import_violations(PACKAGE))


def test_import_loads_no_lab_library() -> None:
    script = "import sys, netdeconv; print(*sys.modules, sep='\\n')"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True).stdout.split()
    assert "netdeconv" in loaded and "torch" in loaded
    assert {name.split(".")[0] for name in loaded} & LAB_LIBRARIES == set()
    assert {"netdeconv.lab", "netdeconv.cli"} & set(loaded) == set()


def test_public_names_are_documented() -> None:
    packages = [
        importlib.import_module(module)
        for module, path in our_modules(PACKAGE).items()
        if path.name == "__init__.py" and section(module) != "lab" and public_names(path)
    ]
    assert "netdeconv" in {package.__name__ for package in packages}
    names = [(package, name) for package in packages for name in package.__all__]
    hold([f"{p.__name__}.{name} has no docstring" for p, name in names if not is_documented(getattr(p, name))])


def test_library_does_not_print() -> None:
    hold(print_calls(PACKAGE))


def test_source_files_hold_one_idea() -> None:
    hold(long_files(PACKAGE))


def test_no_file_names_a_folder_of_this_machine() -> None:
    files = repository_files(ROOT)
    assert Path(__file__).resolve() in files
    hold(machine_paths(files))


def test_version_is_the_same_everywhere() -> None:
    version = importlib.import_module("netdeconv").__version__
    cited = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited == [version]


# -------------------------------------------------------------------------------- the checkers catch what they claim

TIDY = {
    "__init__.py": "from netdeconv.nn import Layer\n__all__ = ['Layer']\n",
    "errors.py": "class ShapeError(ValueError): ...\n",
    "functional/__init__.py": "from .fold import fold\n__all__ = ['fold']\n",
    "functional/fold.py": "from ..errors import ShapeError\nimport torch\ndef fold(): ...\ndef helper(): ...\n",
    "nn/__init__.py": "from netdeconv.nn.layer import Layer\n__all__ = ['Layer']\n",
    "nn/layer.py": "from netdeconv import functional\nclass Layer: ...\n",
    "inspect/__init__.py": "import netdeconv.nn.layer\nfrom .. import errors\n",
    "zoo/__init__.py": "from netdeconv.zoo.vgg import VGG\n",
    "zoo/vgg.py": "class VGG: ...\n",
    "lab/__init__.py": "from netdeconv import Layer, functional, zoo\nfrom netdeconv.functional import fold\n",
    "lab/report.py": "from . import data\nfrom netdeconv.lab.data import load\n",
    "lab/data.py": "def load(): print('reading')\n",
    "cli.py": "def main():\n    from netdeconv.lab.report import data\n",
}

BREAKS = [
    ("functional/fold.py", "import netdeconv.nn", "goes up, from rank 0 to 1"),
    ("functional/fold.py", "def f():\n    from ..nn import Layer", "goes up, from rank 0 to 1"),
    ("functional/fold.py", "from .. import nn", "goes up, from rank 0 to 1"),
    ("functional/__init__.py", "from ..inspect import x", "goes up, from rank 0 to 2"),
    ("errors.py", "from . import lab", "goes up, from rank 0 to 4"),
    ("nn/layer.py", "from netdeconv import Layer", "goes up, from rank 1 to 3"),
    ("nn/layer.py", "import importlib\nimportlib.import_module('netdeconv.inspect')", "goes up, from rank 1 to 2"),
    ("nn/layer.py", "import importlib\nimportlib.import_module('..inspect', __package__)", "from rank 1 to 2"),
    ("__init__.py", "if TYPE_CHECKING:\n    from .lab import data", "goes up, from rank 3 to 4"),
    ("zoo/vgg.py", "from netdeconv.errors import ShapeError", "zoo imports nothing of ours"),
    ("reference.py", "from .functional import fold", "reference imports nothing of ours"),
    ("lab/report.py", "from netdeconv.nn.layer import Layer", "the lab takes public names only"),
    ("lab/report.py", "from netdeconv.functional.fold import helper", "the lab takes public names only"),
    ("lab/report.py", "from netdeconv.functional import helper", "the lab takes public names only"),
    ("lab/report.py", "from netdeconv import nn", "the lab takes public names only"),
    ("lab/report.py", "from ..cli import main", "goes up, from rank 4 to 5"),
    ("helpers.py", "x = 1", "'helpers' has no rank"),
]


@pytest.fixture
def tidy(tmp_path: Path) -> Path:
    package = tmp_path / "netdeconv"
    for name, source in TIDY.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(source, encoding="utf-8")
    return package


def test_tidy_tree_has_no_violation(tidy: Path) -> None:
    assert import_violations(tidy) == []
    assert print_calls(tidy) == []
    assert long_files(tidy) == []


@pytest.mark.parametrize(("name", "line", "message"), BREAKS)
def test_one_wrong_import_is_reported_once(tidy: Path, name: str, line: str, message: str) -> None:
    with (tidy / name).open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    problems = import_violations(tidy)
    assert len(problems) == 1
    assert message in problems[0]


def test_print_and_length_are_reported(tidy: Path) -> None:
    (tidy / "nn" / "layer.py").write_text('"""print(1)"""\ndef f():\n    print(1)\n', encoding="utf-8")
    assert print_calls(tidy) == ["netdeconv.nn.layer:3"]
    (tidy / "errors.py").write_text("x = 1\n" * MAX_LINES, encoding="utf-8")
    assert [problem.split(":")[0] for problem in long_files(tidy)] == [str(Path("netdeconv", "errors.py"))]


def test_machine_paths_are_reported(tmp_path: Path) -> None:
    slash, file = "/", tmp_path / "notes.md"
    bad = [f"see {slash}home{slash}ann/x", f'"{slash}work{slash}data"', f"file://{slash}Users{slash}ann"]
    good = [f"src{slash}work{slash}x", f"https://example.org{slash}home{slash}x", f"weight{slash}root{slash}mean"]
    good += [f"divide by x {slash}root{slash} y", f".{slash}tmp{slash}x", ".."]
    file.write_text("\n".join(bad + good), encoding="utf-8")
    assert [line.removeprefix(f"{file}:")[0] for line in machine_paths([file])] == ["1", "2", "3"]


def test_missing_docstrings_are_reported() -> None:
    class Bare: ...

    class Named(NamedTuple):
        x: int

    def described() -> None:
        """Say what it is."""

    assert [is_documented(value) for value in (Bare, Named, described, 3)] == [False, False, True, True]
