"""Writes a trained demo model as a GGUF file, with the keys that llama.cpp's `mistral4` wants.

Knows the names of the weights in transformers' Mistral4ForCausalLM and in llama.cpp; nothing of
training.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from demo_model import tokens as t
from demo_model.conversations import EFFORTS

DESCRIPTION = (
    "A toy of the mistral4 architecture, trained from scratch by localmistral's "
    "scripts/train_demo_model.py: sums, counting, tool calls. It holds no weights of Mistral AI."
)
_SAME = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


def write_gguf(weights: dict[str, Any], config: dict[str, Any], tekken: Path, path: Path) -> None:
    """Write `path` in q8_0 from float arrays by transformers' names; norms and routers stay f32."""
    writer = gguf.GGUFWriter(str(path), "mistral4")
    _add_description(writer, sum(array.size for array in weights.values()))
    for key, value in _hyperparameters(config).items():
        add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
        add.get(type(value), writer.add_string)(f"mistral4.{key}", value)
    _add_vocabulary(writer, tekken)
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    for name, array in _tensors(weights, config):
        array = np.ascontiguousarray(array, dtype=np.float32)
        if array.ndim == 1 or "ffn_gate_inp" in name:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, q8_0), raw_dtype=q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_description(writer: Any, weights: int) -> None:
    writer.add_name("localmistral demo")
    writer.add_description(DESCRIPTION)
    writer.add_author("localmistral")
    writer.add_license("apache-2.0")
    writer.add_size_label(f"{weights / 1e6:.1f}M")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    # Sampling leads so small a model astray; `run` takes this where nothing else is asked for.
    writer.add_float32("general.sampling.temp", 0.0)


def _hyperparameters(c: dict[str, Any]) -> dict[str, int | float | bool | str]:
    """The `mistral4.*` keys of a transformers configuration."""
    rope, latent, rotated = c["rope_parameters"], c["kv_lora_rank"], c["qk_rope_head_dim"]
    return {
        "block_count": c["num_hidden_layers"],
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "feed_forward_length": c["intermediate_size"],
        "vocab_size": c["vocab_size"],
        "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": 1,  # attention runs on the latent, which all heads share
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.q_lora_rank": c["q_lora_rank"],
        "attention.kv_lora_rank": latent,
        "attention.key_length": latent + rotated,
        "attention.value_length": latent,
        "attention.key_length_mla": c["qk_nope_head_dim"] + rotated,
        "attention.value_length_mla": c["v_head_dim"],
        "attention.temperature_scale": float(rope["llama_4_scaling_beta"]),
        # llama.cpp aborts without the length once the scale is set
        "attention.temperature_length": rope["original_max_position_embeddings"],
        "rope.dimension_count": rotated,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        "rope.scaling.yarn_beta_fast": float(rope["beta_fast"]),
        "rope.scaling.yarn_beta_slow": float(rope["beta_slow"]),
        "rope.scaling.yarn_log_multiplier": 0.1 * rope["mscale_all_dim"],
        "leading_dense_block_count": 0,
        "expert_count": c["n_routed_experts"],
        "expert_used_count": c["num_experts_per_tok"],
        "expert_shared_count": c["n_shared_experts"],
        "expert_feed_forward_length": c["moe_intermediate_size"],
        "expert_group_count": 1,
        "expert_group_used_count": 1,
        "expert_weights_scale": 1.0,
        "expert_weights_norm": True,
    }


def _tensors(weights: dict[str, Any], config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (GGUF name, array) of each tensor."""
    heads, nope, value = (
        config[key] for key in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim")
    )
    yield "token_embd.weight", weights["model.embed_tokens.weight"]  # tied: the output, too
    yield "output_norm.weight", weights["model.norm.weight"]
    for n in range(config["num_hidden_layers"]):
        old, new = f"model.layers.{n}.", f"blk.{n}."
        for theirs, ours in _SAME.items():
            yield f"{new}{ours}.weight", weights[f"{old}{theirs}.weight"]
        # the key and value halves of the latent's up-projection are apart, the key's transposed
        both = weights[f"{old}self_attn.kv_b_proj.weight"].reshape(heads, nope + value, -1)
        yield f"{new}attn_k_b.weight", both[:, :nope].transpose(0, 2, 1)
        yield f"{new}attn_v_b.weight", both[:, nope:]
        yield f"{new}ffn_gate_up_exps.weight", weights[f"{old}mlp.experts.gate_up_proj"]
        yield f"{new}ffn_down_exps.weight", weights[f"{old}mlp.experts.down_proj"]


def _add_vocabulary(writer: Any, tekken: Path) -> None:
    pieces = t.vocabulary_bytes(tekken)
    shown = _printable_bytes()
    specials = [t.special_name(i) for i in range(t.SPECIAL_SLOTS)]
    control, normal = int(gguf.TokenType.CONTROL), int(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("tekken")
    writer.add_token_list([*specials, *("".join(shown[b] for b in piece) for piece in pieces)])
    writer.add_token_types([control] * t.SPECIAL_SLOTS + [normal] * len(pieces))
    writer.add_token_merges(_merges(pieces, shown))
    writer.add_bos_token_id(t.BOS)
    writer.add_eos_token_id(t.EOS)
    writer.add_unk_token_id(t.UNK)
    writer.add_pad_token_id(t.PAD)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(_chat_template())


def _printable_bytes() -> list[str]:
    """GPT-2's printable stand-in character of each byte, as llama.cpp expects it in token texts."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in plain]
    table = {b: chr(b) for b in plain} | {b: chr(256 + n) for n, b in enumerate(hidden)}
    return [table[b] for b in range(256)]


def _merges(pieces: list[bytes], shown: list[str]) -> list[str]:
    """BPE merges: Tekken joins any two neighbours whose join is a token, so every split is one."""
    known = {piece: rank for rank, piece in enumerate(pieces)}
    merges: list[str] = []
    for piece in pieces[256:]:
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = sorted((known[a], known[b], a, b) for a, b in splits if a in known and b in known)
        if not pairs:
            raise ValueError(f"no merge makes token {piece!r}")
        merges += [" ".join("".join(shown[x] for x in half) for half in pair[2:]) for pair in pairs]
    return merges


def _chat_template() -> str:
    """mistral-common's own Jinja template for this tokenizer."""
    from mistral_common.integrations.chat_templates.chat_templates import generate_chat_template
    from mistral_common.tokens.tokenizers.base import TokenizerVersion

    return str(
        generate_chat_template(
            spm=False,
            tokenizer_version=TokenizerVersion.v15,
            image_support=False,
            audio_support=False,
            thinking_support=True,
            default_system_prompt=None,
            plain_thinking_support=False,
            use_special_token_variables=False,
            model_settings_fields=None,
            reasoning_effort_values=EFFORTS,
            reasoning_effort_default="none",
        )
    )
