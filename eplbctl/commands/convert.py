"""``eplbctl convert``: loads and placements from one stack's form into another's, and what gets lost on the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eplbctl.options import PATH, format_option, layers_option, loads_options
from eplbctl.output import require_writable, say, write_file
from moe_eplb.core.errors import UsageError

if TYPE_CHECKING:
    from moe_eplb.planning.formats.loads import Reading

__all__ = ["command"]

_LOADS = ("json", "npz", "sglang", "sglang_stat", "tensorrt_llm", "vllm")
_PLACEMENTS = ("json", "tensorrt_llm", "sglang", "vllm", "ascend", "omni")
_OUTPUT = click.option("-o", "--output", type=PATH, required=True, help="Where to write it.")
_FORCE = click.option("--force", is_flag=True, help="Overwrite the file if it exists.")


@click.group()
def command() -> None:
    """Convert loads or placements between TensorRT-LLM, SGLang, vLLM, vllm-ascend, omni-infer and this project."""


@command.command("loads")
@click.argument("source", type=PATH)
@loads_options
@click.option("--top-k", type=click.IntRange(1), help="Experts that a token goes to, if the file does not say it.")
@_OUTPUT
@click.option("--to", "target", type=click.Choice(_LOADS), default="json", show_default=True, help="Its form.")
@_FORCE
@format_option("text", "json")
def loads_command(
    source: Path, reading: Reading, top_k: int | None, output: Path, target: str, force: bool, form: str
) -> None:
    """Write recorded loads in another form.

    SOURCE is told by its content: a run folder, an .npz with counts or topk_ids, SGLang's logical_count JSON, a dump
    of its recorder or a folder of them, TensorRT-LLM's folder of expert statistics, a load file of vLLM, or our JSON.
    tensorrt_llm writes a folder.

    \b
    Examples:
      eplbctl convert loads expert_statistic -o loads.json
      eplbctl convert loads vllm_loads.safetensors --layers 3-60 -o logical_count.json --to sglang
    """
    from eplbctl.render import interchange
    from moe_eplb.planning.formats.loads import read_counts, write_counts

    _require_free(output, target == "tensorrt_llm", force)
    found = read_counts(source, reading)
    if top_k is not None:
        if found.origin.top_k not in (None, top_k):
            raise UsageError("E195", f"the file says {found.origin.top_k} experts a token, not {top_k}")
        found = replace(found, origin=replace(found.origin, top_k=top_k))
    files, report = write_counts(found, target)
    _write(output, files)
    if form == "text":
        say(interchange.converted_text(interchange.loads_told(found), report, output))
    else:
        say(interchange.converted_json(found, report, output))


@command.command("placement")
@click.argument("source", type=PATH)
@click.option("--ranks", type=click.IntRange(1, 4096), help="Expert-parallel ranks, if the file does not say them.")
@layers_option
@_OUTPUT
@click.option("--to", "target", type=click.Choice(_PLACEMENTS), default="json", show_default=True, help="Its form.")
@_FORCE
@format_option("text", "json")
def placement_command(
    source: Path, ranks: int | None, layers: tuple[int, ...] | None, output: Path, target: str, force: bool, form: str
) -> None:
    """Write a placement in another form.

    SOURCE is told by its content: TensorRT-LLM's load balancer file, SGLang's --init-expert-location, vLLM's and
    vllm-ascend's maps, omni-infer's pattern, or our JSON.

    \b
    Examples:
      eplbctl convert placement moe_load_balancer.yaml --ranks 32 -o placement.json
      eplbctl convert placement placement.json -o expert_map.json --to ascend
    """
    from eplbctl.render import interchange
    from moe_eplb.planning.formats.placements import read_placement, write_placement

    _require_free(output, False, force)
    found = read_placement(source, ranks=ranks)
    if layers is not None:
        found = found.numbered_as(layers)
    content, report = write_placement(found, target)
    _write(output, {"": content})
    if form == "text":
        say(interchange.converted_text(interchange.placement_told(found), report, output))
    else:
        say(interchange.converted_json(found, report, output))


def _require_free(output: Path, folder: bool, force: bool) -> None:
    """A folder is never overwritten: files of an older one beside new ones would be read as its ranks."""
    if not folder or not output.is_dir():
        require_writable(output, force=force and not folder)
    elif any(output.iterdir()):
        raise UsageError("E002", f"the folder {output} is not empty", hint="choose another name")


def _write(output: Path, files: dict[str, bytes]) -> None:
    if list(files) == [""]:
        write_file(output, files[""])
        return
    output.mkdir(exist_ok=True)
    for name, content in files.items():
        write_file(output / name, content)
