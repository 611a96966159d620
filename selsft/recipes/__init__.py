"""The recipes that ship with selsft, by name."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError

RECIPES = Path(__file__).parent


def find_recipe(source: str, named: str) -> Path:
    """Path of a YAML file, or of the recipe of that name which ships with selsft.

    Raises:
        `InputError` that begins with `named` when there is neither.
    """
    path = Path(source)
    if path.is_file():
        return path
    shipped = {file.stem: file for file in RECIPES.glob("*.yaml")}
    recipe = shipped.get(source.removesuffix(".yaml"))
    if recipe is None:
        raise InputError(f"{named}: no such file (recipes that ship with selsft: {', '.join(sorted(shipped))})")
    return recipe
