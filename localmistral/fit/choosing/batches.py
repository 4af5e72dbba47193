"""A larger physical batch where that is what makes prompts fast: with weights in RAM.

llama.cpp copies weights from RAM to a card once per physical batch, so twice the batch reads a
prompt almost twice as fast, as long as the larger compute buffers leave the placement as it is.
"""

from localmistral.fit.choosing.options import Option, Options

LARGER_UBATCHES = (2048, 1024)
LEAST_PREFILL_GAIN = 1.25
MOST_DECODE_LOSS = 0.03
"""What a larger batch must gain for prompts, and may cost when writing."""


def suit_batch(options: Options, option: Option) -> Option:
    """A larger physical batch where weights are in RAM, prompts gain by it and writing doesn't
    suffer; what is fixed stays."""
    request = options.request
    if request.ubatch or request.batch or option.is_whole or not option.placement.gpu_layers:
        return option
    prefill = options.predict(option).prefill_tokens_per_second
    for size in LARGER_UBATCHES:
        load = option.load
        larger = options.at(
            option.candidate, option.context, load.kv_type, size, max(load.batch, size)
        )
        if larger is None or larger.seconds * (1 - MOST_DECODE_LOSS) > option.seconds:
            continue
        if options.predict(larger).prefill_tokens_per_second >= LEAST_PREFILL_GAIN * prefill:
            return larger
    return option
