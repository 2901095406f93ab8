"""No file imports itself through other files, not even through a folder's ``__init__``.

The contracts of import-linter (pyproject.toml) enforce the order of the rooms, and find cycles between sibling files.
They do not find a file that imports the package that imports it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from places import ROOT

Arrows = dict[str, set[str]]


def modules_in(folder: Path, package: str) -> dict[str, Path]:
    """Map the dotted name of each module of a package to its file."""
    named = {}
    for file in sorted((folder / package).rglob("*.py")):
        parts = file.relative_to(folder).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return named


def imported_by(name: str, file: Path) -> Iterator[tuple[str, str]]:
    """Yield (module, name in it or "") for each import in a file, in functions and under TYPE_CHECKING, too."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            yield from ((module, alias.name) for alias in node.names)


def arrows_in(folder: Path, package: str) -> Arrows:
    """Map each module of a package to the modules of the package that it imports."""
    modules = modules_in(folder, package)
    arrows: Arrows = {name: set() for name in modules}
    for name, file in modules.items():
        for module, part in imported_by(name, file):
            target = f"{module}.{part}" if f"{module}.{part}" in modules else module
            if target in modules and target != name:
                arrows[name].add(target)
    return arrows


def circle_in(arrows: Arrows) -> list[str]:
    """Return one cycle of imports, ending with its first module again; empty if there is none."""
    finished: set[str] = set()
    path: list[str] = []

    def circle_from(name: str) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in finished:
            return []
        path.append(name)
        for target in sorted(arrows[name]):
            if circle := circle_from(target):
                return circle
        path.pop()
        finished.add(name)
        return []

    for name in sorted(arrows):
        if circle := circle_from(name):
            return circle
    return []


def test_no_file_imports_itself_through_others() -> None:
    arrows = arrows_in(ROOT / "python", "scalpel")
    assert sum(map(len, arrows.values())) > 500  # confirms that the library was read
    circle = circle_in(arrows)
    assert not circle, f"these files import each other in a circle: {' → '.join(circle)}"


def test_a_circle_is_found_wherever_its_imports_stand(tmp_path: Path) -> None:
    files = {
        "__init__": "from .first import f",
        "first": "def f():\n    from .room import second",
        "room/__init__": "",
        "room/second": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .. import first",
        "room/third": "import pkg.first",
    }
    for name, text in files.items():
        file = tmp_path / "pkg" / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert circle_in(arrows_in(tmp_path, "pkg")) == ["pkg.first", "pkg.room.second", "pkg.first"]
    (tmp_path / "pkg/room/second.py").write_text("from .. import f")
    assert circle_in(arrows_in(tmp_path, "pkg")) == ["pkg", "pkg.first", "pkg.room.second", "pkg"]
    (tmp_path / "pkg/room/second.py").write_text("from . import third")
    assert circle_in(arrows_in(tmp_path, "pkg")) == ["pkg.first", "pkg.room.second", "pkg.room.third", "pkg.first"]
    (tmp_path / "pkg/first.py").write_text("from . import room\nimport torch")
    assert circle_in(arrows_in(tmp_path, "pkg")) == []
