import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dspy_router

PACKAGE = Path(dspy_router.__file__).parent
ROOT_OF_THE_CORE = [PACKAGE / f"{name}.py" for name in ("folded", "folded_lists", "heads", "list_heads", "scan")]
CORE = [*(PACKAGE / "learning").glob("*.py"), *(PACKAGE / "encoders").glob("*.py"), *ROOT_OF_THE_CORE]


@pytest.mark.parametrize(
    "statement", ["import dspy_router", f"from dspy_router import {', '.join(dspy_router.__all__)}"]
)
def test_import_loads_neither_torch_nor_sentence_transformers(statement: str) -> None:
    code = f"import dspy, sys; before = set(sys.modules); {statement}; print(sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    modules = ast.literal_eval(loaded)
    assert "dspy_router" in modules
    assert not {"numpy", "torch", "sentence_transformers", "transformers", "litellm"} & set(modules)


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_the_numeric_core_imports_no_dspy(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not [name for name in names if name.split(".")[0] == "dspy"]


def test_only_one_module_touches_the_experimental_decision_types() -> None:
    touching = {
        path.name
        for path in PACKAGE.rglob("*.py")
        if "dspy.adapters.types.decision" in path.read_text().split('"""', 2)[-1]
    }
    assert touching == {"decision_types.py"}


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Router'"):
        dspy_router.Router  # noqa: B018


def test_public_names_are_listed() -> None:
    assert set(dspy_router.__all__) <= set(dir(dspy_router))
