"""Prompts: text, tokenizers, padding and truncation."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from torchpi.errors import TransformError
from torchpi.transforms import (
    HFTokenizer,
    SentencePieceTokenizer,
    clean_text,
    digitize_state,
    load_tokenizer,
    pi05_prompt_text,
    tokenize_prompt,
)
from torchpi.transforms.prompt import as_text

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer"
SPM_FILE = GOLDEN / "tiny_spm.model"
SPM = SentencePieceTokenizer(SPM_FILE)
CASES = json.loads((GOLDEN / "tokenizer.json").read_text())
STATE = np.array([0.0, -1.0, 1.0])
ENDING = ", State: 128 0 255;\nAction: "


# Text


def test_clean_text_strips_and_replaces():
    assert clean_text("  Pick_up the\nred_cube \n") == "Pick up the red cube"


def test_state_is_digitized_to_bins():
    below = np.nextafter(-1, -2)
    assert digitize_state(np.array([below, -1.0, 0.0, np.nextafter(1, 0), 1.0, 7.0])).tolist() == [
        -1,
        0,
        128,
        255,
        255,
        255,
    ]
    # In float32 the same number falls into the next bin: the state must not be cast first.
    edge = np.linspace(-1, 1, 257)[3]
    assert digitize_state(np.array([np.nextafter(edge, -1)])) == 2
    assert digitize_state(np.array([np.nextafter(edge, -1)], np.float32)) == 3


def test_pi05_prompt_text():
    assert pi05_prompt_text(" lift_it ", STATE) == f"Task: lift it{ENDING}"


@pytest.mark.parametrize(
    ("state", "message"), [(np.array([0, np.nan]), "NaN.*dimension 1"), (np.zeros((1, 2)), r"shape \[1, 2\]")]
)
def test_invalid_states_cannot_be_digitized(state, message):
    with pytest.raises(ValueError, match=message):
        digitize_state(state)


@pytest.mark.parametrize(
    "prompt", ["é ok", "é ok".encode(), np.str_("é ok"), np.array("é ok"), np.array("é ok".encode())]
)
def test_prompt_types_are_accepted(prompt):
    assert as_text(prompt) == "é ok"
    assert type(as_text(prompt)) is str


@pytest.mark.parametrize("prompt", [3, None, ["a"], np.array(["a"]), np.array(1.0), b"\xff"])
def test_invalid_prompts_are_errors(prompt):
    with pytest.raises(ValueError, match="prompt"):
        as_text(prompt)


# Tokenizers


@pytest.fixture(scope="module")
def hf_file(tmp_path_factory) -> Path:
    """Convert the SentencePiece model to a tokenizer.json, with byte-pair merges in the order of the scores."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(SPM_FILE))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    pieces[model.bos_id()] = "<bos>"
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(pieces, key=lambda piece: -model.get_score(vocab[piece]))
        for cut in range(1, len(piece))
        if not model.is_byte(vocab[piece]) and not model.is_control(vocab[piece])
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    tokenizer.add_special_tokens(["<pad>", "</s>", "<bos>", "<unk>"])
    # Padding and truncation settings in the file must be ignored.
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


TEXTS = [text for case in CASES for text, _ in case["encode_calls_text_addbos"]]


def test_both_tokenizers_agree(hf_file):
    hf = HFTokenizer(hf_file)
    assert hf.vocab_size == SPM.vocab_size == 512
    for text in TEXTS:
        for add_bos in (True, False):
            assert hf.encode(text, add_bos) == SPM.encode(text, add_bos)


def test_tokenizers_are_recognised_by_content(hf_file, tmp_path):
    shutil.copy(SPM_FILE, tmp_path / "a.json")
    shutil.copy(hf_file, tmp_path / "b.model")
    assert isinstance(load_tokenizer(tmp_path / "a.json"), SentencePieceTokenizer)
    assert isinstance(load_tokenizer(tmp_path / "b.model"), HFTokenizer)


def test_tokenizer_path_may_be_a_folder(hf_file, tmp_path):
    assert isinstance(load_tokenizer(hf_file.parent), HFTokenizer)
    assert isinstance(load_tokenizer(str(GOLDEN)), SentencePieceTokenizer)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model or tokenizer\.json"):
        load_tokenizer(tmp_path)
    for load in (load_tokenizer, SentencePieceTokenizer, HFTokenizer):
        with pytest.raises(FileNotFoundError, match="No tokenizer file"):
            load(tmp_path / "none.model")


@pytest.mark.parametrize(
    "content", [b"", b"garbage", SPM_FILE.read_bytes()[:-9], b'{"version": "1.0"}', b"{\xff", b"[]"]
)
def test_damaged_tokenizers_are_errors(content, tmp_path):
    file = tmp_path / "tokenizer"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="damaged") as error:
        load_tokenizer(file)
    assert str(file) in str(error.value)


def test_tokenizer_without_bos_is_an_error(tmp_path):
    file = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(file))
    with pytest.raises(ValueError, match="<bos>"):
        load_tokenizer(file)


# Prompts


def tokenize(prompt, state=None, *, max_token_len=None, **options):
    return tokenize_prompt(
        SPM, prompt, state, discrete_state_input=state is not None, max_token_len=max_token_len, **options
    )


def test_prompt_without_max_token_len_is_neither_padded_nor_cut():
    tokens, mask = tokenize("lift it " * 100)
    assert tokens.tolist() == SPM.encode(("lift it " * 100).strip(), True) + SPM.encode("\n", False)
    assert mask.all()


def test_short_prompt_is_padded():
    tokens, mask = tokenize("lift it", STATE, max_token_len=60)
    expected = SPM.encode(f"Task: lift it{ENDING}", True)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == expected + [0] * (60 - len(expected))
    assert mask.tolist() == [True] * len(expected) + [False] * (60 - len(expected))


def longest(text: str, encode, limit: int) -> str:
    """Compute the expected shortening: whole words, or letters of the first word."""
    words = text.split(" ")
    fitting = [" ".join(words[:n]) for n in range(1, len(words) + 1) if len(encode(" ".join(words[:n]))) <= limit]
    return (
        fitting[-1]
        if fitting
        else max((words[0][:n] for n in range(len(words[0])) if len(encode(words[0][:n])) <= limit), key=len)
    )


@settings(deadline=None)
@given(
    words=st.lists(
        st.sampled_from(["put", "the", "blue", "bowl", "unbelievable", "▁", "☃☃", "a"]), min_size=1, max_size=12
    ),
    limit=st.integers(0, 45),
    with_state=st.booleans(),
)
def test_shortening_keeps_state_and_ending(words, limit, with_state):
    def encode(text: str) -> list[int]:
        if with_state:
            return SPM.encode(f"Task: {text}{ENDING}", True)
        return SPM.encode(text, True) + SPM.encode("\n", False)

    text, messages = clean_text(" ".join(words)), []
    if len(encode("")) > limit:
        with pytest.raises(ValueError, match=f"max_token_len {limit} is too small.*{len(encode(''))} tokens"):
            tokenize(text, STATE if with_state else None, max_token_len=limit)
        return
    tokens, mask = tokenize(text, STATE if with_state else None, max_token_len=limit, warn=messages.append)
    expected = encode(longest(text, encode, limit))
    assert tokens[mask].tolist() == expected
    assert len(tokens) == limit
    assert len(messages) == (len(encode(text)) > limit)


def test_shortening_a_prompt_warns():
    with pytest.warns(UserWarning, match="max_token_len is 30: the instruction is shortened to 'put the") as caught:
        tokenize("put the blue bowl in the sink " * 5, STATE, max_token_len=30)
    assert len(caught) == 1


def test_very_long_prompt_takes_few_tokenizer_calls():
    class Counting:
        vocab_size, special_tokens, calls = 512, SPM.special_tokens, 0

        def encode(self, text: str, add_bos: bool) -> list[int]:
            self.calls += 1
            return SPM.encode(text, add_bos)

    tokenizer = Counting()
    tokenize_prompt(
        tokenizer, "put it " * 5000, None, discrete_state_input=False, max_token_len=48, warn=lambda message: None
    )
    assert tokenizer.calls < 100


def test_original_truncation_cuts_the_end():
    text = "put the blue bowl in the sink " * 5
    with pytest.warns(UserWarning, match="its end is cut"):
        tokens, mask = tokenize(text, STATE, max_token_len=30, truncation="original")
    assert tokens.tolist() == SPM.encode(f"Task: {clean_text(text)}{ENDING}", True)[:30]
    assert mask.all()


def test_fitting_prompt_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize("", max_token_len=2)  # an empty text is fine


def test_invalid_prompt_settings_are_errors():
    with pytest.raises(ValueError, match="contains the state"):
        tokenize_prompt(SPM, "a", None, discrete_state_input=True, max_token_len=None)
    with pytest.raises(ValueError, match=r"'middle'.*instruction, original"):
        tokenize("a", truncation="middle")
    with pytest.raises(ValueError, match="prompt is of type int"):
        tokenize(3)


@pytest.mark.filterwarnings("ignore")
def test_endless_tokenizer_pattern_is_an_error(tmp_path, capfd):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    slow = Tokenizer(models.WordLevel({"<bos>": 0, "a": 1}, unk_token="a"))
    slow.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "removed")
    slow.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a", add_bos=True) == [0]
    with pytest.raises(TransformError, match=r"tokenizer\.json fails at 'aaaa.*: Onig"):
        tokenizer.encode("a" * 60 + "b", add_bos=True)
    capfd.readouterr()
