"""Documents into token ids, and the tokens of local text kept on disk."""

import itertools
import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from jaxtyping import Integer

from mxd.atomic import sync_file, sync_folder
from mxd.data.documents import Document
from mxd.data.text import LocalText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    # Importing transformers takes seconds, and every tokenizer comes with it already imported.
    Tokenizer = object

CACHE_FORMAT = 3
"""Part of every key of the cache: raise it when the same documents come to give other tokens."""

DOCUMENTS_AT_ONCE = (8, 16, 32, 64, 128, 256)
"""Documents that are tokenised together; few at first, as little of a text may be all that is wanted."""

_HALF_A_CHARACTER = "\ufffd"
_TOKENS_OF_A_CHARACTER = 16
"""Tokens after which the rest of a character is no longer waited for."""


def bos_token(tokenizer: Tokenizer | None) -> int | None:
    """The token that begins a context, where there is one."""
    return None if tokenizer is None else cast(int | None, tokenizer.bos_token_id)


def eos_token(tokenizer: Tokenizer | None) -> int | None:
    """The token that ends a document, where there is one."""
    return None if tokenizer is None else cast(int | None, tokenizer.eos_token_id)


def pad_token(tokenizer: Tokenizer | None) -> int | None:
    """The token that fills up a batch, where there is one."""
    return None if tokenizer is None else cast(int | None, tokenizer.pad_token_id)


def separator_token(tokenizer: Tokenizer | None) -> int | None:
    """The token that stands between two documents: BOS where there is one, else EOS.

    Models that were trained on packed text have seen every document begin with BOS; in GPT-2's and Pythia's
    tokenizers it is the same token as EOS.
    """
    return bos_token(tokenizer) if bos_token(tokenizer) is not None else eos_token(tokenizer)


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], *, return_offsets_mapping: bool = False
) -> Mapping[str, list[list[Any]]]:
    """Return the token ids of each text as `input_ids`: whole, and without special tokens.

    What is written in a text is text. A special token's name in it (`<|endoftext|>`) is these characters and not the
    token, which a document could otherwise end, or be left out of the metrics, by having it in it; tokenizers that
    cannot tell the two apart make a token of it nevertheless.

    Args:
        tokenizer: Turns text into tokens.
        texts: The texts.
        return_offsets_mapping: Whether to return as `offset_mapping` which characters each token stands for.
    """
    # MistralCommonBackend refuses it, and takes no text for a special token.
    plain: dict[str, Any] = {"split_special_tokens": True} if hasattr(tokenizer, "split_special_tokens") else {}
    # verbose=False keeps back the warning that a text is longer than the model's context.
    found = tokenizer(
        list(texts),
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=return_offsets_mapping,
        verbose=False,
        **plain,
    )
    return cast("Mapping[str, list[list[Any]]]", found)


@contextmanager
def whole_offsets(tokenizer: Tokenizer) -> Generator[None, None, None]:
    """Let offsets reach over the white space of each token, of whatever part of it.

    The last step of many tokenizers (ByteLevel with `trim_offsets`, as in GPT-NeoX, Llama 3 and RoBERTa) takes it away:
    a token of white space then stands for no character, and indentation would have no tokens. Beside that this step
    adds special tokens, of which `encode_texts` makes none. Tokenizers that know no offsets stay as they are.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield
        return
    step = backend.post_processor
    backend.post_processor = None
    try:
        yield
    finally:
        backend.post_processor = step


def begun_context(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a text as a context begins: behind the tokenizer's first token, where it has one."""
    first = bos_token(tokenizer)
    return [*([] if first is None else [first]), *encode_texts(tokenizer, [text])["input_ids"][0]]


def decode_tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the text of some tokens, special ones too, with every space that is in it.

    Some tokenizers are set up to remove the space before a full stop or a comma, which the text may have had.
    """
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def token_pieces(tokenizer: Tokenizer, sequences: Iterable[Sequence[int]]) -> Iterator[list[str]]:
    """Yield what each token of some sequences adds to the text; the pieces of a sequence join to its text.

    Tokens are decoded behind another one, as many tokenizers take away the space with which a text begins:
    SentencePiece would give "the" for both "the" and " the". Where tokens end words by a suffix (`</w>`), the space
    belongs to the token with which the word ends. A character of several tokens is the piece of the last of them, and
    the others have an empty one; what the ends of the sequence leave incomplete is U+FFFD, as decoding has it.

    Args:
        tokenizer: Turns tokens into text.
        sequences: Tokens, special ones too, that may begin and end within a text.
    """
    decoded = _decoding(tokenizer)
    # Decoding takes a hundred times as long as looking up.
    kept: dict[int, str] = {}

    def alone(token: int) -> str:
        if token not in kept:
            kept[token] = decoded((token,))
        return kept[token]

    for ids in sequences:
        pieces: list[str] = []
        begun, waiting = 0, ""
        for number, token in enumerate(ids, start=1):
            text = decoded(ids[begun:number]) if waiting else alone(token)
            if waiting and not alone(token).startswith(_HALF_A_CHARACTER) and text == waiting + alone(token):
                # What waited was no beginning of a character: the sequence may have begun within one.
                pieces[-1], text, begun = waiting, alone(token), number - 1
            waits = text.endswith(_HALF_A_CHARACTER) and number < len(ids) and number - begun < _TOKENS_OF_A_CHARACTER
            pieces.append("" if waits else text)
            begun, waiting = (begun, text) if waits else (number, "")
        yield pieces


def _decoding(tokenizer: Tokenizer) -> Callable[[Sequence[int]], str]:
    """Return what turns tokens into the text that they add to one that has begun."""
    word_end = _word_end(tokenizer)
    anchor = [] if word_end else encode_texts(tokenizer, ["a"])["input_ids"][0][-1:]

    def decoded(ids: Sequence[int]) -> str:
        return decode_tokens(tokenizer, [*anchor, *ids])

    def with_word_ends(ids: Sequence[int]) -> str:
        # Decoders take away the last suffix, and some leave all of them to be read as text.
        text = decoded(ids).removesuffix(word_end).replace(word_end, " ")
        return f"{text} " if str(tokenizer.convert_ids_to_tokens(ids[-1])).endswith(word_end) else text

    skipped = len(decoded(()))
    return with_word_ends if word_end else lambda ids: decoded(ids)[skipped:]


def _word_end(tokenizer: Tokenizer) -> str:
    """Return what tokens have at their end that end a word; nothing where words are told apart otherwise."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    return str(getattr(model, "end_of_word_suffix", None) or "")


class EncodedDocument(NamedTuple):
    """The tokens of one document."""

    row: int
    """Number of its row in the source."""
    ids: Integer[np.ndarray, " length"]
    """Its tokens, and the separator where the tokenizer has one."""


def encoded_documents(
    documents: Iterable[Document], tokenizer: Tokenizer | None, vocab_size: int
) -> Iterator[EncodedDocument]:
    """Tokenise documents in order: whole, without special tokens, each followed by the separator where there is one.

    A BOS or EOS with which a pre-tokenised document begins or ends is dropped, as packing adds its own.

    Args:
        documents: What to tokenise; read some ahead, a few hundred at last.
        tokenizer: Turns text into tokens; may be None where all documents have ids.
        vocab_size: Size of the model's vocabulary.

    Raises:
        ValueError: If an id does not lie in the vocabulary, or a document is text and there is no tokenizer; at once,
            if the token that the tokenizer puts between documents does not.
    """
    require_separator(tokenizer, vocab_size)
    return _encoded_documents(iter(documents), tokenizer, vocab_size)


def _encoded_documents(
    documents: Iterator[Document], tokenizer: Tokenizer | None, vocab_size: int
) -> Iterator[EncodedDocument]:
    separator = separator_token(tokenizer)
    end = [] if separator is None else [separator]
    sizes = itertools.chain(DOCUMENTS_AT_ONCE, itertools.repeat(DOCUMENTS_AT_ONCE[-1]))
    while batch := list(itertools.islice(documents, next(sizes))):
        for document, ids in zip(batch, _encode(batch, tokenizer), strict=True):
            check_vocabulary(max(ids, default=0), vocab_size)
            yield EncodedDocument(document.row, np.array([*ids, *end], dtype=np.uint32))


def require_separator(tokenizer: Tokenizer | None, vocab_size: int) -> None:
    """Raise a ValueError unless the token between documents, which is BOS if there is one, lies in the vocabulary."""
    separator = separator_token(tokenizer)
    if tokenizer is not None and separator is not None and separator >= vocab_size:
        raise ValueError(
            f"The token that the tokenizer begins contexts with or puts between documents must lie below {vocab_size}, "
            f"the size of the model's vocabulary; it is {separator} ({tokenizer.convert_ids_to_tokens(separator)!r}). "
            "Use the model's own tokenizer, or enlarge the model's embeddings (resize_token_embeddings)."
        )


def check_vocabulary(largest: int, vocab_size: int) -> None:
    """Raise a ValueError unless the largest token id lies in the model's vocabulary."""
    if largest >= vocab_size:
        raise ValueError(
            f"Token ids must lie below {vocab_size}, the size of the model's vocabulary; the text has {largest}. "
            "Use the model's own tokenizer, or ids made with it."
        )


def cached_training_tokens(
    source: LocalText, tokenizer: Tokenizer | None, *, vocab_size: int, cache: Path | None = None
) -> Integer[np.ndarray, " num_tokens"]:
    """Return all tokens of the training documents, joined: tokenised once, then mapped from disk.

    The file's name is a digest of the documents (with which of them are held out) and of the tokenizer.

    Args:
        source: The documents.
        tokenizer: Turns text into tokens; may be None where all documents have ids.
        vocab_size: Size of the model's vocabulary.
        cache: Folder of the cache; `$MXD_CACHE` or `~/.cache/mxd` where None.

    Raises:
        ValueError: If an id does not lie in the vocabulary, or the folder cannot be written.
    """
    require_separator(tokenizer, vocab_size)
    folder = cache if cache is not None else Path(os.environ.get("MXD_CACHE", "~/.cache/mxd")).expanduser()
    key = f"{CACHE_FORMAT} {source.identity.digest} {tokenizer_digest(tokenizer)}"
    path = folder / f"tokens-{blake2b(key.encode(), digest_size=16).hexdigest()}.npy"
    tokens = _mapped(path)
    if tokens is None:
        parts = [encoded.ids for encoded in encoded_documents(source.documents(held_out=False), tokenizer, vocab_size)]
        # An array that does not exist cannot be mapped: text of no training document has nothing to keep.
        if sum(map(len, parts)) == 0:
            return np.empty(0, dtype=np.uint16)
        tokens = np.concatenate(parts)
        _write(path, tokens.astype(np.uint16) if tokens.max() < 2**16 else tokens)
        tokens = cast(np.ndarray, _mapped(path))
    check_vocabulary(int(tokens.max()), vocab_size)
    return tokens


def _encode(batch: Sequence[Document], tokenizer: Tokenizer | None) -> Iterator[Sequence[int]]:
    texts = [document.text for document in batch if document.ids is None]
    encoded: Iterator[list[int]] = iter(())
    if texts and tokenizer is None:
        raise ValueError(
            "Text must come with the model's tokenizer; there is none. Save the tokenizer beside the model, "
            "or give token ids in `input_ids`."
        )
    if texts and tokenizer is not None:
        encoded = iter(encode_texts(tokenizer, texts)["input_ids"])
    for document in batch:
        yield next(encoded) if document.ids is None else _without_ends(document.ids, tokenizer)


def _without_ends(ids: Sequence[int], tokenizer: Tokenizer | None) -> Sequence[int]:
    start = int(ids[0] == bos_token(tokenizer))
    end = len(ids) - int(len(ids) > start and ids[-1] == eos_token(tokenizer))
    return ids[start:end]


def tokenizer_digest(tokenizer: Tokenizer | None) -> str:
    """Return a checksum of all that decides which ids a text becomes."""
    if tokenizer is None:
        return "none"
    rules: object = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        # Truncation and padding are settings of the last call, which encoding overrules.
        rules = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    content = json.dumps([rules, bos_token(tokenizer), eos_token(tokenizer)], sort_keys=True)
    return blake2b(content.encode(), digest_size=16).hexdigest()


def _mapped(path: Path) -> Integer[np.ndarray, " num_tokens"] | None:
    try:
        return np.load(path, mmap_mode="r")
    # A file that a full disk cut short, or that cannot be read, is made again.
    except (OSError, ValueError, EOFError):
        return None


def _write(path: Path, tokens: Integer[np.ndarray, " num_tokens"]) -> None:
    # Processes that tokenise the same text at one time write files of their own.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                np.save(file, tokens)
            sync_file(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise ValueError(
            f"The cache of tokens must be a folder that can be written; {path.parent} is not ({error.strerror}). "
            "Set MXD_CACHE to a folder with room."
        ) from error
