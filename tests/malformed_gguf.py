"""Files that must be refused before llama.cpp sees them, each with a phrase of the sentence.

`CASES[name] = (bytes, phrase)`; `MALFORMED[name] = bytes` for tests that only need the files.
Most are one step away from a tiny model that llama.cpp loads; those marked "aborts" end its process
if they get there.
"""

import struct
from dataclasses import replace
from typing import Any

from gguf_writer import (
    TOKENS,
    Gguf,
    Raw,
    TensorSpec,
    Typed,
    encode_text,
    tiny_llama,
    tiny_llama_tensors,
    tiny_mistral4,
)

from localmistral.models.header import ValueType

_NO_TENSORS = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
_T = "tokenizer.ggml."
_SCORES = [0.0] * len(TOKENS)


def _changed(key: str, value: Any) -> bytes:
    return tiny_llama({key: value}).data()


def _mistral4(key: str, value: Any) -> bytes:
    return tiny_mistral4({f"mistral4.{key}": value}).data()


def _retensored(name: str, **changes: Any) -> bytes:
    tensors = [replace(t, **changes) if t.name == name else t for t in tiny_llama_tensors()]
    return tiny_llama(tensors=tensors).data()


def _with_tensor(**fields: Any) -> bytes:
    return tiny_llama(tensors=[*tiny_llama_tensors(), TensorSpec(**fields)]).data()


def _patched(version: int) -> bytes:
    return b"GGUF" + struct.pack("<I", version) + tiny_llama().data()[8:]


def _other_formats() -> dict[str, tuple[bytes, str]]:
    page = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
    safetensors = struct.pack("<Q", 40) + b'{"weight": {"dtype": "F16"}}'.ljust(60)
    return {
        "empty file": (b"", "empty (0 bytes)"),
        "html page": (page, "looks like an HTML page, probably a failed download"),
        "html after blank lines": (b"\n\n  <HTML lang=en>", "looks like an HTML page"),
        "xml error": (b'<?xml version="1.0"?><Error/>', "XML error page"),
        "json error": (b'{"error": "Repository not found"}', "looks like JSON"),
        "git lfs pointer": (pointer, "Git LFS pointer"),
        "safetensors": (safetensors, "safetensors"),
        "zip": (b"PK\x03\x04" + bytes(60), "zip archive"),
        "gzip": (b"\x1f\x8b\x08" + bytes(60), "gzip"),
        "pytorch pickle": (b"\x80\x02}q\x00." + bytes(60), "PyTorch"),
        "ggml of 2023": (b"tjgg" + bytes(60), "GGML format"),
        "zeros": (bytes(4096), "begins with zeros"),
        "random bytes": (bytes(range(7, 200)), "is no GGUF file"),
        "magic alone": (b"GGUF", "the version needs at least 8 bytes"),
        "wrong case of the magic": (b"gguf" + tiny_llama().data()[4:], "is no GGUF file"),
    }


def _counts_and_lengths() -> dict[str, tuple[bytes, str]]:
    whole = tiny_llama().data()
    huge = 1 << 63
    long_key = Raw(struct.pack("<I", 99))
    return {
        "version 0": (_patched(0), "version 0"),
        "version 1": (_patched(1), "version 1"),
        "version 4": (_patched(4), "version 4"),
        "big-endian": (_patched(0x03000000), "big-endian"),
        "cut in the counts": (whole[:15], "the number of tensors needs at least 16 bytes"),
        "cut in the metadata": (whole[:200], "needs at least"),
        "cut in the tensor infos": (tiny_llama().header()[:-900], "needs at least"),
        "cut in the weights": (whole[:-5000], "is cut short: its weights need"),
        "one weight byte short": (whole[:-1], "is cut short: its weights need"),
        "2^63 tensors": (tiny_llama(tensor_count=huge).data(), "tensors, more than"),
        "2^63 metadata entries": (tiny_llama(pair_count=huge).data(), "metadata entries, more"),
        "one tensor too many claimed": (
            tiny_llama(tensor_count=21, tensors=tiny_llama_tensors()).header()[:-20],
            "needs at least",
        ),
        "key of 2^62 bytes": (
            _NO_TENSORS + struct.pack("<Q", 1 << 62) + b"general.architecture",
            "over the limit of 65,535",
        ),
        "key past the end": (_NO_TENSORS + struct.pack("<Q", 5000) + b"general", "needs at least"),
        "empty key": (Gguf(metadata=[("", 1)]).data(), "nothing for metadata key 1 of 1"),
        "zero byte in a key": (Gguf(metadata=[("a\0b", 1)]).data(), "a zero byte in"),
        "key that is no UTF-8": (Gguf(metadata=[(b"\xff\xfe", 1)]).data(), "invalid UTF-8"),
        "key twice": (
            Gguf(metadata=[("general.name", "a"), ("general.name", "b")]).data(),
            "key 'general.name' twice",
        ),
        "unknown value type": (_changed("x", long_key), "unknown type 99"),
        "string past the end": (
            _changed("zz", Raw(struct.pack("<IQ", 8, 1 << 25))),
            "needs at least",
        ),
        "string of 2^40 bytes": (
            _changed("zz", Raw(struct.pack("<IQ", 8, 1 << 40))),
            "over the limit of 67,108,864",
        ),
        "text that is no UTF-8": (_changed("general.name", b"\xc3\x28"), "invalid UTF-8"),
        "bool of 2": (_changed("x", Raw(struct.pack("<IB", 7, 2))), "stores 2 for the yes-or-no"),
        "bool list with 7": (
            _changed("x", Raw(struct.pack("<IIQ3B", 9, 7, 3, 0, 1, 7))),
            "other than 0 and 1",
        ),
        "list of lists": (_changed("x", Raw(struct.pack("<IIQ", 9, 9, 1))), "nests an array"),
        "list of 2^60": (
            _changed("x", Raw(struct.pack("<IIQ", 9, 5, 1 << 60))),
            "over the limit of 4,194,304",
        ),
        "list past the end": (
            _changed("x", Raw(struct.pack("<IIQ", 9, 5, 1 << 20))),
            "needs at least",
        ),
        "string list past the end": (
            _changed("x", Raw(struct.pack("<IIQ", 9, 8, 1 << 20))),
            "needs at least",
        ),
        "string in a list past the end": (
            _changed("x", Raw(struct.pack("<IIQ", 9, 8, 2) + encode_text("a") + b"\xff" * 8)),
            "needs at least",
        ),
        "unknown list type": (_changed("x", Raw(struct.pack("<IIQ", 9, 13, 1))), "unknown type 13"),
    }


def _tensor_infos() -> dict[str, tuple[bytes, str]]:
    q = "blk.0.attn_q.weight"
    return {
        "alignment 0": (_changed("general.alignment", 0), "general.alignment 0"),
        "alignment 48": (_changed("general.alignment", 48), "not a power of two"),
        "alignment 8 (aborts)": (
            tiny_llama({"general.alignment": 8}, alignment=8).data(),
            "general.alignment 8",
        ),
        "alignment 2^31": (_changed("general.alignment", 1 << 31), "general.alignment"),
        "alignment as text": (_changed("general.alignment", "32"), "as string, not as uint32"),
        "tensor twice": (_with_tensor(name=q), "has tensor 'blk.0.attn_q.weight' twice"),
        "tensor without a name": (_with_tensor(name=""), "nothing for the name"),
        "tensor name of 64 bytes": (_with_tensor(name="x" * 64), "over the limit of 63"),
        "tensor name that is no UTF-8": (_with_tensor(name=b"\xe9"), "invalid UTF-8"),
        "five dimensions": (_with_tensor(name="x", dims=(1, 1, 1, 1, 32)), "5 dimensions"),
        "dimension of 0": (_with_tensor(name="x", dims=(0, 4)), "impossible dimensions"),
        "dimension below 0": (_huge_tensor((1 << 64) - 32), "impossible dimensions"),
        "product over 2^63": (_huge_tensor(1 << 32, 1 << 32), "impossible dimensions"),
        "weights of 2^60 bytes": (_huge_tensor(1 << 30, 1 << 28), "is cut short"),
        "removed type 4": (_retensored(q, type_number=4), "unknown or removed ggml type 4"),
        "type 43": (_retensored(q, type_number=43), "unknown or removed ggml type 43"),
        "type 2^32-1": (_retensored(q, type_number=(1 << 32) - 1), "ggml type 4294967295"),
        "row not whole blocks": (
            _retensored("blk.0.attn_k.weight", type="q4_K", dims=(64, 32)),
            "not a multiple of the 256",
        ),
        "offset unaligned": (_retensored(q, offset=3), "at offset 3"),
        "offsets overlap": (_retensored(q, offset=0), "at offset 0"),
        "gap between weights": (_retensored(q, offset=1 << 20), "at offset 1,048,576"),
        "offset of 2^64-32": (_retensored(q, offset=(1 << 64) - 32), "at offset"),
        "norm as f16 (aborts)": (_retensored("output_norm.weight", type="f16"), "needs f32"),
        "matrix as f64 (aborts)": (_retensored(q, type="f64"), "can't multiply"),
        "matrix as q8_1 (aborts)": (_retensored(q, type="q8_1"), "can't multiply"),
    }


def _huge_tensor(*dims: int) -> bytes:
    """A tensor info whose weights aren't there."""
    gguf = tiny_llama(tensors=[TensorSpec(name="token_embd.weight", dims=dims)])
    return gguf.header()


def _hyperparameters() -> dict[str, tuple[bytes, str]]:
    heads = "llama.attention.head_count"
    without = tiny_llama(without=["general.architecture"]).data()
    return {
        "no architecture": (without, "has no general.architecture"),
        "empty architecture": (_changed("general.architecture", ""), "no general.architecture"),
        "architecture as number": (_changed("general.architecture", 7), "as uint32, not as string"),
        "no layer count": (
            tiny_llama(without=["llama.block_count"]).data(),
            "has no llama.block_count",
        ),
        "no layers (aborts)": (_changed("llama.block_count", 0), "block_count 0"),
        "513 layers (aborts)": (_changed("llama.block_count", 513), "block_count 513"),
        "more layers than tensors": (_changed("llama.block_count", 40), "tensors of 2 layers"),
        "fewer layers than tensors": (_changed("llama.block_count", 1), "tensors of 2 layers"),
        "layer count as text": (_changed("llama.block_count", "2"), "as string, not as uint32"),
        "layer count as int64": (
            _changed("llama.block_count", Typed(ValueType.INT64, -2)),
            "as int64, not as uint32",
        ),
        "width 0": (_changed("llama.embedding_length", 0), "embedding_length 0"),
        "width unlike the embedding": (_changed("llama.embedding_length", 128), "embedding of 64"),
        "context 0": (_changed("llama.context_length", 0), "context_length 0"),
        "no heads": (_changed(heads, 0), "head_count 0"),
        "negative heads": (_changed(heads, [-4, 4]), "head_count -4 for layer 0"),
        "heads of 3 layers": (_changed(heads, [4, 4, 4]), "lists 3 values"),
        "no KV heads": (_changed(heads + "_kv", 0), "head_count_kv 0"),
        "3 KV heads for 4": (_changed(heads + "_kv", 3), "not a multiple of its 3"),
        "epsilon not a number (aborts)": (
            _changed("llama.attention.layer_norm_rms_epsilon", float("nan")),
            "not a finite number",
        ),
        "negative epsilon (aborts)": (
            _changed("llama.attention.layer_norm_rms_epsilon", -1.0),
            "layer_norm_rms_epsilon -1",
        ),
        "key length 0": (_changed("llama.attention.key_length", 0), "key_length 0"),
        "odd rope": (_changed("llama.rope.dimension_count", 15), "not an even number"),
        "half rope": (_changed("llama.rope.dimension_count", 8), "heads of 16"),
        "unknown rope scaling (aborts)": (
            _changed("llama.rope.scaling.type", "magic"),
            "none of none, linear, yarn, longrope",
        ),
        "1025 experts (aborts)": (_mistral4("expert_count", 1025), "expert_count 1,025"),
        "no experts for expert tensors (aborts)": (
            _mistral4("expert_count", 0),
            "uses 2 of 0 experts",
        ),
        "more experts used than there are (aborts)": (
            _mistral4("expert_used_count", 5),
            "uses 5 of 4 experts",
        ),
        "no expert used (aborts)": (_mistral4("expert_used_count", 0), "uses 0 of 4 experts"),
        "unknown gating function (aborts)": (_mistral4("expert_gating_func", 17), "gating_func 17"),
        "as many groups as experts (aborts)": (
            _mistral4("expert_group_count", 4),
            "expert_group_count 4",
        ),
        "groups of unlike size (aborts)": (
            _mistral4("expert_group_count", 3),
            "splits 4 experts into 3 groups",
        ),
        "temperature without length (aborts)": (
            tiny_mistral4(without=["mistral4.attention.temperature_length"]).data(),
            "no temperature_length",
        ),
        "latent row too short (aborts)": (
            _mistral4("attention.key_length", 32),
            "don't fit kv_lora_rank 32",
        ),
        "latent attention with 2 KV heads (aborts)": (
            _mistral4("attention.head_count_kv", 2),
            "other than 1 KV head",
        ),
        "latent attention without rotation (aborts)": (
            tiny_mistral4(without=["mistral4.rope.dimension_count"]).data(),
            "don't fit kv_lora_rank 32",
        ),
        "only prediction layers": (
            _changed("llama.nextn_predict_layers", 2),
            "nextn_predict_layers 2",
        ),
    }


def _vocabularies() -> dict[str, tuple[bytes, str]]:
    return {
        "no tokenizer": (tiny_llama(without=[_T + "model"]).data(), f"no {_T}model"),
        "no tokens": (tiny_llama(without=[_T + "tokens"]).data(), "no tokens"),
        "empty vocabulary": (
            _changed(_T + "tokens", Typed(ValueType.STRING, [])),
            "no tokens in its vocabulary",
        ),
        "tokens as numbers": (_changed(_T + "tokens", [1, 2]), "list of int32, not str"),
        "tokens as text": (_changed(_T + "tokens", "a b"), "as string, not as array"),
        "no merges": (tiny_llama(without=[_T + "merges"]).data(), f"no {_T}merges"),
        "merges as numbers": (_changed(_T + "merges", [1, 2]), "list of int32"),
        "fewer types than tokens": (_changed(_T + "token_type", [1, 1]), "but 2 of"),
        "types as floats": (
            _changed(_T + "token_type", [1.0] * len(TOKENS)),
            "list of float32, not int32",
        ),
        "unknown token type": (
            _changed(_T + "token_type", [1] * (len(TOKENS) - 1) + [77]),
            "the unknown type 77",
        ),
        "fewer scores than tokens": (_changed(_T + "scores", [0.0, 1.0]), "but 2 of"),
        "a token twice (aborts)": (
            _changed(_T + "tokens", [*TOKENS[:-1], "he"]),
            "has the token 'he' 2 times",
        ),
        "an empty token named as another (aborts)": (
            _changed(_T + "tokens", [*TOKENS[:-2], "", f"[EMPTY_{len(TOKENS) - 2}]"]),
            "2 times",
        ),
        "tokens unlike the embedding": (
            tiny_llama(
                {_T + "tokens": TOKENS[:-1], _T + "token_type": [1] * (len(TOKENS) - 1)}
            ).data(),
            f"but {len(TOKENS) - 1} tokens",
        ),
        "bos past the end": (_changed(_T + "bos_token_id", 5000), "bos_token_id 5,000"),
        "eos past the end": (_changed(_T + "eos_token_id", len(TOKENS)), "eos_token_id"),
        "eot as text": (_changed(_T + "eot_token_id", "</s>"), "as string, not as uint32"),
        "add_bos as number": (_changed(_T + "add_bos_token", 1), "as uint32, not as bool"),
        "template as number": (_changed("tokenizer.chat_template", 1), "as uint32, not as string"),
        "sentencepiece without bytes (aborts)": (
            _changed(_T + "model", "llama"),
            "of the 256 bytes",
        ),
        "bos added but not named": (
            tiny_llama(without=[_T + "bos_token_id"]).data(),
            "adds bos to every text",
        ),
        "bert without a separator (aborts)": (_changed(_T + "model", "bert"), "seperator"),
        "charsmap as text": (
            tiny_llama(
                {_T + "model": "t5", _T + "precompiled_charsmap": ["a"], _T + "scores": _SCORES}
            ).data(),
            "list of string, not int8 or uint8",
        ),
    }


CASES: dict[str, tuple[bytes, str]] = {
    **_other_formats(),
    **_counts_and_lengths(),
    **_tensor_infos(),
    **_hyperparameters(),
    **_vocabularies(),
}
MALFORMED: dict[str, bytes] = {name: data for name, (data, _) in CASES.items()}
