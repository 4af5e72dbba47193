"""Saved plans: replaying one on this machine, with its files where they are now. Plans nothing."""

from dataclasses import replace
from pathlib import Path

from localmistral.errors import LocalMistralError, ModelNotFoundError
from localmistral.fit.machine import Machine
from localmistral.fit.plan import DeviceMemory, Plan, PlannedFile
from localmistral.fit.plan_json import read_plan
from localmistral.models.catalog import load_catalog
from localmistral.models.filenames import parse_file_name
from localmistral.models.names import CatalogModel, HubRepository, quote_name
from localmistral.planning.candidates import find_copies, local_file


def load_plan(path: Path, machine: Machine) -> Plan:
    """A saved plan, made ready for this machine: its files are where they are on this disk now.

    Cards that it leaves out may be fewer or more here. LocalMistralError for a file that is no
    plan, a plan for more cards than there are, and model files that aren't there, or not in full.
    """
    saved = read_plan(path)
    cards, used = len(machine.gpus), len(saved.placement.tensor_split)
    if any(saved.placement.tensor_split[cards:]):
        raise LocalMistralError(
            f"The plan {path.name} is for {used} cards, and llama.cpp can use {cards} here.",
            f"Make one for this machine: localmistral plan {_name_model(saved)}",
        )
    return replace(_match_cards(saved, machine), files=_find_files(saved), is_local=True)


def _match_cards(saved: Plan, machine: Machine) -> Plan:
    """The same plan with an entry for each card that is here, empty for those it doesn't know."""
    cards, known = len(machine.gpus), len(saved.placement.tensor_split)
    idle = tuple(
        DeviceMemory(
            name=f"GPU {number} ({gpu.name})",
            budget_bytes=gpu.budget_bytes,
            weights_bytes=0,
            mmproj_bytes=0,
            kv_bytes=0,
            compute_bytes=0,
        )
        for number, gpu in enumerate(machine.gpus[known:], start=known)
    )
    split = (*saved.placement.tensor_split[:cards], *(0 for _ in idle))
    devices = (*saved.devices[:-1][:cards], *idle, saved.devices[-1])
    return replace(saved, placement=replace(saved.placement, tensor_split=split), devices=devices)


def _name_model(saved: Plan) -> str:
    """What -m takes to mean the plan's model; files placed by hand go by their path."""
    if saved.repository is not None:
        return f"{saved.model}:{saved.quant}"
    return saved.files[0].path if load_catalog().find(saved.model) else saved.model


def _find_files(saved: Plan) -> tuple[PlannedFile, ...]:
    """The plan's files on this disk, where they were or in the copy of that quant."""
    if all(_is_there(file) for file in saved.files):
        return saved.files
    model = load_catalog().find(saved.model)
    copies = find_copies(CatalogModel(model=model, quant=saved.quant)) if model else []
    if not model and saved.repository:
        copies = find_copies(HubRepository(id=saved.repository))
    copy = next((copy for copy in copies if copy.quant == saved.quant), None)
    if copy is not None:
        has_encoder = any(parse_file_name(Path(f.path).name).role == "mmproj" for f in saved.files)
        paths = [*copy.files, *([copy.mmproj] if copy.mmproj and has_encoder else [])]
        return tuple(local_file(path) for path in paths)
    missing = next(file for file in saved.files if not _is_there(file))
    raise ModelNotFoundError(
        f"The plan's file {quote_name(missing.path)} is not on this disk with its "
        f"{missing.bytes:,} bytes.",
        f"localmistral pull {_name_model(saved)}" if saved.repository else "localmistral list",
    )


def _is_there(file: PlannedFile) -> bool:
    try:
        return Path(file.path).stat().st_size == file.bytes
    except (OSError, ValueError):  # ValueError: a zero byte in the path
        return False
