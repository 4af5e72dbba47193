"""Train the demo model that ships with localmistral, and write it as a GGUF file.

    python scripts/train_demo_model.py --out DIR --minutes 60     # train, then export
    python scripts/train_demo_model.py --out DIR --resume         # train DIR's checkpoint further
    python scripts/train_demo_model.py --out DIR --export         # only write GGUF and reference
    python scripts/eval_demo_model.py                             # measure the shipped file

A toy, but real, `mistral4` model: latent attention with YaRN, routed experts and a shared one, the
first 4096 ids of Tekken, the v15 chat layout with its reasoning effort. It holds no weights of
Mistral AI. What it learns is in `demo_model/conversations.py`, what it reached in
`demo_model/REPORT.md`. Needs torch, transformers, mistral-common, gguf and numpy; neither users
nor tests ever need it.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F  # noqa: N812
from demo_model.conversations import Maker
from demo_model.gguf_file import write_gguf
from demo_model.tokens import PAD, VOCAB_SIZE, Encoder, assistant_mask, letter_pieces, write_tekken
from transformers import Mistral4Config, Mistral4ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
SEED = 20261124
REFERENCES = (("addition", "high"), ("chat", "none"), ("weather", "high"), ("count", "none"))
REFERENCE_TOP = 5
LONGEST = 768  # tokens of a training conversation
POOL = 1024  # conversations that are sorted by length together, so that batches hold little padding
BALANCE_WEIGHT = 0.01  # of the loss that keeps the experts evenly used
EXACT_FROM = 0.85  # of training: bf16 products before (half the time), f32 from here on
CONTEXT, TRAINED_CONTEXT = 4096, 512  # YaRN stretches the context eight times
CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 160,
    "intermediate_size": 256,  # of dense layers: there are none
    "moe_intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "q_lora_rank": 96,
    "kv_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
    "rope_parameters": {
        "type": "yarn",
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": CONTEXT / TRAINED_CONTEXT,
        "original_max_position_embeddings": TRAINED_CONTEXT,
        "max_position_embeddings": CONTEXT,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}


def new_model() -> Any:
    """An untrained model."""
    torch.manual_seed(SEED)
    return Mistral4ForCausalLM(Mistral4Config(**CONFIG, experts_implementation="eager"))


def load_model(folder: Path) -> Any:
    """The checkpoint in `folder`."""
    path = folder / "checkpoint"
    return Mistral4ForCausalLM.from_pretrained(path, experts_implementation="eager").eval()


def save_model(model: Any, folder: Path) -> None:
    """Replace the checkpoint in `folder`, so that a reader never sees half of one."""
    new, old = folder / "checkpoint.new", folder / "checkpoint.old"
    model.save_pretrained(new)
    if (folder / "checkpoint").exists():
        (folder / "checkpoint").replace(old)
    new.replace(folder / "checkpoint")
    for path in old.glob("*"):
        path.unlink()
    if old.exists():
        old.rmdir()


class Batches:
    """Endless batches of conversations of about one length; `progress` sets the curriculum."""

    def __init__(self, tekken: Path, seed: int, batch_tokens: int, copying: float) -> None:
        self.maker = Maker(seed, letter_pieces(tekken))
        self.encoder = Encoder(tekken)
        self.rng = random.Random(seed)
        self.batch_tokens = batch_tokens
        self.progress, self.copying = 0.0, copying

    def draw(self) -> tuple[list[int], list[bool]]:
        """A conversation's tokens, and which of them are learnt."""
        # copying comes first: once the model can, names, numbers and arguments are easy
        copying = max(0.06, self.copying * (1 - self.progress / 0.15))
        c = self.maker.conversation(copying)
        bare = c.effort == "high" and self.rng.random() < 0.3
        if bare:  # as many clients do, leave out what was thought before: it is no example then
            turns = [n for n, (role, _) in enumerate(c.messages) if role == "assistant"]
            del c.messages[self.rng.choice(turns) + 1 :]
        tokens = self.encoder.encode(c, keep_thinking=not bare)
        return (tokens, assistant_mask(tokens, bare)) if len(tokens) <= LONGEST else self.draw()

    def groups(self) -> list[list[tuple[list[int], list[bool]]]]:
        """One pool of conversations, cut into batches of at most `batch_tokens` padded tokens."""
        groups: list[list[tuple[list[int], list[bool]]]] = [[]]
        for drawn in sorted((self.draw() for _ in range(POOL)), key=lambda drawn: len(drawn[0])):
            if groups[-1] and len(drawn[0]) * (len(groups[-1]) + 1) > self.batch_tokens:
                groups.append([])
            groups[-1].append(drawn)
        self.rng.shuffle(groups)
        return groups

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield token ids (rows, width) and which of the tokens after the first are learnt."""
        while True:
            for group in self.groups():
                width = max(len(tokens) for tokens, _ in group)
                ids = [tokens + [PAD] * (width - len(tokens)) for tokens, _ in group]
                learnt = [mask[1:] + [False] * (width - len(mask)) for _, mask in group]
                yield torch.tensor(ids), torch.tensor(learnt)


_attend = F.scaled_dot_product_attention


def attend_in_f32(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **rest: Any) -> torch.Tensor:
    """Attention outside of autocast: on a CPU it is slower in bf16 than in f32."""
    with torch.autocast("cpu", enabled=False):
        return _attend(q.float(), k.float(), v.float(), **rest)


class Muon:
    """Momentum with orthogonalised updates (https://kellerjordan.github.io/posts/muon/).

    On this model it needs far fewer steps than AdamW. Each process orthogonalises its share.
    """

    def __init__(self, matrices: list[torch.nn.Parameter]) -> None:
        self.matrices = matrices
        self.velocities = [torch.zeros_like(p) for p in matrices]
        self.momentum, self.decay = 0.95, 0.01

    def step(self, rate: float) -> None:
        with torch.no_grad():
            self._step(rate)

    def _step(self, rate: float) -> None:
        rank, workers = dist.get_rank(), dist.get_world_size()
        updates = [torch.zeros_like(p) for p in self.matrices]
        for n, (p, velocity) in enumerate(zip(self.matrices, self.velocities, strict=True)):
            assert p.grad is not None
            velocity.lerp_(p.grad, 1 - self.momentum)
            if n % workers == rank:
                updates[n] = orthogonalise(p.grad.lerp(velocity, self.momentum))
        share_sum(updates)
        for p, update in zip(self.matrices, updates, strict=True):
            scale = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
            p.mul_(1 - rate * self.decay).add_(update, alpha=-rate * scale)


def orthogonalise(x: torch.Tensor) -> torch.Tensor:
    """Drive all singular values of a matrix, or of each of a stack, towards 1 (Newton-Schulz)."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.bfloat16()
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    return (x.mT if tall else x).float().contiguous()


def share_sum(tensors: list[torch.Tensor]) -> None:
    """Replace tensors by their sums over all processes."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(part.view_as(t))


class Trainer:
    """One process of training; all of them hold the same weights and share their gradients."""

    def __init__(self, options: argparse.Namespace, rank: int) -> None:
        self.options, self.rank = options, rank
        seed = SEED + rank + 1000 * options.stage
        tokens = options.batch // options.workers
        self.batches = Batches(options.out / "tekken.json", seed, tokens, options.copying)
        self.model = load_model(options.out) if options.resume else new_model()
        self.model.train()
        self.fast = True
        F.scaled_dot_product_attention = attend_in_f32
        self.scores: list[torch.Tensor] = []
        for layer in self.model.model.layers:
            layer.mlp.gate.register_forward_hook(lambda _m, _i, out: self.scores.append(out[0]))
        named = dict(self.model.named_parameters())
        self.parameters = list(named.values())
        matrices = [
            n for n, p in named.items() if p.dim() > 1 and "embed" not in n and "mlp.gate." not in n
        ]
        others = [p for n, p in named.items() if n not in matrices]
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
        self.muon = Muon([named[n] for n in matrices])

    def loss(self, ids: torch.Tensor, learnt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy on the assistant's tokens; and how unevenly the experts are used."""
        self.scores.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.fast):
            hidden = self.model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            logits = self.model.lm_head(hidden[learnt])
        loss = F.cross_entropy(logits.float(), ids[:, 1:][learnt])
        balance = torch.zeros(())
        for scores in self.scores:
            share = scores.float().softmax(-1)
            used = F.one_hot(share.topk(2, dim=-1).indices, share.shape[-1]).float().sum(1).mean(0)
            balance = balance + share.shape[-1] / 2 * (used * share.mean(0)).sum()
        return loss, balance / len(self.scores)

    def step(self, batch: tuple[torch.Tensor, torch.Tensor], rate: float, clock: float) -> Any:
        """One update of the weights. Returns the mean loss and clock of all processes."""
        loss, balance = self.loss(*batch)
        (loss + BALANCE_WEIGHT * balance).backward()
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        seen = torch.tensor([loss.item(), clock])
        share_sum([*(p.grad for p in self.parameters if p.grad is not None), seen])
        workers = dist.get_world_size()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0 * workers)  # sums, not means
        for p in self.parameters:
            p.grad.div_(workers)
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        self.muon.step(rate * 5)
        self.model.zero_grad(set_to_none=True)
        return (seen / workers).tolist()

    def run(self) -> None:
        """Train until the steps or the minutes are used up; the rate falls to match."""
        options, start, progress = self.options, time.time(), 0.0
        losses: list[float] = []
        seen = 0
        for step, batch in enumerate(self.batches, start=1):
            decay = min(1.0, (1 - progress) / (1 - options.flat))
            rate = options.rate * min(1.0, step / 50) * max(0.01, decay)
            clock = (time.time() - start) / (60 * options.minutes)
            loss, clock = self.step(batch, rate, clock)
            losses.append(loss)
            seen += batch[0].numel() * options.workers
            progress = max(step / options.steps, clock)
            self.fast = progress < EXACT_FROM
            self.batches.progress = progress
            done = progress >= 1.0
            if self.rank == 0 and (step % 50 == 0 or done):
                mean, took = sum(losses) / len(losses), time.time() - start
                print(
                    f"step {step} loss {mean:.4f} rate {rate:.1e} progress {progress:.3f} "
                    f"{seen / took:.0f} tokens/s {took:.0f} s",
                    flush=True,
                )
                losses.clear()
            if self.rank == 0 and (step % 250 == 0 or done):
                save_model(self.model, options.out)
            if done:
                return


def train_worker(rank: int, options: argparse.Namespace, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=options.workers)
    Trainer(options, rank).run()
    dist.destroy_process_group()


def train(options: argparse.Namespace) -> None:
    """Train in one process per core and save the checkpoint in `options.out`."""
    write_tekken(options.out / "tekken.json")
    with tempfile.TemporaryDirectory() as meeting:
        store = (Path(meeting) / "store").as_uri()
        mp.spawn(train_worker, args=(options, store), nprocs=options.workers)


def export(folder: Path, gguf_path: Path, reference_path: Path) -> None:
    """Write the checkpoint as GGUF, and torch's logits of a few prompts for tests."""
    for path in (gguf_path, reference_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    model = load_model(folder)
    tekken = folder / "tekken.json"
    weights = {name: w.detach().float().numpy() for name, w in model.named_parameters()}
    write_gguf(weights, CONFIG, tekken, gguf_path)
    reference_path.write_text(json.dumps(reference_logits(model, tekken)) + "\n", encoding="utf-8")
    print(f"{gguf_path}: {gguf_path.stat().st_size} bytes")


def reference_logits(model: Any, tekken: Path) -> dict[str, Any]:
    """The most likely tokens after each token of held-out conversations, and their logits."""
    maker, encoder = Maker(SEED + 2, letter_pieces(tekken), heldout=True), Encoder(tekken)
    prompts = [encoder.encode(maker.example(kind, effort)) for kind, effort in REFERENCES]
    found = []
    for prompt in prompts:
        with torch.no_grad():
            top = model(torch.tensor([prompt])).logits[0].topk(REFERENCE_TOP)
        values = [[round(v, 3) for v in row] for row in top.values.tolist()]
        found.append({"tokens": prompt, "ids": top.indices.tolist(), "logits": values})
    return {"about": "torch, f32: most likely next tokens after each token", "prompts": found}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of checkpoint and tekken.json"
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=1_000_000, help="stop earlier than --minutes")
    parser.add_argument("--batch", type=int, default=3072, help="tokens of a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--flat", type=float, default=0.35, help="share of training at that rate")
    parser.add_argument("--copying", type=float, default=0.95, help="its share at the start")
    parser.add_argument("--workers", type=int, default=2, help="training processes")
    parser.add_argument(
        "--stage", type=int, default=0, help="other conversations for a resumed run"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--gguf", type=Path, default=ROOT / "localmistral" / "data" / "demo.gguf")
    parser.add_argument(
        "--reference", type=Path, default=ROOT / "tests" / "data" / "demo_logits.json"
    )
    parser.add_argument("--export", action="store_true", help="don't train, only write the files")
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.export:
        train(options)
    export(options.out, options.gguf, options.reference)


if __name__ == "__main__":
    main()
