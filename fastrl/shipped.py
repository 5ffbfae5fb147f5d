"""The recipes that come with fastrl, and their data: inside an installed package, at the root of a source tree."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
RECIPES = "recipes"


def recipes_folder() -> Path:
    """Where they are."""
    installed = PACKAGE / RECIPES
    return installed if installed.is_dir() else PACKAGE.parent / RECIPES


def located(path: str | Path) -> str | Path:
    """`path` as it is, or, if it begins with recipes/ and is not here, the file of that name that comes with fastrl."""
    parts = Path(path).parts
    if parts[:1] != (RECIPES,) or Path(path).exists():
        return path
    shipped = recipes_folder().joinpath(*parts[1:])
    return shipped if shipped.exists() else path


def recipe_file(recipe: str | Path) -> Path:
    """The file of a recipe, given by its path, or by its name: `grpo` is recipes/grpo.yaml."""
    path = Path(located(recipe))
    named = recipes_folder() / f"{recipe}.yaml"
    return named if not path.is_file() and Path(recipe).name == str(recipe) and named.is_file() else path
