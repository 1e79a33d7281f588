"""A recipe of Nsight Systems: the figures of ``eplbctl report`` for each report, as tables of the recipe's result.

``nsys recipe`` runs this in a Python of its own, in which pandas and numpy can be counted on and nothing else. So this
file only fetches the tables of a report and writes down results; everything between is `moe_eplb.analysis`, as it is.

Source of the shape: Nsight Systems Post-Collection Analysis Guide, "Tutorial: Create a User-Defined Recipe".
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
from nsys_recipe.data_service import DataService
from nsys_recipe.lib import recipe
from nsys_recipe.lib.args import Option
from nsys_recipe.log import logger

_OLDEST = (3, 11)
_HERE = Path(__file__).resolve().parent
_PACKAGES = _HERE.parents[2]
"""What holds this recipe's package holds the others."""


def _import_ours(name: str) -> None:
    """Make a package of ours known by its place. The folder does not go on the path: it may be the site-packages of
    another Python, and its numpy and pandas are not for this one."""
    if name in sys.modules:
        return
    folder = _PACKAGES / name
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None or not folder.is_dir():
        raise ImportError(f"eplb_overlap must stay where it is installed: there is no {name} in {_PACKAGES}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


if sys.version_info < _OLDEST:
    found, needed = (".".join(map(str, version[:2])) for version in (sys.version_info, _OLDEST))
    raise ImportError(f"eplb_overlap needs Python {needed}, and nsys runs its recipes with Python {found}")
_import_ours("moe_eplb")
_import_ours("eplbctl")

from eplbctl.render.capture_json import document  # noqa: E402
from moe_eplb.analysis.readers.nsys import TABLES, read_columns  # noqa: E402
from moe_eplb.analysis.role_table import role_table_of  # noqa: E402
from moe_eplb.analysis.roles import prepare  # noqa: E402
from moe_eplb.analysis.trace_report import make_trace_report  # noqa: E402
from moe_eplb.core.errors import EplbError  # noqa: E402

_RESULTS = ("files", "overlap", "roles", "unknown", "exposed", "idle")
"""What is written, a table each."""
_PARTS = ("ranks", "iterations", "layers", "streams")
_WITH_GAPS = ("rank", "iteration", "layer", "stream", "worst_exposed_ns", "overlap")
"""Columns of numbers that not every row has: an overlap of nothing is no number, and neither 0 nor 1."""
_LENGTHS = ("total_ns", "hidden_ns", "exposed_ns", "overlap")


class EplbOverlap(recipe.Recipe):  # type: ignore[misc]  # nsys's package has no types
    """Overlap of balancing and communication with the model's own work."""

    @staticmethod
    def _mapper_func(report_path: str, parsed_args: Any) -> dict[str, pd.DataFrame]:
        """The results of one report. One that cannot be judged says so in `files` and has no other rows."""
        try:
            tables = _read_tables(report_path, parsed_args)
            return _results(report_path, tables)
        except EplbError as error:
            logger.error(f"{report_path}: {error}")
            return {"files": pd.DataFrame([{"file": str(report_path), "error": str(error)}])}

    def mapper_func(self, context: Any) -> Any:
        """Every report of the input by itself."""
        reports = self._parsed_args.input
        return context.wait(context.map(self._mapper_func, reports, parsed_args=self._parsed_args))

    def reducer_func(self, mapper_res: Any) -> dict[str, pd.DataFrame]:
        """All reports' results one below the other, written as CSV, and as Parquet where pandas can."""
        each = sorted((results for results in mapper_res if results), key=lambda one: str(one["files"]["file"].iloc[0]))
        whole = {name: _joined([one[name] for one in each if name in one]) for name in _RESULTS}
        for name, frame in whole.items():
            frame.to_csv(self.add_output_file(f"{name}.csv"), index=False)
            if _parquet():
                frame.to_parquet(self.add_output_file(f"{name}.parquet"))
        return whole

    def save_analysis_file(self) -> None:
        """What lets the graphical interface open the result."""
        self._analysis_dict.update({"EndTime": str(datetime.now()), "Outputs": self._output_files})
        self.create_analysis_file()

    def run(self, context: Any) -> None:
        """Map, reduce, write; ends with 1 if a report could not be judged."""
        super().run(context)
        whole = self.reducer_func(self.mapper_func(context))
        self.save_analysis_file()
        files, overlap = whole["files"], whole["overlap"]
        if len(overlap):
            pairs = overlap[overlap["part"] == "whole"]
            print(pairs[["file", "pair", *_LENGTHS]].to_string(index=False, na_rep="-"))
        failed = files["error"].notna().sum() if "error" in files else 0
        if failed or not len(files):
            sys.exit(f"eplb_overlap: {failed} of {len(files)} reports could not be judged, see files.csv")

    @classmethod
    def get_argument_parser(cls) -> Any:
        """Which reports; where the result goes is the same for all recipes."""
        parser = super().get_argument_parser()
        parser.add_recipe_argument(Option.INPUT, required=True)
        return parser


def _read_tables(report_path: str, parsed_args: Any) -> dict[str, dict[str, Any]]:
    """The tables of a report that there are.

    They are asked for one by one, since a question for several has no answer if one of them is not there, and no report
    has them all. Numbers of threads must stay as they are, hence no refining.
    """
    service = DataService(report_path, parsed_args)
    found = {}
    for name in TABLES:
        service.queue_table(name)
        frames = service.read_queued_tables(refine=False)
        if frames is not None:
            found[name] = {str(column): _plain(frames[name][column]) for column in frames[name].columns}
    return found


def _plain(column: pd.Series) -> Any:
    """Numbers as they are, everything else as objects in which a gap is None."""
    if pd.api.types.is_numeric_dtype(column.dtype) and not pd.api.types.is_extension_array_dtype(column.dtype):
        return column.to_numpy()
    return column.to_numpy(dtype=object, na_value=None)


def _results(report_path: str, tables: dict[str, dict[str, Any]]) -> dict[str, pd.DataFrame]:
    rules = role_table_of(json.loads((_HERE / "role_table.json").read_text(encoding="utf-8")), "role_table.json")
    report = document(make_trace_report(prepare(read_columns(Path(report_path), tables), rules)), {})
    name = str(report_path)
    about = ("form", "gpus", "events", "span_ns", "incomplete")
    absent = " ".join(table for table in TABLES if table not in tables)
    file = {"file": name, **{key: report[key] for key in about}, "notes": "; ".join(report["notes"]), "absent": absent}
    idle = [{key: value for key, value in row.items() if key != "causes"} | row["causes"] for row in report["idle"]]
    rows = {"files": [file], "overlap": _overlap_rows(report["overlap"]), "idle": idle}
    rows |= {key: report[key] for key in ("roles", "unknown", "exposed")}
    return {key: _frame(name, part) for key, part in rows.items()}


def _overlap_rows(pairs: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each pair as a whole and each of its parts; a column that does not apply stays empty."""
    rows = []
    for name, parts in pairs.items():
        rows += [{"pair": name, "part": part, **parts[part]} for part in ("whole", "updates", "steady")]
        rows += [{"pair": name, "part": part, **row} for part in _PARTS for row in parts[part]]
    return rows


def _frame(file: str, rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows as a table in which numbers with gaps stay whole numbers and lists are text."""
    frame = pd.DataFrame([{key: _text(value) for key, value in row.items()} for row in rows])
    for column in frame.columns.intersection(_WITH_GAPS):
        frame[column] = frame[column].astype("Float64" if column == "overlap" else "Int64")
    return frame.assign(file=file)[["file", *frame.columns.drop("file", errors="ignore")]]


def _text(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, tuple)) else value


def _joined(frames: list[pd.DataFrame]) -> pd.DataFrame:
    filled = [frame for frame in frames if len(frame)]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame({"file": []})


def _parquet() -> bool:
    """Whether pandas finds what it writes Parquet with, which it does not bring itself."""
    for engine in ("pyarrow", "fastparquet"):
        with contextlib.suppress(ImportError):
            importlib.import_module(engine)
            return True
    return False
