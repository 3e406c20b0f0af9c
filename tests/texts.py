"""A small model with a tokenizer, and documents of four kinds of words."""

import json
import random
import tempfile
from functools import cache
from pathlib import Path

from ep_engine.data.corpus import train_tokenizer
from tests.small_models import dense_folder

WORDS = (
    "river stream water lake rain flood boat bridge",
    "engine motor wheel brake gear piston road truck",
    "violin piano chord melody rhythm song choir flute",
    "bread flour butter oven sugar yeast cake dough",
)
VOCABULARY = 300


def write_documents(folder: Path, count: int = 80) -> Path:
    """Two files of documents; document n is of kind n % 4."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS[n % 4].split(), k=30)) for n in range(count)]
    half = count // 2
    for name, key, some in (("a.jsonl", "content", texts[:half]), ("b.jsonl", "text", texts[half:])):
        (folder / name).write_text("".join(json.dumps({key: text}) + "\n" for text in some))
    return folder


def add_tokenizer(model: Path) -> None:
    """Put a tokenizer of these words into a model's folder."""
    for name, content in _tokenizer_files().items():
        (model / name).write_bytes(content)


@cache
def _tokenizer_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer([*WORDS] * 3, VOCABULARY, Path(folder))
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def text_model(folder: Path) -> Path:
    """A dense model and its tokenizer in one folder."""
    source = dense_folder(folder / "model", vocab_size=VOCABULARY)
    add_tokenizer(source)
    return source
