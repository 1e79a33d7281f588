"""The base of recipes: a folder of results, and the file that lists them."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from nsys_recipe.lib.args import ArgumentParser, Option


class Recipe:
    """Deriving classes bring a mapper, a reducer, and `run`, which calls them."""

    def __init__(self, name: str, parsed_args: argparse.Namespace) -> None:
        self._name, self._parsed_args = name, parsed_args
        self._analysis_dict: dict[str, Any] = {"RecipeName": name}
        self._output_files: list[dict[str, str]] = []

    def run(self, context: Any) -> None:
        """Make the folder of results."""
        self._folder = Path(self._parsed_args.output or f"{self._name}-1")
        if self._folder.exists() and self._parsed_args.force_overwrite:
            shutil.rmtree(self._folder)
        self._folder.mkdir()

    def add_output_file(self, filename: str, filetype: str | None = None) -> str:
        """The path of a result, which gets into the list."""
        self._output_files.append({"Name": filename})
        return str(self._folder / filename)

    def create_analysis_file(self) -> None:
        """Write the list of results."""
        (self._folder / f"{self._folder.name}.nsys-analysis").write_text(json.dumps(self._analysis_dict))

    @classmethod
    def get_argument_parser(cls) -> ArgumentParser:
        """The arguments that all recipes have."""
        parser = ArgumentParser(allow_abbrev=False)
        parser.add_recipe_argument(Option.OUTPUT)
        parser.add_recipe_argument(Option.FORCE_OVERWRITE)
        return parser
