"""Prompts: format the instruction (for most π₀.₅ policies with the state) and tokenize it.

π₀'s prompt is the instruction and a separately tokenized newline. π₀.₅'s prompt also contains the state, as integers of
256 bins. A policy's `discrete_state_input` selects the format, not its variant.
"""

import bisect
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, Int64

from torchpi.errors import MissingFileError, TransformError
from torchpi.transforms.normalize import require_finite, require_known

TRUNCATIONS = ("instruction", "original")
FORMATS = ("openpi", "lerobot")
# Texts of the special tokens, in Gemma's tokenizers and in others.
SPECIAL_TOKENS = {
    "bos": ("<bos>", "<s>"),
    "eos": ("<eos>", "</s>"),
    "pad": ("<pad>",),
    "unk": ("<unk>",),
}

_BIN_EDGES = np.linspace(-1, 1, 257)[:-1]


def as_text(prompt: Any) -> str:
    """Convert a prompt to str from str, UTF-8 bytes, or 0-d arrays of them (as in requests and npz files)."""
    if isinstance(prompt, str | np.ndarray) and (code := invalid_code_point(prompt)) is not None:
        raise TransformError(
            f"The prompt has the code point {code:#x}, which is not a Unicode character; decode its bytes again."
        )
    value = prompt.item() if isinstance(prompt, np.ndarray) and prompt.ndim == 0 else prompt
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise TransformError(f"The prompt's bytes are not UTF-8: {error}") from error
    if not isinstance(value, str):
        raise TransformError(
            f"The prompt is of type {type(prompt).__name__}; expected a str (or UTF-8 bytes, or a 0-d array of one)."
        )
    return str(value)


def invalid_code_point(text: Any) -> int | None:
    """Find the first code point that is not a Unicode character in a str or array of strings; None if there is none."""
    # NumPy accepts any 32 bits as a character; Python fails to decode values beyond Unicode, and to encode surrogates.
    array = np.asarray(text)
    if array.dtype.kind != "U":
        return None
    codes = array.reshape(-1).view(np.dtype(np.uint32).newbyteorder(array.dtype.byteorder))
    invalid = codes[(codes > 0x10FFFF) | ((codes >= 0xD800) & (codes <= 0xDFFF))]
    return int(invalid[0]) if invalid.size else None


def clean_text(text: str) -> str:
    """Strip surrounding white space, and replace `_` and newlines by spaces."""
    return text.strip().replace("_", " ").replace("\n", " ")


def digitize_state(state: np.ndarray) -> Int[np.ndarray, " s"]:
    """Digitize a normalized state to bins 0 to 255 for values from -1 to 1, and -1 for values below -1.

    Args:
        state: [s], normalized, neither padded nor cast: a cast to float32 can move a value across a bin edge.

    Raises:
        ValueError: not [s], or NaN or infinity in it.
    """
    if state.ndim != 1:
        raise TransformError(f"Cannot digitize a state of shape {list(state.shape)}; expected one sample, [s].")
    require_finite(state, "the normalized state")
    return np.digitize(state, _BIN_EDGES) - 1


def prompt_text(
    prompt: Any, state: np.ndarray | None, *, discrete_state_input: bool, prompt_format: str = "openpi"
) -> str:
    """Format the whole text of a prompt; arguments as in `tokenize_prompt`."""
    instruction, template = _template(prompt, state, discrete_state_input, prompt_format)
    return "".join(template(instruction))


def pi05_prompt_text(text: str, state: np.ndarray) -> str:
    """Format π₀.₅'s prompt as openpi does, from a raw instruction and a normalized state [s]."""
    return prompt_text(text, state, discrete_state_input=True)


def _template(
    prompt: Any, state: np.ndarray | None, discrete_state_input: bool, prompt_format: str
) -> tuple[str, Callable[[str], list[str]]]:
    """Return the cleaned instruction, and a function from an instruction to the parts that are tokenized separately."""
    text = as_text(prompt)
    if discrete_state_input:
        if state is None:
            raise TransformError(
                "This policy's prompt contains the state (discrete_state_input), but there is no state."
            )
        ending = f", State: {' '.join(map(str, digitize_state(state)))};\nAction: "
        return clean_text(text), lambda instruction: [f"Task: {instruction}{ending}"]
    if prompt_format == "lerobot":
        return text, lambda instruction: [instruction if instruction.endswith("\n") else f"{instruction}\n"]
    return clean_text(text), lambda instruction: [instruction, "\n"]


def check_prompt_settings(prompt_format: str, truncation: str) -> None:
    """Raise a TransformError for an unknown prompt format or truncation."""
    require_known("truncation", truncation, TRUNCATIONS)
    require_known("prompt format", prompt_format, FORMATS)


@runtime_checkable
class Tokenizer(Protocol):
    """Tokenizer interface of a policy."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; all ids are smaller."""

    @property
    def special_tokens(self) -> dict[str, str]:
        """Texts of bos, eos, pad and unk, for the tokens that exist."""

    def encode(self, text: str, add_bos: bool) -> list[int]:
        """Encode a text, optionally after a beginning-of-sequence id; never adds an end-of-sequence id."""


class SentencePieceTokenizer:
    """SentencePiece model (`tokenizer.model`), such as PaliGemma's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a SentencePiece model, or no beginning-of-sequence token.
    """

    def __init__(self, path: str | Path):
        import sentencepiece

        model = _read(path)
        try:
            if not model:
                raise RuntimeError("It is empty.")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise TransformError(
                f"{path} is not a SentencePiece model, or is damaged: {error}. Get the file again."
            ) from error
        if self._processor.bos_id() < 0:
            raise TransformError(
                f"The SentencePiece model {path} has no beginning-of-sequence token; π₀'s prompts begin with it."
            )

    @property
    def vocab_size(self) -> int:
        return int(self._processor.vocab_size())

    @property
    def special_tokens(self) -> dict[str, str]:
        ids = {name: getattr(self._processor, f"{name}_id")() for name in SPECIAL_TOKENS}
        return {name: self._processor.id_to_piece(i) for name, i in ids.items() if i >= 0}

    def encode(self, text: str, add_bos: bool) -> list[int]:
        return list(self._processor.encode(text, add_bos=add_bos))


class HFTokenizer:
    """`tokenizer.json` of the `tokenizers` library.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not such a file, or no beginning-of-sequence token "<bos>" (or "<s>").
    """

    def __init__(self, path: str | Path):
        import tokenizers

        content = _read(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception
            raise TransformError(
                f"{path} is not a tokenizer.json, or is damaged: {error}. Get the file again."
            ) from error
        # The file may contain padding and truncation settings; tokenize_prompt handles both.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if "bos" not in self.special_tokens:
            raise TransformError(
                f"{path} has no beginning-of-sequence token <bos> (or <s>); π₀'s prompts begin with it."
            )
        self._bos = self._tokenizer.token_to_id(self.special_tokens["bos"])

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def special_tokens(self) -> dict[str, str]:
        tokens = {}
        for name, texts in SPECIAL_TOKENS.items():
            if in_vocab := [text for text in texts if self._tokenizer.token_to_id(text) is not None]:
                tokens[name] = in_vocab[0]
        return tokens

    def encode(self, text: str, add_bos: bool) -> list[int]:
        try:
            ids = list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of the library; not an Exception, and cannot be imported
                raise
            raise TransformError(f"The policy's tokenizer.json fails at {text!a:.80}: {error}.") from error
        return [self._bos, *ids] if add_bos else ids  # type: ignore[list-item]


def load_tokenizer(path: str | Path) -> SentencePieceTokenizer | HFTokenizer:
    """Load a tokenizer. Its type is recognised by the file's contents, not by its name.

    Args:
        path: a SentencePiece model, a tokenizer.json, or a folder with one of them (the SentencePiece model is
            preferred).

    Raises:
        FileNotFoundError: no such file, or none in the folder.
        ValueError: the file is neither, or is damaged.
    """
    file = find_tokenizer(path)
    return HFTokenizer(file) if _read(file).lstrip().startswith(b"{") else SentencePieceTokenizer(file)


def find_tokenizer(path: str | Path) -> Path:
    """Find the tokenizer file in a folder; the path of a file is returned unchanged."""
    file = Path(path)
    if not file.is_dir():
        return file
    for candidate in (file / "tokenizer.model", *sorted(file.glob("*.model")), file / "tokenizer.json"):
        if candidate.is_file():
            return candidate
    raise MissingFileError(f"No tokenizer in {path}; expected tokenizer.model or tokenizer.json there, or give a file.")


def _read(path: str | Path) -> bytes:
    if not Path(path).is_file():
        raise MissingFileError(f"No tokenizer file at {path}.")
    return Path(path).read_bytes()


def tokenize_prompt(
    tokenizer: Tokenizer,
    prompt: Any,
    state: np.ndarray | None,
    *,
    discrete_state_input: bool,
    max_token_len: int | None,
    prompt_format: str = "openpi",
    truncation: str = "instruction",
    warn: Callable[[str], None] | None = None,
) -> tuple[Int64[np.ndarray, " L"], Bool[np.ndarray, " L"]]:
    """Tokenize a prompt; returns token ids and mask, padded with 0 and False.

    Args:
        tokenizer: the tokenizer that the model was trained with.
        prompt: instruction, see `as_text`; it is cleaned here, except for π₀ in LeRobot's format.
        state: [s], normalized, not padded, in its own dtype; used only with discrete_state_input.
        discrete_state_input: use π₀.₅'s format with the state as text, otherwise π₀'s.
        max_token_len: L; None: neither pad nor cut the prompt.
        prompt_format: π₀'s format. "openpi": the cleaned instruction, then a separately tokenized newline. "lerobot":
            the instruction as it is, ending in a newline, tokenized as one text. π₀.₅'s format is the same for both.
        truncation: how to cut a prompt that is too long. "instruction": remove words from the end of the instruction
            (letters from its last word) until the whole prompt fits. "original": cut the tokens at max_token_len as
            openpi does; the model then misses the end of the state and "Action: ".
        warn: called with a message when something was cut; by default a UserWarning is issued.

    Raises:
        ValueError: the prompt is not text; the format needs a state but there is none; even an empty instruction does
            not fit.
    """
    check_prompt_settings(prompt_format, truncation)
    text, template = _template(prompt, state, discrete_state_input, prompt_format)

    def encode(instruction: str) -> list[int]:
        first, *rest = template(instruction)
        ids = tokenizer.encode(first, add_bos=True)
        for part in rest:
            ids = ids + tokenizer.encode(part, add_bos=False)
        return ids

    ids = encode(text)
    if max_token_len is None:
        return np.array(ids, np.int64), np.ones(len(ids), bool)
    if len(ids) > max_token_len:
        num_tokens = len(ids)
        if truncation == "original":
            ids, action = ids[:max_token_len], "its end is cut, including the state or the ending"
        else:
            ids, shortened = _shorten(text, encode, max_token_len)
            action = f"the instruction is shortened to {shortened!r}"
        beginning = text if len(text) <= 200 else f"{text[:200]}…"
        message = (
            f"A prompt has {num_tokens} tokens, but max_token_len is {max_token_len}: {action}. It began as "
            f"{beginning!r}."
        )
        (warn or partial(warnings.warn, stacklevel=2))(message)
    tokens = np.zeros(max_token_len, np.int64)
    tokens[: len(ids)] = ids
    return tokens, np.arange(max_token_len) < len(ids)


def _shorten(text: str, encode: Callable[[str], list[int]], max_token_len: int) -> tuple[list[int], str]:
    """Shorten the text to the longest prefix that fits, in whole words if at least one fits; returns ids and prefix."""
    if (num_tokens := len(encode(""))) > max_token_len:
        raise TransformError(
            f"max_token_len {max_token_len} is too small: without any instruction the prompt has {num_tokens} tokens. "
            "Use the max_token_len that the policy was trained with."
        )

    def fits(end: int) -> bool:
        return len(encode(text[:end])) <= max_token_len

    word_ends = [match.end() for match in re.finditer(r"\S+", text)]
    end = _last_fitting([0, *word_ends], fits)
    if end == 0 and word_ends:
        end = _last_fitting(range(word_ends[0]), fits)
    return encode(text[:end]), text[:end]


def _last_fitting(ends: Sequence[int], fits: Callable[[int], bool]) -> int:
    """Find the last entry that fits, given that the first one does.

    Uses bisection, because a prompt can be long. A longer text can have one token less ("put" versus "pu"), so a few
    entries after the result are tried as well.
    """
    i = bisect.bisect_right(ends, False, lo=1, key=lambda end: not fits(end)) - 1
    later = [j for j in range(i + 1, min(i + 17, len(ends))) if fits(ends[j])]
    return ends[max([i, *later])]
