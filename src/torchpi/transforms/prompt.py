"""The instruction, and for most π₀.₅ policies the state, as token ids.

π₀'s prompt is the text, then a separately tokenized newline. π₀.₅'s prompt has the state in it, as 256-bin integers.
Which of the two a policy uses follows its `discrete_state_input`, not its variant.
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
# Their texts in Gemma's tokenizers, and in others.
SPECIAL_TOKENS = {
    "bos": ("<bos>", "<s>"),
    "eos": ("<eos>", "</s>"),
    "pad": ("<pad>",),
    "unk": ("<unk>",),
}

_BIN_EDGES = np.linspace(-1, 1, 257)[:-1]


def as_text(prompt: Any) -> str:
    """The prompt as str; str, bytes (UTF-8) and 0-d arrays of them, as they come over the wire and out of npz files."""
    if isinstance(prompt, str | np.ndarray) and (code := invalid_code_point(prompt)) is not None:
        raise TransformError(f"The prompt has the code point {code:#x}, no Unicode character; decode its bytes again.")
    value = prompt.item() if isinstance(prompt, np.ndarray) and prompt.ndim == 0 else prompt
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise TransformError(f"The prompt's bytes are not UTF-8: {error}") from error
    if not isinstance(value, str):
        raise TransformError(
            f"The prompt is a {type(prompt).__name__}; expected a str (or UTF-8 bytes, or a 0-d array of one)."
        )
    return str(value)


def invalid_code_point(text: Any) -> int | None:
    """The first code point that is no Unicode character, in a str or an array of any dtype; None: all are."""
    # NumPy keeps any 32 bits as a character; Python makes no str of what is beyond Unicode, and no bytes of surrogates.
    array = np.asarray(text)
    if array.dtype.kind != "U":
        return None
    codes = array.reshape(-1).view(np.dtype(np.uint32).newbyteorder(array.dtype.byteorder))
    invalid = codes[(codes > 0x10FFFF) | ((codes >= 0xD800) & (codes <= 0xDFFF))]
    return int(invalid[0]) if invalid.size else None


def clean_text(text: str) -> str:
    """Strip white space around the text, and make spaces of `_` and newlines inside."""
    return text.strip().replace("_", " ").replace("\n", " ")


def digitize_state(state: np.ndarray) -> Int[np.ndarray, " s"]:
    """The bins of a normalized state: 0 to 255 from -1 to 1, and -1 for everything below -1.

    Give it the state as the robot sent it, normalized, neither padded nor cast: float32 moves values across bin edges.

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
    """The whole text of a prompt; arguments as of `tokenize_prompt`."""
    instruction, pieces = _template(prompt, state, discrete_state_input, prompt_format)
    return "".join(pieces(instruction))


def pi05_prompt_text(text: str, state: np.ndarray) -> str:
    """π₀.₅'s prompt, as openpi writes it, from a raw instruction and a normalized state [s]."""
    return prompt_text(text, state, discrete_state_input=True)


def _template(
    prompt: Any, state: np.ndarray | None, discrete_state_input: bool, prompt_format: str
) -> tuple[str, Callable[[str], list[str]]]:
    """The instruction, and the text around any instruction, in the parts that are tokenized by themselves."""
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
    """Raise an error about an unknown prompt format or truncation."""
    require_known("truncation", truncation, TRUNCATIONS)
    require_known("prompt format", prompt_format, FORMATS)


@runtime_checkable
class Tokenizer(Protocol):
    """A tokenizer as a policy needs it."""

    @property
    def vocab_size(self) -> int:
        """The number of ids; all ids are below."""

    @property
    def special_tokens(self) -> dict[str, str]:
        """The texts of bos, eos, pad and unk, as far as there are such tokens."""

    def encode(self, text: str, add_bos: bool) -> list[int]:
        """The ids of a text, after the beginning-of-sequence id if asked for; never an end-of-sequence id."""


class SentencePieceTokenizer:
    """A SentencePiece model (`tokenizer.model`), such as PaliGemma's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it isn't a SentencePiece model, or has no beginning-of-sequence token.
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
    """A `tokenizer.json` of the `tokenizers` library.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it isn't such a file, or has no beginning-of-sequence token "<bos>" (or "<s>").
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
        # A file may carry settings of its last use; lengths are tokenize_prompt's business.
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
        known = {
            name: [text for text in texts if self._tokenizer.token_to_id(text) is not None]
            for name, texts in SPECIAL_TOKENS.items()
        }
        return {name: found[0] for name, found in known.items() if found}

    def encode(self, text: str, add_bos: bool) -> list[int]:
        try:
            ids = list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # the library's, which is no Exception and has no module
                raise
            raise TransformError(f"The policy's tokenizer.json fails at {text!a:.80}: {error}.") from error
        return [self._bos, *ids] if add_bos else ids  # type: ignore[list-item]


def load_tokenizer(path: str | Path) -> SentencePieceTokenizer | HFTokenizer:
    """Load a tokenizer by what is in the file, not by its name.

    Args:
        path: a SentencePiece model, a tokenizer.json, or a folder with one of them (both: the SentencePiece model).

    Raises:
        FileNotFoundError: no such file, or none in the folder.
        ValueError: the file is neither, or is damaged.
    """
    file = find_tokenizer(path)
    return HFTokenizer(file) if _read(file).lstrip().startswith(b"{") else SentencePieceTokenizer(file)


def find_tokenizer(path: str | Path) -> Path:
    """The file of a tokenizer, which may be named by its folder."""
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
    """Token ids and their mask, zeros and False behind the prompt.

    Args:
        tokenizer: its ids are what the model was trained with.
        prompt: the instruction, see `as_text`; it is cleaned here, except in LeRobot's format of π₀.
        state: [s], normalized, not padded, in its own dtype; read only with discrete_state_input.
        discrete_state_input: π₀.₅'s prompt with the state as text; otherwise π₀'s.
        max_token_len: L; None: the prompt's own length, neither padded nor cut.
        prompt_format: of π₀'s prompt; "openpi": the cleaned text, then a newline that is tokenized by itself;
            "lerobot": the text as it is, with a newline at its end, as one text. π₀.₅'s is the same for both.
        truncation: what happens to a prompt that is too long. "instruction": the instruction loses words at its end
            (the last one letters) until state and ending fit behind it. "original": the tokens are cut at
            max_token_len as openpi does, which takes the state's end and "Action: " away from the model.
        warn: called with a message when something was cut; None: a UserWarning.

    Raises:
        ValueError: the prompt is no text; no state for a prompt that contains it; not even the empty instruction fits.
    """
    check_prompt_settings(prompt_format, truncation)
    text, pieces = _template(prompt, state, discrete_state_input, prompt_format)

    def encode(instruction: str) -> list[int]:
        first, *others = pieces(instruction)
        ids = tokenizer.encode(first, add_bos=True)
        return ids + [i for piece in others for i in tokenizer.encode(piece, add_bos=False)]

    ids = encode(text)
    if max_token_len is None:
        return np.array(ids, np.int64), np.ones(len(ids), bool)
    if len(ids) > max_token_len:
        needed = len(ids)
        if truncation == "original":
            ids, kept = ids[:max_token_len], "its end is cut, with it the state or the ending"
        else:
            ids, shortened = _shorten(text, encode, max_token_len)
            kept = f"the instruction is shortened to {shortened!r}"
        shown = text if len(text) <= 200 else f"{text[:200]}…"
        message = f"A prompt has {needed} tokens, but max_token_len is {max_token_len}: {kept}. It began as {shown!r}."
        (warn or partial(warnings.warn, stacklevel=2))(message)
    tokens = np.zeros(max_token_len, np.int64)
    tokens[: len(ids)] = ids
    return tokens, np.arange(max_token_len) < len(ids)


def _shorten(text: str, encode: Callable[[str], list[int]], max_token_len: int) -> tuple[list[int], str]:
    """The longest beginning of the text that fits, in whole words if at least one does, and its ids."""
    if (least := len(encode(""))) > max_token_len:
        raise TransformError(
            f"max_token_len {max_token_len} is too small: without any instruction the prompt has {least} tokens. "
            "Use the max_token_len that the policy was trained with."
        )
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    end = _longest([0, *ends], lambda e: len(encode(text[:e])) <= max_token_len)
    if end == 0 and ends:
        end = _longest(range(ends[0]), lambda e: len(encode(text[:e])) <= max_token_len)
    return encode(text[:end]), text[:end]


def _longest(ends: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The last entry that fits; the first one does.

    Bisection, because a prompt may be of any length. A longer text can have a token less ("pu" against "put"), so it
    also looks a few entries further.
    """
    i = bisect.bisect_right(ends, False, lo=1, key=lambda end: not fits(end)) - 1
    ahead = [j for j in range(i + 1, min(i + 17, len(ends))) if fits(ends[j])]
    return ends[max([i, *ahead])]
