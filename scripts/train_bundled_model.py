"""Train the language model that mxd ships: a small GPT-2 on the source of Python's standard library.

    python scripts/train_bundled_model.py --out build/bundled-model          # over an hour on two cores
    python scripts/train_bundled_model.py --out build/bundled-model --resume

The same seed, Python, machine and number of threads give the same weights. It reads the modules of the standard library
that are not held out, and the library's own tests where this Python has them. The run folder keeps `metrics.jsonl`, the
newest snapshots and, at the end, the model as bf16 safetensors in Hugging Face's layout with its tokenizer.
"""

import argparse
import hashlib
import json
import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from mxd.data.holdout import is_held_out
from mxd.data.stdlib import TEST_FOLDERS, Module, stdlib_modules, stdlib_test_modules

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
CONTEXT = 256
BATCH = 16
WARMUP_STEPS = 200
DECAY_SHARE = 0.35
PEAK_RATE = 3e-3
SEED = 0
TOKENS = 32e6
TWICE_FROM_EPOCH = 2
"""Epoch from which library modules come twice an epoch: tests are two thirds of the text and read differently."""
SHARED_LINES = 0.2
"""A training document more of whose long lines than this stand in held-out modules is left out."""


def training_and_held_out() -> tuple[list[Module], list[Module], list[str]]:
    """Return the documents to train on (modules before tests), the held-out ones, and the paths left out as copies."""
    modules = list(stdlib_modules())
    held_out = [module for module in modules if is_held_out(module.path)]
    candidates = [module for module in modules if not is_held_out(module.path)] + list(stdlib_test_modules())
    held_out_lines = {line for module in held_out for line in _long_lines(module.source)}
    training, copies, seen = [], [], set[str]()
    for module in candidates:
        lines = _long_lines(module.source)
        shared = sum(line in held_out_lines for line in lines) / max(1, len(lines))
        digest = hashlib.sha256(module.source.encode()).hexdigest()
        if shared > SHARED_LINES or digest in seen:
            copies.append(module.path)
        else:
            training.append(module)
            seen.add(digest)
    return training, held_out, copies


def is_test(path: str) -> bool:
    """Whether a module is one of the library's own tests."""
    return not TEST_FOLDERS.isdisjoint(path.split("/")[:-1])


def _long_lines(source: str) -> list[str]:
    return [line.strip() for line in source.splitlines() if len(line.strip()) >= 40]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE whose one special token begins and ends documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def new_model() -> GPT2LMHeadModel:
    """Return the untrained model: 6 layers of width 256, tied embeddings, no dropout."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=256,
        n_layer=6,
        n_head=4,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def epoch_windows(documents: list[list[int]], num_modules: int, epoch: int) -> torch.Tensor:
    """Return one epoch's contexts: documents shuffled and joined, cut into windows that begin with end-of-text.

    The first `num_modules` documents are the library's modules, the others its tests.
    """
    order = np.random.default_rng([SEED, epoch])
    if epoch >= TWICE_FROM_EPOCH:
        documents = documents[:num_modules] + documents
    stream = np.concatenate([np.array([*documents[n], 0]) for n in order.permutation(len(documents))])
    stream = stream[order.integers(CONTEXT - 1) :]
    windows = stream[: len(stream) // (CONTEXT - 1) * (CONTEXT - 1)].reshape(-1, CONTEXT - 1)
    windows = np.pad(windows, ((0, 0), (1, 0)))
    return torch.from_numpy(windows[order.permutation(len(windows))]).long()


def held_out_loss(model: GPT2LMHeadModel, documents: list[list[int]], num_bytes: int) -> dict[str, float]:
    """Score every held-out token once: documents joined, contexts as in training, in float32."""
    stream = np.concatenate([np.array([*document, 0]) for document in documents])
    padding = -len(stream) % (CONTEXT - 1)
    windows = torch.from_numpy(np.pad(np.pad(stream, (0, padding)).reshape(-1, CONTEXT - 1), ((0, 0), (1, 0)))).long()
    labels = windows.clone()
    if padding:
        labels[-1, -padding:] = -100
    total, model = 0.0, model.eval()
    with torch.no_grad():
        for start in range(0, len(windows), 32):
            logits = model(windows[start : start + 32]).logits[:, :-1].float()
            target = labels[start : start + 32, 1:]
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum").item()
    model.train()
    return {"nats_per_token": total / len(stream), "bits_per_byte": total / math.log(2) / num_bytes}


def optimizers(model: GPT2LMHeadModel) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, norms and biases."""
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if ".h." in name and p.ndim == 2]
    others = [p for name, p in named.items() if not (".h." in name and p.ndim == 2)]
    return [
        torch.optim.Muon(matrices, lr=PEAK_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def rate(step: int, steps: int) -> float:
    """Warm up, hold, then fall linearly to nothing over the last `DECAY_SHARE` of the steps."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (DECAY_SHARE * steps))


def save_snapshot(folder: Path, step: int, model: GPT2LMHeadModel, optims: list[torch.optim.Optimizer]) -> None:
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for n, optimizer in enumerate(optims):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{n}.{index}.{name}": value.contiguous() for name, value in state.items()}
    partial = folder / "snapshot.partial"
    save_file(tensors, partial, metadata={"step": str(step)})
    partial.rename(folder / f"snapshot-{step:06d}.safetensors")
    for old in sorted(folder.glob("snapshot-*.safetensors"))[:-2]:
        old.unlink()


def load_snapshot(folder: Path, model: GPT2LMHeadModel, optims: list[torch.optim.Optimizer]) -> int:
    """Put the newest snapshot's state back and return the step after it; 0 where there is none."""
    snapshots = sorted(folder.glob("snapshot-*.safetensors"))
    if not snapshots:
        return 0
    tensors = load_file(snapshots[-1])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    for n, optimizer in enumerate(optims):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"optimizer.{n}."):
                _, _, index, name = key.split(".")
                state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return int(snapshots[-1].stem.split("-")[1])


def export(folder: Path, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, facts: dict[str, object]) -> None:
    """Write the finished model, in bfloat16, with its tokenizer, its held-out list and what the card needs."""
    final = folder / "model"
    shutil.rmtree(final, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(final)
    tokenizer.save_pretrained(final)
    (final / "held_out_modules.json").write_text(json.dumps(facts.pop("held_out_modules"), indent=0) + "\n")
    (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=TOKENS)
    parser.add_argument("--stop-after", type=int, default=None, help="stop early, for trying settings")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    if args.out.exists() and not args.resume:
        sys.exit(f"{args.out} exists; pass --resume to continue it or name another folder.")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)

    training, held_out, copies = training_and_held_out()
    tokenizer = train_tokenizer([module.source for module in training])
    encode = tokenizer.backend_tokenizer.encode_batch
    num_modules = sum(not is_test(module.path) for module in training)
    documents = [encoding.ids for encoding in encode([module.source for module in training])]
    held_out_ids = [encoding.ids for encoding in encode([module.source for module in held_out])]
    held_out_bytes = sum(len(module.source.encode()) for module in held_out)
    epoch_tokens = sum(map(len, documents))
    steps = math.ceil(args.tokens / (BATCH * CONTEXT))
    print(f"{len(documents)} documents, {epoch_tokens:,} tokens an epoch, {steps:,} steps", flush=True)

    model = new_model()
    optims = optimizers(model)
    first = load_snapshot(args.out, model, optims) if args.resume else 0
    started, windows, epoch, epoch_first = time.perf_counter(), epoch_windows(documents, num_modules, 0), 0, 0
    for step in range(steps):
        while (step - epoch_first + 1) * BATCH > len(windows):
            epoch, epoch_first = epoch + 1, step
            windows = epoch_windows(documents, num_modules, epoch)
        if step < first:
            continue
        batch = windows[(step - epoch_first) * BATCH :][:BATCH]
        for optimizer in optims:
            for group in optimizer.param_groups:
                group["lr"] = PEAK_RATE * rate(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optims:
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            record: dict[str, float] = {"step": step, "loss": loss.item(), "seconds": time.perf_counter() - started}
            if step % 500 == 0:
                record |= held_out_loss(model, held_out_ids, held_out_bytes)
                save_snapshot(args.out, step + 1, model, optims)
            with (args.out / "metrics.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
            print(record, flush=True)
        if step == args.stop_after:
            return
    save_snapshot(args.out, steps, model, optims)
    exported = model.to(torch.bfloat16).float()
    facts = {
        "held_out_modules": [module.path for module in held_out],
        "held_out": held_out_loss(exported, held_out_ids, held_out_bytes),
        "held_out_tokens": sum(map(len, held_out_ids)),
        "held_out_bytes": held_out_bytes,
        "left_out_as_copies": copies,
        "training_documents": len(documents),
        "training_modules": num_modules,
        "epoch_tokens": epoch_tokens,
        "steps": steps,
        "tokens": steps * BATCH * CONTEXT,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }
    export(args.out, model, tokenizer, facts)
    print(json.dumps(facts["held_out"]))


if __name__ == "__main__":
    main()
