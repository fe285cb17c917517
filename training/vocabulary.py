"""The captions of a training and their words, where these are few, and the words that all have.

scripts/encode_tokens.py writes vocabulary.json beside the token shards. sample.py says what a
prompt has that no caption had, or lacks that every caption had: such a prompt gives a poor image,
and nothing else shows why. How many prompts are captions themselves is said as well, since their
images may be recalled ones.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from omegaconf import OmegaConf

from data.config import ReaderConfig
from data.files import write_json
from training.loading import read_run_config, structured

VOCABULARY_FILE = "vocabulary.json"
MAX_WORDS = 10_000  # captions of more words are free text; so many captions are listed at most
WORD = re.compile(r"\w+|[^\w\s]")  # a punctuation mark counts as a word


@dataclass(frozen=True)
class Vocabulary:
    """Words of captions, lower case and sorted."""

    example: str  # a caption; "": there is none
    common: list[str]  # words that every caption has
    words: list[str] | None  # all words; None: more than MAX_WORDS
    captions: list[str] | None = None  # all in one form; None: more than MAX_WORDS, or not known

    def difference(self, prompt: str) -> str:
        """How a prompt differs from all captions, "" if it does not."""
        words = split_words(prompt)
        remarks = []
        if self.words is not None and (unknown := words - {*self.words}):
            remarks.append(f"no caption of the training has {quote(unknown)}")
        if lacking := {*self.common} - words:
            remarks.append(
                f"every caption of the training has {quote(lacking)}, like {self.example!r}"
            )
        return "; ".join(remarks)


def one_form(caption: str) -> str:
    """The same for captions that the text tower takes for equal."""
    return " ".join(caption.lower().split())


def split_words(text: str) -> set[str]:
    return {*WORD.findall(text.lower())}


def quote(words: Iterable[str]) -> str:
    return ", ".join(repr(word) for word in sorted(words))


def measure_vocabulary(captions: Iterable[str]) -> Vocabulary:
    """The vocabulary of some captions."""
    example, common, words, different = "", set(), set(), set()
    for caption in captions:
        found = split_words(caption)
        common = common & found if example else found
        words |= found
        different.add(one_form(caption))
        example = example or caption
    return Vocabulary(example, sorted(common), limit(words), limit(different))


def join_vocabularies(parts: Sequence[Vocabulary]) -> Vocabulary:
    """The vocabulary of all captions together."""
    # A part without captions would leave no word in common.
    parts = [part for part in parts if part.example]
    if not parts:
        return Vocabulary("", [], [], [])
    common = set.intersection(*({*part.common} for part in parts))
    words = join_lists([part.words for part in parts])
    captions = join_lists([part.captions for part in parts])
    return Vocabulary(parts[0].example, sorted(common), words, captions)


def join_lists(lists: Sequence[list[str] | None]) -> list[str] | None:
    """What is in any of the lists; None if one is not known, or for too many."""
    return None if None in lists else limit({text for each in lists for text in each})


def limit(texts: set[str]) -> list[str] | None:
    """Sorted texts; None for too many."""
    return sorted(texts) if len(texts) <= MAX_WORDS else None


def save_vocabulary(vocabulary: Vocabulary, folder: Path) -> None:
    """Write it into a folder of token shards."""
    write_json(asdict(vocabulary), folder / VOCABULARY_FILE)


def find_vocabulary(flow_dir: Path) -> Vocabulary | None:
    """The vocabulary of a stage-3 run's captions; None if it is not where it should be."""
    # Which folders of token shards the run has read. Converted weights have read unknown ones, and
    # captions that are others in each epoch are taken for free text.
    config = read_run_config(flow_dir)
    shared = [field.name for field in fields(ReaderConfig)]  # by what reads tokens and images
    section = OmegaConf.masked_copy(config.get("data") or OmegaConf.create(), shared)
    data: ReaderConfig = OmegaConf.to_object(OmegaConf.merge(structured(ReaderConfig), section))
    folders = {Path(pattern).parent for pattern in data.all_shards()}
    if not folders or data.has_several_captions():
        return Vocabulary("", [], None)
    # They lie where the config has them or, if the experiment was moved, beside the run.
    parts = []
    for folder in sorted(folders):
        places = (folder / VOCABULARY_FILE, flow_dir.parent / folder.name / VOCABULARY_FILE)
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            return None
        parts.append(Vocabulary(**json.loads(file.read_text())))
    # Weights that began as another run's know the words of that one, too.
    joined = join_vocabularies(parts)
    return replace(joined, common=[], words=None) if config.get("init_from") else joined
