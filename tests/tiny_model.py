"""A language model small enough for any test, on disk as on the hub, and a text to train on."""

import json
import random
from pathlib import Path
from typing import Literal

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, Unigram

from mxd.data.holdout import is_held_out

Family = Literal["llama", "gpt2"]

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
D_MODEL = 16
D_HIDDEN: dict[Family, int] = {"llama": 40, "gpt2": 64}
NUM_LAYERS = 2
CONTEXT = 64
"""Positions that the models know."""
WORDS = ["a", "the", "one", "two", "red", "green", "cat", "dog", "bird", "tree", "river", "sees", "makes", "and", "in"]


def write_model(folder: Path, family: Family = "llama", *, seed: int = 0) -> Path:
    """Write a random model with a byte-level tokenizer (259 tokens) and return its folder."""
    sizes: dict[str, object] = {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    if family == "llama":
        sizes |= {"hidden_size": D_MODEL, "intermediate_size": D_HIDDEN[family], "num_hidden_layers": NUM_LAYERS}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
    else:
        sizes |= {"n_embd": D_MODEL, "n_layer": NUM_LAYERS, "n_head": 2, "n_positions": CONTEXT}
    config = hf.AutoConfig.for_model(family, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf.AutoModelForCausalLM.from_config(config)
        # The usual 0.02 leaves so narrow a model almost linear.
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def write_text(path: Path, *, documents: int = 60, words: int = 80, seed: int = 0) -> Path:
    """Write a .jsonl of random sentences, a tenth of them held out, and return its path."""
    chance = random.Random(seed)
    held_out = documents // 10
    kept: dict[bool, list[str]] = {True: [], False: []}
    wanted = {True: held_out, False: documents - held_out}
    while any(len(kept[which]) < wanted[which] for which in kept):
        text = " ".join(chance.choices(WORDS, k=words)) + "."
        which = is_held_out(text)
        if len(kept[which]) < wanted[which]:
            kept[which].append(text)
    rows = [json.dumps({"text": text}) for text in kept[False] + kept[True]]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def spaced_tokenizer() -> hf.PreTrainedTokenizerFast:
    """Return a tokenizer in SentencePiece's way, for the same models: words, letters, and the bytes of one emoji."""
    words = [f"▁{word}" for word in WORDS if len(word) > 1]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz.,é"]
    emoji = [f"<0x{byte:02X}>" for byte in "🎉".encode()]
    pieces = ["<unk>", *words, "the", *letters, *emoji]
    tokenizer = Tokenizer(Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def suffixed_tokenizer(*, bytewise: bool = False) -> hf.PreTrainedTokenizerFast:
    """Return a tokenizer in which `</w>` ends words, for the same models: in GPT-1's way, or of bytes in CLIP's."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet()) if bytewise else [*"abcdehirstx.", "é"]
    vocabulary = ["<unk>", "ca", "cat</w>", "th", "the</w>", *letters, *(f"{letter}</w>" for letter in letters)]
    model = BPE(
        vocab={token: number for number, token in enumerate(vocabulary)},
        merges=[("c", "a"), ("ca", "t</w>"), ("t", "h"), ("th", "e</w>")],
        unk_token="<unk>",
        end_of_word_suffix="</w>",
    )
    tokenizer = Tokenizer(model)
    bytes_of = [pre_tokenizers.ByteLevel(add_prefix_space=False)] if bytewise else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), *bytes_of])
    tokenizer.decoder = decoders.ByteLevel() if bytewise else decoders.BPEDecoder(suffix="</w>")
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token="<unk>"
    )


def _tokenizer() -> hf.PreTrainedTokenizerFast:
    # ByteLevel's alphabet comes in an order of its own; sorted, it is the same everywhere.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)
