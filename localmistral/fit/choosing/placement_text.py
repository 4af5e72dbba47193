"""Where the parts of a model go and why, in plain sentences. Decides nothing."""

from collections.abc import Iterator

from localmistral.fit.choosing.options import Option, Options
from localmistral.fit.choosing.pricing import Mode, Pricer
from localmistral.fit.choosing.search import NO_CLASSES
from localmistral.units import format_bytes


def explain_placement(options: Options, option: Option) -> Iterator[str]:
    """Layers, experts in RAM, cards that are left out, the image encoder."""
    yield _explain_layers(options, option)
    yield from _explain_experts(option)
    yield from _explain_left_out(options, option)
    yield from _explain_encoder(options, option)


def card_name(options: Options, card: int) -> str:
    return f"GPU {card} ({options.machine.gpus[card].name})"


def _explain_layers(options: Options, option: Option) -> str:
    placement, count = option.placement, option.candidate.shape.layer_count
    if not placement.gpu_layers:
        why = "there is no card to use" if not options.machine.gpus else "no card helps"
        why = "as asked" if options.request.gpu_layers == 0 else f"since {why}"
        return f"All {count} layers are in RAM and computed by the CPU, {why}."
    used = placement.used_cards
    in_ram = count + 1 - placement.gpu_layers
    rest = f"; the first {in_ram} stay in RAM, for want of room" if in_ram else ""
    if len(used) == 1:
        whole = (
            f"All {count} layers are" if not in_ram else f"{count - in_ram} of {count} layers are"
        )
        return f"{whole} on {card_name(options, used[0])}, with the output{rest}."
    if placement.split_mode == "tensor":
        return (
            f"Every layer's matrices are divided over {len(used)} equal cards that read each "
            f"other's memory, so that they work at the same time{rest}."
        )
    counts = [placement.tensor_split[card] for card in used]
    counts[-1] -= 1
    shown = ", ".join(
        f"{layers} on {card_name(options, card)}" for layers, card in zip(counts, used, strict=True)
    )
    return f"Of {count} layers {shown}, with the output{rest}."


def _explain_experts(option: Option) -> Iterator[str]:
    layers = option.placement.cpu_expert_layers
    shape = option.candidate.shape
    if layers:
        size = sum(shape.expert_bytes[layer] for layer in layers)
        yield (
            f"The routed experts of {len(layers)} of {shape.layer_count} layers "
            f"({format_bytes(size)}) are in RAM; everything that each token needs whole is on the "
            f"card{'s' if len(option.placement.used_cards) > 1 else ''}."
        )


def _explain_left_out(options: Options, option: Option) -> Iterator[str]:
    used = option.placement.used_cards
    for card, gpu in enumerate(options.machine.gpus):
        if card in used:
            continue
        name = f"{card_name(options, card)} is left out"
        if options.request.tensor_split or options.request.gpu_layers == 0:
            yield f"{name} as asked."
        elif not _holds_a_layer(options, option, card):
            yield (
                f"{name}: its {format_bytes(gpu.budget_bytes)} would not hold a layer beside the "
                "compute buffers."
            )
        elif option.is_whole:
            yield f"{name}: the rest holds everything, and one more card would only cost a hop."
        else:
            yield f"{name}: what it would hold saves less time than the hop to it costs."


def _holds_a_layer(options: Options, option: Option, card: int) -> bool:
    space = options.space(option.candidate, option.context, option.load)
    pricer = Pricer(space=space, mode=Mode(is_whole=True, is_pipelined=False, classes=NO_CLASSES))
    smallest = min(b - a for a, b in zip(space.dense, space.dense[1:], strict=False))
    return pricer.room(card, "middle") >= smallest


def _explain_encoder(options: Options, option: Option) -> Iterator[str]:
    size = options.mmproj_bytes(option.candidate)
    used = option.placement.used_cards
    if size:
        place = card_name(options, used[0]) if used else "RAM"
        yield f"The image encoder takes {format_bytes(size)} on {place}; --no-vision saves that."
