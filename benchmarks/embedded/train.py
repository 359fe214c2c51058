"""Train the embedded model, or a smaller one to compare ways of balancing.

    python -m benchmarks.embedded.train --out FOLDER --steps 2000            # the embedded model
    python -m benchmarks.embedded.train --out FOLDER --size ablation --balance none|bias|aux

Writes FOLDER/checkpoint.pt, FOLDER/tokenizer.json and a row of FOLDER/curve.jsonl every few steps: loss,
held-out loss and perplexity per domain, MaxVio. `benchmarks.embedded.export` turns it into a checkpoint.
The learning rate warms up, then falls linearly to zero at --steps, or at the end of --minutes when that
comes first.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.embedded import corpus as text
from benchmarks.embedded.balance import expert_counts, max_violation, sequence_loss, update_bias
from benchmarks.embedded.bigram import fit_pairs, pair_frequencies, start_from_pairs
from benchmarks.embedded.model import Model
from benchmarks.embedded.optimizer import MixedOptimizer
from convert.synthetic import V3_CONFIG

EMBEDDED: dict[str, Any] = V3_CONFIG | {
    "vocab_size": 3072,
    "hidden_size": 128,
    "intermediate_size": 384,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 7,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "n_group": 8,
    "topk_group": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    "num_nextn_predict_layers": 0,
}
"""Sizes are multiples of 128 wherever a group of an 8-bit resident needs it; 11 million parameters."""

ABLATION = EMBEDDED | {
    "hidden_size": 64,
    "intermediate_size": 192,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
"""Small enough to train several times."""

SIZES = {"embedded": EMBEDDED, "ablation": ABLATION}


@dataclass(frozen=True)
class Recipe:
    """Everything that a run depends on besides the corpus."""

    size: str = "embedded"
    balance: str = "bias"
    """bias: the loss-free update and the sequence loss; aux: a whole-batch auxiliary loss; none."""
    steps: int = 2000
    minutes: float = math.inf
    batch: int = 8
    tokens: int = 256
    lr: float = 4e-3
    """Of AdamW: experts, router, norms."""
    muon_lr: float = 4e-3
    """Of Muon: the other matrices."""
    embed_lr: float = 2e-3
    """Of AdamW: embedding and head, which begin as a bigram model."""
    warmup: int = 30
    weight_decay: float = 0.1
    bigram_steps: int = 80
    """Steps of fitting embedding and head to the pairs of tokens; 0: random ones."""
    bias_speed: float = 0.01
    """At the start; it falls with the learning rate. V3 uses 0.001 for millions of steps, but here routers collapse
    within a hundred: 0.003 was too slow to prevent it."""
    bias_frozen_from: float = 0.95
    """Part of the run after which the bias rests, as V3 does for its last tokens."""
    sequence_alpha: float = 1e-4
    aux_alpha: float = 1e-3
    seed: int = 0
    start: str = ""
    """Checkpoint to start from: its weights and biases, not the optimizer's state."""


class Batches:
    """Random windows of the training streams: one beginning-of-sequence token, then text of one domain."""

    def __init__(self, streams: dict[str, NDArray[np.int32]], recipe: Recipe) -> None:
        self.recipe = recipe
        self.streams = streams
        self.rng = np.random.default_rng(recipe.seed)
        shares = {domain.name: domain.share for domain in text.domains()}
        self.names = list(streams)
        self.shares = np.array([shares[name] for name in self.names])
        self.shares /= self.shares.sum()
        self.share_of = dict(zip(self.names, self.shares.tolist(), strict=True))

    def next(self) -> Tensor:
        """int64 [batch, tokens + 1]."""
        names = self.rng.choice(len(self.names), self.recipe.batch, p=self.shares)
        return torch.stack([self._window(self.streams[self.names[name]]) for name in names])

    def _window(self, stream: NDArray[np.int32]) -> Tensor:
        at = int(self.rng.integers(len(stream) - self.recipe.tokens))
        return with_bos(stream[at : at + self.recipe.tokens])


def with_bos(tokens: NDArray[np.int32]) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], tokens]).astype(np.int64))


def train(recipe: Recipe, out: Path) -> None:
    """Run `recipe`, keeping the last state and the curves in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    config = SIZES[recipe.size]
    tokenizer, streams, held = prepare(out, config["vocab_size"])
    torch.manual_seed(recipe.seed)
    model, batches = Model(config), Batches(streams, recipe)
    with (out / "curve.jsonl").open("w") as curve:
        if recipe.start:
            model.load_state_dict(torch.load(recipe.start, weights_only=True)["model"])
        elif recipe.bigram_steps:
            table = pair_frequencies(streams, batches.share_of, config["vocab_size"])
            fitted = fit_pairs(table, config["hidden_size"], recipe.bigram_steps)
            start_from_pairs(model, fitted)
            curve.write(json.dumps({"bigram_steps": recipe.bigram_steps, "loss": round(fitted.loss, 4)}) + "\n")
        optimizer = make_optimizer(model, recipe)
        start, progress, step, saved = time.monotonic(), 0.0, 0, time.monotonic()
        while progress < 1:
            optimizer.scale = min(1.0, (step + 1) / recipe.warmup) * (1 - progress)
            row = train_step(model, optimizer, batches.next(), recipe, progress)
            step += 1
            elapsed = time.monotonic() - start
            progress = max(step / recipe.steps, elapsed / (60 * recipe.minutes))
            if step % 10 == 0 or progress >= 1:
                row |= {"step": step, "seconds": round(elapsed, 1), "tokens": step * recipe.batch * recipe.tokens}
                if step % 200 == 0 or progress >= 1:
                    row |= evaluate(model, held, tokenizer, windows=24 if progress >= 1 else 6)
                curve.write(json.dumps(row) + "\n")
                curve.flush()
            if time.monotonic() - saved > 90 or progress >= 1:
                saved = time.monotonic()
                save(model, recipe, step, out)


def prepare(out: Path, vocab_size: int) -> tuple[Tokenizer, dict[str, NDArray[np.int32]], dict[str, Any]]:
    """Tokenizer and token streams, made once per folder and kept there."""
    path, kept = out / "tokenizer.json", out / "tokens.npz"
    if not kept.exists():
        corpus = text.read_corpus()
        tokenizer = text.train_tokenizer(corpus, vocab_size)
        text.write_tokenizer_files(out, tokenizer, SIZES["embedded"]["max_position_embeddings"])
        (out / "corpus.json").write_text(json.dumps(corpus.record, indent=2) + "\n")
        arrays = {f"train.{k}": v for k, v in text.encode(tokenizer, corpus.train).items()}
        arrays |= {f"held.{k}": v for k, v in text.encode(tokenizer, corpus.held_out).items()}
        np.savez(kept, **arrays)
    tokenizer = Tokenizer.from_file(str(path))
    with np.load(kept) as file:
        streams = {k.removeprefix("train."): file[k] for k in file.files if k.startswith("train.")}
        held = {k.removeprefix("held."): file[k] for k in file.files if k.startswith("held.")}
    return tokenizer, streams, held


def make_optimizer(model: Model, recipe: Recipe) -> MixedOptimizer:
    """Muon for the matrices that every token uses, AdamW for the rest."""
    return MixedOptimizer(model, recipe.lr, recipe.muon_lr, recipe.embed_lr, recipe.weight_decay)


def train_step(
    model: Model, optimizer: MixedOptimizer, batch: Tensor, recipe: Recipe, progress: float
) -> dict[str, Any]:
    """One step on token ids [B, T + 1]; what it measured."""
    logits = model(batch[:, :-1])
    loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    total = loss
    for moe in model.moes:
        if recipe.balance == "bias":
            total = total + recipe.sequence_alpha * sequence_loss(moe.scores, moe.ids)
        elif recipe.balance == "aux":
            scores, ids = moe.scores.flatten(0, 1)[None], moe.ids.flatten(0, 1)[None]
            total = total + recipe.aux_alpha * sequence_loss(scores, ids)
    optimizer.zero_grad()
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if recipe.balance == "bias" and progress < recipe.bias_frozen_from:
        for moe in model.moes:
            update_bias(moe.bias, moe.counts, recipe.bias_speed * (1 - progress))
    violations = [max_violation(moe.counts) for moe in model.moes]
    return {
        "loss": round(float(loss.detach()), 4),
        "grad_norm": round(float(norm), 3),
        "lr": round(recipe.lr * optimizer.scale, 6),
        "max_vio_batch": round(sum(violations) / len(violations), 3),
        "max_vio_layers": [round(v, 3) for v in violations],
    }


@torch.no_grad()
def evaluate(
    model: Model, held: dict[str, NDArray[np.int32]], tokenizer: Tokenizer, windows: int = 6, tokens: int = 256
) -> dict[str, Any]:
    """Perplexity and bits per byte on held-out text per domain; MaxVio over all of it, mixed as in training."""
    shares = {domain.name: domain.share for domain in text.domains()}
    loads = [torch.zeros(model.c["n_routed_experts"]) for _ in model.moes]
    perplexity, bits, losses = {}, {}, []
    for name, stream in held.items():
        starts = np.linspace(0, max(len(stream) - tokens, 0), windows).astype(int)
        batch = torch.stack([with_bos(stream[at : at + tokens]) for at in starts])
        loss = float(cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()))
        nbytes = sum(len(tokenizer.decode(row[1:].tolist()).encode()) for row in batch)
        perplexity[name] = round(math.exp(loss), 2)
        bits[name] = round(loss / math.log(2) * batch[:, 1:].numel() / nbytes, 3)
        losses.append(loss)
        counts = (expert_counts(moe.ids, model.c["n_routed_experts"]) for moe in model.moes)
        loads = [load + shares[name] * count for load, count in zip(loads, counts, strict=True)]
    violations = [max_violation(load) for load in loads]
    return {
        "held_out_loss": round(sum(losses) / len(losses), 4),
        "perplexity": perplexity,
        "bits_per_byte": bits,
        "max_vio_global": round(sum(violations) / len(violations), 3),
        "max_vio_global_layers": [round(v, 3) for v in violations],
    }


def save(model: Model, recipe: Recipe, step: int, out: Path) -> None:
    """Replace the checkpoint in one move."""
    state = {"model": model.state_dict(), "config": model.c, "recipe": vars(recipe), "step": step}
    torch.save(state, out / "checkpoint.tmp")
    (out / "checkpoint.tmp").replace(out / "checkpoint.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    for name, value in vars(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    out, threads = arguments.pop("out"), arguments.pop("threads")
    torch.set_num_threads(threads)
    train(Recipe(**arguments), out)


if __name__ == "__main__":
    main()
