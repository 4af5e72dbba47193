"""A model's graph, as far as memory goes: which tensors a device makes, how large, in which order.

The order and the sizes are those of llama.cpp's graphs (src/llama-graph.cpp, src/models/llama.cpp,
mistral3.cpp, deepseek2.cpp for mistral4): grouped-query or latent attention, then a dense
feed-forward part or routed experts. Three layers of each kind stand for all of them, since the
buffer doesn't grow with the number. Knows no devices and no placement.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from localmistral.fit.graphs.arena import Tape
from localmistral.fit.graphs.dimensions import Dimensions
from localmistral.fit.graphs.part import LAYERS_OF_A_KIND, Entry, Experts, Part

_MIN_ROTATION = 64
"""Heads whose length this doesn't divide aren't turned; values are by a matrix of this side."""


@dataclass(slots=True, kw_only=True)
class GraphWriter:
    """Writes the graph of one device on a tape.

    `tokens` are those of one ubatch, `cells` those of one sequence's cache, of which the graph
    reads `sequences`, each for its share of the tokens; `weights_in_ram` are the bytes, by name
    (`ffn_up`), of tensors that the device computes with though they are in RAM, `cache_bytes` the
    cache of such a layer, keys and values; `f16_cell_elements` of a cell of the cache are copied
    to f16 while attention runs.
    """

    dimensions: Dimensions
    tape: Tape
    tokens: int
    cells: int
    sequences: int = 1
    flash_attention: bool = True
    is_kv_quantised: bool = False
    is_kv_f32: bool = False
    f16_cell_elements: int = 0
    weights_in_ram: Mapping[str, int] = field(default_factory=dict)
    cache_bytes: tuple[int, ...] = ()
    _inputs: dict[str, int] = field(default_factory=dict)
    _is_from_ram: bool = False

    def write(self, part: Part) -> None:
        """The layers of a part, and what follows the last one."""
        copied: list[Experts] = ["copied"] * part.from_ram
        ahead = self._kinds(part.from_ram, copied)
        kinds = [*ahead, *self._kinds(part.dense, part.experts)]
        if kinds:
            stream, normed = self._enter(part.entry)
            stream = self._write_layers(kinds, len(ahead), stream, normed, part.has_last_layer)
            normed = self._normalise(stream)
        else:
            stream = normed = self.tape.copy_in(self._floats(self.dimensions.hidden))
        if part.has_output:
            self.tape.make(self._floats(self.dimensions.vocabulary), self._normalise(normed))
        else:
            self.tape.use(normed, stream)
        if part.has_guests:
            self._write_guests()

    def _write_guests(self) -> None:
        """Experts of layers on other devices, with weights in RAM."""
        tape, dims = self.tape, self.dimensions
        for _ in range(LAYERS_OF_A_KIND):
            tape.cut()
            sizes = (dims.hidden, dims.experts, dims.experts_used)
            rows, chosen, weights = (tape.copy_in(self._floats(size)) for size in sizes)
            tape.use(self._sum_experts("copied", rows, chosen, weights))

    def write_host(self, *, card_count: int, has_layers: bool, has_experts: bool) -> None:
        """What the CPU does beside the cards: it looks up embeddings, and runs the layers, or the
        experts, that are nobody else's."""
        has_output = card_count == 0
        tape, hidden = self.tape, self._floats(self.dimensions.hidden)
        tokens = self._declare_inputs()
        stream = tape.make(hidden, tokens)
        if has_layers:
            here: list[Experts] = ["here"] * LAYERS_OF_A_KIND
            kinds = self._kinds(LAYERS_OF_A_KIND, here)
            stream = self._write_layers(kinds, 0, stream, -1, has_output)
        if has_output:
            normed = self._normalise(self._normalise(stream))
            tape.make(self._floats(self.dimensions.vocabulary), normed)
            return
        tape.use(stream)
        if card_count == 1:  # it has all inputs when it starts
            tape.use(*self._inputs.values())
        if has_experts and self.dimensions.experts:
            for _ in range(LAYERS_OF_A_KIND):
                tape.cut()
                chosen = self._floats(self.dimensions.experts)
                tape.use(self._run_experts(tape.copy_in(hidden), tape.copy_in(chosen)))
        if card_count > 1:
            tape.use(*self._inputs.values())

    def _declare_inputs(self) -> int:
        """The inputs of the whole graph, which the CPU holds from the start: tokens, and the
        rows that may come instead of their embeddings."""
        tokens = self.tape.copy_in(4 * self.tokens)
        self._shared("rows of an image", self._floats(self.dimensions.hidden))
        self._shared("positions", 4 * self.tokens)
        self._factors()
        self._shared("key rows", 8 * self.tokens)
        if not self.dimensions.is_latent:
            self._shared("value rows", 8 * self.tokens * self._rows_per_value())
        self._masks()
        for name in self._turn_sides():
            self._turn_matrix(name)
        self._shared("rows", 4 * self.tokens)
        return tokens

    def _write_layers(
        self,
        kinds: Sequence[Callable[[int], int]],
        ahead: int,
        stream: int,
        normed: int,
        has_last_layer: bool,
    ) -> int:
        """The residual stream after the layers, the first `ahead` of which are in RAM."""
        for number, feed_forward in enumerate(kinds):
            self._is_from_ram = number < ahead
            if number or normed < 0:
                normed = self._normalise(stream)
            attended = self._attend(self._normalise(normed))
            if stream < 0:
                stream = self.tape.copy_in(self._floats(self.dimensions.hidden))
            if has_last_layer and number == len(kinds) - 1:
                attended, stream = self._pick_rows(attended), self._pick_rows(stream)
            stream = self._add_up(feed_forward, attended, stream)
        return stream

    def _kinds(self, dense: int, experts: Sequence[Experts]) -> list[Callable[[int], int]]:
        """The feed-forward parts of layers, as many of each kind as the model has that kind."""
        kinds: list[Callable[[int], int]] = []
        if self.dimensions.dense:
            kinds += [self._feed_dense] * dense
        if self.dimensions.experts:
            kinds += [partial(self._feed_experts, place) for place in experts]
        return kinds

    def _enter(self, entry: Entry) -> tuple[int, int]:
        """The residual stream and its norm, -1 for what isn't there yet."""
        hidden = self._floats(self.dimensions.hidden)
        if entry == "norm":
            return -1, self.tape.copy_in(hidden)
        stream = self.tape.copy_in(hidden)
        if entry == "parts":
            for _ in range(2 if self.dimensions.shared else 1):
                stream = self.tape.change(hidden, stream, self.tape.copy_in(hidden))
        return stream, -1

    def _add_up(self, feed_forward: Callable[[int], int], attended: int, stream: int) -> int:
        hidden = self._floats(self.dimensions.hidden)
        stream = self.tape.change(hidden, attended, stream)
        normed = self._normalise(self._normalise(stream))
        return self.tape.change(hidden, feed_forward(normed), stream)

    def _floats(self, elements: int) -> int:
        return 4 * elements * self.tokens

    def _normalise(self, source: int) -> int:
        """One of the two steps of a norm: divided by its length, or scaled by its weights."""
        return self.tape.change(self._floats(self.dimensions.hidden), source)

    def _pick_rows(self, source: int) -> int:
        return self.tape.make(
            self._floats(self.dimensions.hidden), source, self._shared("rows", 4 * self.tokens)
        )

    def _shared(self, name: str, size: int) -> int:
        """An input of the whole graph, copied to the device once."""
        if name not in self._inputs:
            self._inputs[name] = self.tape.copy_in(size)
        return self._inputs[name]

    def _attend(self, normed: int) -> int:
        """Attention and its output's projection."""
        write = self._attend_latent if self.dimensions.is_latent else self._attend_grouped
        return self._multiply("attn_output", self._floats(self.dimensions.hidden), write(normed))

    def _attend_grouped(self, normed: int) -> int:
        tape, dims = self.tape, self.dimensions
        query, key, value = map(self._floats, (dims.query, dims.key, dims.value))
        if dims.has_qkv_fused:
            normed = self._multiply("attn_qkv", query + key + value, normed)
        queries = tape.change(
            query, self._rotate_positions("attn_q", query, normed), self._factors()
        )
        queries = self._turn("k", query, queries)
        made = tape.view(normed if dims.has_qkv_fused else self._multiply("attn_v", value, normed))
        values = self._turn("v", value, made)
        keys = self._turn("k", key, self._rotate_positions("attn_k", key, normed))
        self._store("key", keys)
        self._store("value", values, self._rows_per_value())
        attended = self._weigh(queries, self._floats(dims.attended))
        return self._turn("v", self._floats(dims.attended), tape.view(attended))

    def _rotate_positions(self, name: str, size: int, normed: int) -> int:
        """Queries or keys, projected (or a view of all three), normalised if so, and rotated."""
        tape = self.tape
        is_fused = self.dimensions.has_qkv_fused
        heads = tape.view(normed if is_fused else self._multiply(name, size, normed))
        if self.dimensions.has_qk_norm:
            heads = tape.change(size, tape.change(size, heads))
        return tape.change(size, heads, self._shared("positions", 4 * self.tokens))

    def _factors(self) -> int:
        """Factors of queries by position, as Mistral's long contexts have."""
        return self._shared("factors", 4 * self.tokens)

    def _turn(self, name: str, size: int, source: int) -> int:
        """Multiplied with a Hadamard matrix, which spreads outliers before they are quantised."""
        if not self._turn_sides():
            return source
        matrix = self._turn_matrix(name)
        return self.tape.view(self.tape.make(size, matrix, self.tape.view(source)))

    def _turn_matrix(self, name: str) -> int:
        return self._shared(f"turn {name}", 4 * self._turn_sides()[name] ** 2)

    def _turn_sides(self) -> dict[str, int]:
        """Of the matrices for keys and values; only a quantised cache has them."""
        side = self.dimensions.rotation
        if not self.is_kv_quantised or self.dimensions.is_latent or side < _MIN_ROTATION:
            return {}
        return {"k": side, "v": _MIN_ROTATION}

    @property
    def _all_cells(self) -> int:
        return self.cells * self.sequences

    def _weigh(self, queries: int, size: int) -> int:
        """Attention over the cache: flash attention keeps no scores, the other way all of them."""
        tape, dims = self.tape, self.dimensions
        seen = [tape.view(tape.view(queries)), *self._copy_cache()]
        if not self.flash_attention:
            scores = self._floats(dims.heads * self.cells)
            weights = tape.change(scores, tape.make(scores, *seen), *self._masks())
            if dims.is_latent:  # the values among the keys, transposed
                return tape.make(size, tape.make(2 * dims.kv_lora * self._all_cells), weights)
            return tape.make(size, weights)
        if self.is_kv_f32:
            latent = dims.kv_lora if dims.is_latent else dims.value
            seen += [tape.make(2 * elements * self._all_cells) for elements in (dims.key, latent)]
        size += 2 * self.f16_cell_elements * self._all_cells
        return tape.make(size, *seen, *self._masks())

    def _store(self, name: str, source: int, per_token: int = 1) -> None:
        """Written to the cache; `per_token` row numbers of 8 bytes say where, if it is here."""
        row = self.tape.view(source)
        if self._is_from_ram:
            self.tape.use(row)
        else:
            self.tape.use(row, self._shared(f"{name} rows", 8 * self.tokens * per_token))

    def _masks(self) -> list[int]:
        size = (2 if self.flash_attention else 4) * self.cells * self.tokens
        return [self._shared(f"mask {n}", size) for n in range(self.dimensions.masks)]

    def _rows_per_value(self) -> int:
        """Without flash attention values are stored transposed, element by element."""
        return 1 if self.flash_attention else self.dimensions.value

    def _copy_cache(self) -> list[int]:
        """The cache of a layer in RAM, which is brought up to date there first."""
        if not self._is_from_ram:
            return []
        self.tape.cut()
        return [self.tape.copy_in(size) for size in self.cache_bytes]

    def _multiply(self, name: str, size: int, *sources: int) -> int:
        """The product with a matrix of the layer's weights; from RAM it is copied just before."""
        copied = self.weights_in_ram.get(name, 0) if self._is_from_ram else 0
        if not copied:
            return self.tape.make(size, *sources)
        self.tape.cut()
        return self.tape.make(size, self.tape.copy_in(copied), *sources)

    def _attend_latent(self, normed: int) -> int:
        """One compressed row a token serves all heads; queries are brought into its space."""
        tape, dims = self.tape, self.dimensions
        row = dims.kv_lora + dims.rotated
        plain = self._floats(dims.plain_query)
        source = normed
        if dims.q_lora:
            lora = self._floats(dims.q_lora)
            source = tape.change(lora, tape.change(lora, self._multiply("attn_q_a", lora, normed)))
        name = "attn_q_b" if dims.q_lora else "attn_q"
        made = tape.view(self._multiply(name, plain, source))
        absorbed = self._multiply(
            "attn_k_b", self._floats(dims.heads * dims.kv_lora), tape.view(tape.view(made))
        )
        positions = self._shared("positions", 4 * self.tokens)
        turned = tape.change(self._floats(dims.heads * dims.rotated), tape.view(made), positions)
        queries = tape.make(self._floats(dims.query), tape.view(absorbed), turned)
        queries = tape.change(self._floats(dims.query), queries, self._factors())
        pair = self._multiply("attn_kv_a_mqa", self._floats(row), normed)
        latent = tape.change(self._floats(dims.kv_lora), tape.view(pair))
        latent = tape.view(tape.change(self._floats(dims.kv_lora), latent))
        turned = tape.change(self._floats(dims.rotated), tape.view(pair), positions)
        keys = tape.make(self._floats(row), latent, turned)
        self._store("key", keys)
        attended = self._weigh(queries, self._floats(dims.heads * dims.kv_lora))
        values = self._multiply("attn_v_b", self._floats(dims.head_value), tape.view(attended))
        return tape.view(tape.make(self._floats(dims.head_value), tape.view(values)))

    def _feed_dense(self, normed: int) -> int:
        return self._feed("", normed, self.dimensions.dense)

    def _feed(self, suffix: str, normed: int, width: int) -> int:
        size = self._floats(width)
        gate = self._multiply(f"ffn_gate{suffix}", size, normed)
        product = self.tape.make(size, gate, self._multiply(f"ffn_up{suffix}", size, normed))
        hidden = self._floats(self.dimensions.hidden)
        return self._multiply(f"ffn_down{suffix}", hidden, product)

    def _feed_experts(self, place: Experts, normed: int) -> int:
        tape, dims = self.tape, self.dimensions
        hidden = self._floats(dims.hidden)
        chosen, weights = self._choose_experts(normed)
        total = self._sum_experts(place, tape.view(normed), chosen, weights)
        if dims.shared:
            total = tape.change(hidden, total, self._feed("_shexp", normed, dims.shared))
        return total

    def _sum_experts(self, place: Experts, rows: int, chosen: int, weights: int) -> int:
        """The weighted sum of the chosen experts' results."""
        tape, used = self.tape, self.dimensions.experts_used
        hidden = self._floats(self.dimensions.hidden)
        if place == "elsewhere":
            tape.use(rows, chosen, weights)
            tape.cut()
            return tape.copy_in(hidden)
        if place == "host":
            tape.use(rows, chosen)
            tape.cut()
            results = tape.copy_in(hidden * used)
        else:
            was_from_ram, self._is_from_ram = self._is_from_ram, place == "copied"
            results = self._run_experts(rows, chosen)
            self._is_from_ram = was_from_ram
        results = tape.change(hidden * used, results, weights)
        views = [tape.view(results) for _ in range(used)]
        total = views[0] if used > 1 else tape.make(hidden, views[0])
        for view in views[1:]:
            total = tape.change(hidden, total, view)
        return total

    def _run_experts(self, rows: int, chosen: int) -> int:
        """Three products; the first two are one where their weights are fused."""
        tape, dims = self.tape, self.dimensions
        inner = self._floats(dims.expert_width * dims.experts_used)
        if dims.has_gate_up_fused:
            both = self._multiply("ffn_gate_up_exps", 2 * inner, rows, chosen)
            parts = (tape.view(both), tape.view(both))
        else:
            up = self._multiply("ffn_up_exps", inner, rows, chosen)
            parts = (up, self._multiply("ffn_gate_exps", inner, rows, chosen))
        outer = self._floats(dims.hidden) * dims.experts_used
        return self._multiply("ffn_down_exps", outer, tape.make(inner, *parts), chosen)

    def _choose_experts(self, normed: int) -> tuple[int, int]:
        """The numbers of the experts of each token, and the weights of their results."""
        tape, dims = self.tape, self.dimensions
        scores, used = self._floats(dims.experts), self._floats(dims.experts_used)
        probabilities = tape.change(scores, self._multiply("ffn_gate_inp", scores, normed))
        chosen = tape.view(tape.make(scores, probabilities))
        weights = tape.view(tape.make(used, tape.view(probabilities), chosen))
        total = tape.change(self._floats(1), tape.make(self._floats(1), weights))
        return chosen, tape.view(tape.change(used, weights, total))
