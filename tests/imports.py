"""Who imports whom, read from the source without running it."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Rule(NamedTuple):
    """What the modules below a name may import: of the project, and of what is installed (None: anything)."""

    project: frozenset[str]
    installed: frozenset[str] | None = None
    never: frozenset[str] = frozenset()  # of what is installed


def rule(*project: str, installed=None, never=()) -> Rule:
    return Rule(frozenset(project), None if installed is None else frozenset(installed), frozenset(never))


def violations(root: Path, rules: dict[str, Rule], standard: frozenset[str]) -> list[str]:
    """One line per import that no rule allows, and per module that has no rule."""
    tops = {name.partition(".")[0] for name in rules}
    found = []
    for path in sorted(p for top in tops for p in (root / top).rglob("*.py")):
        module = _module(path.relative_to(root))
        owner = owner_of(module, rules)
        if owner is None:
            found.append(f"{module}: no rule")
            continue
        for imported in _imports(path, module, rules):
            top = imported.partition(".")[0]
            if top in tops:
                allowed = owner_of(imported, rules) in {owner, *rules[owner].project}
            else:
                installed = rules[owner].installed
                allowed = top in standard or (top not in rules[owner].never and (installed is None or top in installed))
            if not allowed:
                found.append(f"{module} imports {imported}")
    return found


def owner_of(module: str, rules: dict[str, Rule]) -> str | None:
    """The longest name with a rule that `module` is, or lies below. A package's own __init__ needs its own rule."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((name for name in names if name in rules), None)


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, module: str, rules: dict[str, Rule]) -> Iterator[str]:
    """Absolute names; `from package import module` counts as package.module."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, node.module] if node.module else base)
            yield from (f"{source}.{alias.name}" for alias in node.names)
