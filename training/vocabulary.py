"""What the captions of a training have in common: their words, if they are few, and what all have.

scripts/encode_tokens.py writes vocabulary.json beside the token shards. sample.py says what a
prompt has that no caption had, or lacks that every caption had: such a prompt gives a poor image,
and nothing else shows why.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data.files import write_json
from training.loading import read_run_config

VOCABULARY_FILE = "vocabulary.json"
MAX_WORDS = 10_000  # captions of more words are free text
WORD = re.compile(r"\w+|[^\w\s]")  # a punctuation mark counts as a word


@dataclass(frozen=True)
class Vocabulary:
    """Words of captions, lower case and sorted."""

    example: str  # a caption; "": there is none
    common: list[str]  # words that every caption has
    words: list[str] | None  # all words; None: more than MAX_WORDS

    def difference(self, prompt: str) -> str:
        """How a prompt differs from all captions, "" if it does not."""
        words = split_words(prompt)
        unknown = words - {*self.words} if self.words is not None else set()
        lacking = {*self.common} - words
        remarks = []
        if unknown:
            remarks.append(f"no caption of the training has {quote(unknown)}")
        if lacking:
            remarks.append(
                f"every caption of the training has {quote(lacking)}, like {self.example!r}"
            )
        return "; ".join(remarks)


def split_words(text: str) -> set[str]:
    """Words and punctuation marks of a text."""
    return {*WORD.findall(text.lower())}


def quote(words: Iterable[str]) -> str:
    """Words in a message."""
    return ", ".join(repr(word) for word in sorted(words))


def measure_vocabulary(captions: Iterable[str]) -> Vocabulary:
    """The vocabulary of some captions."""
    example, common, words = "", set(), set()
    for caption in captions:
        found = split_words(caption)
        common = common & found if example else found
        words |= found
        example = example or caption
    return Vocabulary(example, sorted(common), limit(words))


def join_vocabularies(parts: Sequence[Vocabulary]) -> Vocabulary:
    """The vocabulary of all captions together."""
    parts = [part for part in parts if part.example]
    if not parts:
        return Vocabulary("", [], [])
    common = set.intersection(*({*part.common} for part in parts))
    is_free = any(part.words is None for part in parts)
    words = None if is_free else limit({word for part in parts for word in part.words})
    return Vocabulary(parts[0].example, sorted(common), words)


def limit(words: set[str]) -> list[str] | None:
    """Sorted words; None for too many."""
    return sorted(words) if len(words) <= MAX_WORDS else None


def save_vocabulary(vocabulary: Vocabulary, folder: Path) -> None:
    """Write it into a folder of token shards."""
    write_json(asdict(vocabulary), folder / VOCABULARY_FILE)


def find_vocabulary(flow_dir: Path) -> Vocabulary | None:
    """The vocabulary of a stage-3 run's captions; None if it is not known.

    It lies beside the token shards, where the run's config has them or, if the experiment was
    moved, beside the run.
    """
    data = read_run_config(flow_dir).get("data") or {}
    sources = [*data.get("sources", {}).values()] or [data]
    folders = {Path(pattern).parent for source in sources for pattern in source.get("shards", [])}
    files = [find_file(folder, flow_dir.parent) for folder in sorted(folders)]
    if not files or not all(files):
        return None
    return join_vocabularies([Vocabulary(**json.loads(file.read_text())) for file in files])


def find_file(folder: Path, experiment: Path) -> Path | None:
    """The file of a folder of token shards, or of one of the same name in an experiment."""
    files = [place / VOCABULARY_FILE for place in (folder, experiment / folder.name)]
    return next((file for file in files if file.is_file()), None)
