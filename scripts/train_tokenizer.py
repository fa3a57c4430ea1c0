"""Train the small SentencePiece tokenizer of the `tiny` preset: src/torchpi/assets/tiny_tokenizer.model.

    python scripts/train_tokenizer.py

The corpus is tokenizer_corpus.txt (one instruction per line), once unchanged and once in π₀.₅'s prompt with made-up
states that contain every integer from -1 to 255 equally often, so that each becomes one token. Special ids and options
are PaliGemma's. The same release of sentencepiece gives the same file, byte for byte.
"""

import io
from pathlib import Path

import numpy as np
import sentencepiece

CORPUS = Path(__file__).with_name("tokenizer_corpus.txt")
MODEL = Path(__file__).parents[1] / "src" / "torchpi" / "assets" / "tiny_tokenizer.model"
VOCAB_SIZE = 1024
STATE_DIM = 8
NUM_STATE_ROUNDS = 12  # occurrences of each integer, enough for it to become one piece


def sentences() -> list[str]:
    instructions = CORPUS.read_text().splitlines()
    rng = np.random.default_rng(0)
    integers = np.concatenate([rng.permutation(np.arange(-1, 256)) for _ in range(NUM_STATE_ROUNDS)])
    prompts = [
        f"Task: {instructions[i % len(instructions)]}, State: {' '.join(map(str, integers[start : start + STATE_DIM]))}"
        for i, start in enumerate(range(0, len(integers), STATE_DIM))
    ]
    # ";\nAction: " is learned separately from the state, so that ";" never merges with the preceding integer.
    return [*instructions, *prompts, *[";", "Action: "] * len(prompts)]


def train() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        byte_fallback=True,
        character_coverage=1.0,
        user_defined_symbols=["\n"],
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


if __name__ == "__main__":
    MODEL.parent.mkdir(parents=True, exist_ok=True)
    MODEL.write_bytes(train())
    print(f"{MODEL}: {MODEL.stat().st_size} bytes")
