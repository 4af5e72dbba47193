"""`localmistral hardware`."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from localmistral.cli.listing import print_json
from localmistral.cli.options import AsJson, CpuOnly, Debug, GpuSpecs, RamSpec
from localmistral.errors import EngineError, LocalMistralError

if TYPE_CHECKING:
    from localmistral.fit.hardware import Hardware
    from localmistral.fit.machine import Gpu, Machine


def hardware(
    gpu: GpuSpecs = None,
    ram: RamSpec = None,
    cpu_only: CpuOnly = False,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001  (read by `main`)
) -> None:
    """What this machine has for models, and what of it can be used.

    --json: is_real; system; gpus[] in the order of tensor_split {name, backend, device,
    total_bytes, free_bytes, budget_bytes, bandwidth, flops, link, is_integrated}; has_peer_access;
    ram {total_bytes, available_bytes, budget_bytes, bandwidth}; cpu {name, cores, logical_cpus,
    features[]}; devices[] and backends[] of llama.cpp; cards[] that were found; nvidia {driver,
    cuda}; limits; mismatches[] {sentence, command, is_mistake}; notes[]. Rates are per second,
    in bytes or operations; what was not looked at for a typed machine is empty or null.
    """
    from localmistral.fit.specs import make_machine, parse_gpus, parse_ram

    cards = parse_gpus(gpu or ())
    memory = None if ram is None else parse_ram(ram)
    is_typed_whole = memory is not None and bool(cards or cpu_only)
    found = None if is_typed_whole else probe(asks_cards=not (cards or cpu_only))
    machine = make_machine(found.machine if found else None, cards, memory, cpu_only)
    if as_json:
        print_json(describe(machine, found))
        return
    from localmistral.terminal.machine_table import print_machine

    print_machine(machine, found)


def probe(*, asks_cards: bool = True) -> "Hardware":
    """This machine, with llama.cpp's own list of devices unless no cards are asked for.

    EngineError where llama.cpp can't be loaded or an RPC server of the environment is away.
    """
    from localmistral.fit.hardware import probe_hardware

    if not asks_cards:
        return probe_hardware(())
    load_library()
    from localmistral.engine.devices import list_backends, list_devices

    return probe_hardware(list_devices(), list_backends())


def load_library() -> None:
    """Load llama.cpp; EngineError with what its library misses."""
    try:
        import localmistral.engine.library  # noqa: F401
    except LocalMistralError:
        raise
    except (ImportError, OSError, RuntimeError) as error:
        from localmistral.fit.probes.builds import rebuilding_command

        raise EngineError(f"llama.cpp can't be loaded: {error}.", rebuilding_command()) from error


def describe(machine: "Machine", found: "Hardware | None") -> dict[str, Any]:
    """The document of --json."""
    return {
        "is_real": machine.is_real,
        "system": found.system if found else None,
        "gpus": [_describe_gpu(gpu) for gpu in machine.gpus],
        "has_peer_access": machine.has_peer_access,
        "ram": {**asdict(machine.ram), "budget_bytes": machine.ram.budget_bytes},
        "cpu": {**asdict(machine.cpu), "logical_cpus": found.logical_cpus if found else None},
        "devices": [asdict(device) for device in found.devices] if found else [],
        "backends": list(found.backends) if found else [],
        "cards": [asdict(card) for card in found.cards] if found else [],
        "nvidia": {"driver": found.nvidia.driver, "cuda": found.nvidia.cuda} if found else None,
        "limits": asdict(found.limits) if found else None,
        "mismatches": [asdict(mismatch) for mismatch in found.mismatches] if found else [],
        "notes": list(machine.notes),
    }


def _describe_gpu(gpu: "Gpu") -> dict[str, Any]:
    described = {**asdict(gpu), "budget_bytes": gpu.budget_bytes}
    del described["assumption"]  # one of the notes
    return described
