"""The edges between packages: kernels <- learner, kernels <- maskpro_serve, nothing else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ALLOWED = {
    "kernels/maskpro_kernels": {"maskpro_kernels"},
    "learner/maskpro_learner": {"maskpro_learner", "maskpro_kernels"},
    "maskpro_serve": {"maskpro_serve", "maskpro_kernels"},
    "loadtests": set(),
}
OURS = {"maskpro_kernels", "maskpro_learner", "maskpro_serve"}


def imported_packages(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_stay_on_the_allowed_edges(repository, folder):
    files = list((repository / folder).rglob("*.py"))
    assert files
    for file in files:
        assert not (imported_packages(file) & OURS) - ALLOWED[folder], file


def test_vllm_is_imported_only_where_it_is_needed(repository):
    users = {
        str(file.relative_to(repository))
        for file in repository.glob("maskpro_serve/**/*.py")
        if "vllm" in imported_packages(file)
    }
    quantization = {f"maskpro_serve/quantization/{name}.py" for name in ("config", "head", "linear", "params")}
    assert users == {f"maskpro_serve/{name}.py" for name in ("executor", "plugin", "server", "worker")} | quantization


def test_folders_are_no_packages(repository):
    for folder in ("kernels", "learner", "loadtests", "tests"):
        assert not (repository / folder / "__init__.py").exists()
