"""BLEU-4, METEOR, ROUGE-L, CIDEr and SPICE of captions, by pycocoevalcap; times 100, as papers print them.

Published numbers need Java: for the PTB tokenizer, METEOR and SPICE. Without it, captions are tokenized by a regular
expression, which gives other numbers (the report says which tokenizer it was), and METEOR and SPICE are null with the
reason. SPICE also needs Stanford's CoreNLP 3.6.0 models, which its package does not have and nothing here downloads.
CIDEr weighs words by how rare they are in the references given: only numbers on the same set can be compared.
"""

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

PTB, SIMPLE = "PTB (Stanford CoreNLP 3.4.1)", "regular expression (not that of published numbers)"
PTB_COMMAND = ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
WORD = re.compile(r"\w+(?:['-]\w+)*")
NAMES = ("bleu_4", "meteor", "rouge_l", "cider", "spice")
PACKAGE = "pycocoevalcap"
NO_PACKAGE = f"{PACKAGE} is not installed (requirements-eval.txt)"
SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
FETCH_MODELS = (
    "from pycocoevalcap.spice.get_stanford_models import get_stanford_models as get; get()"
)

Texts = dict[int, list[str]]  # of each image, tokens with spaces between


def package_folder() -> Path | None:
    """Where pycocoevalcap is installed, or None."""
    spec = find_spec(PACKAGE)
    return Path(next(iter(spec.submodule_search_locations))) if spec else None


class CaptionScorer:
    """Scores captions of some images against the same references again and again.

    `tokenizer` says how texts are split, and `tokenizer_reason` why not by PTB, if so.
    """

    def __init__(self, references: Sequence[Sequence[str]]):
        self.folder = package_folder()
        try:
            self.references = self.ptb(references)
            self.tokenizer, self.tokenizer_reason = PTB, None
        except (OSError, ValueError) as error:
            self.references = simple_tokens(references)
            self.tokenizer, self.tokenizer_reason = SIMPLE, str(error)

    def ptb(self, texts: Sequence[Sequence[str]]) -> Texts:
        """Texts of each image, split as the COCO caption evaluation does it, without punctuation.

        Raises:
            ValueError, OSError: it can't run, and why.
        """
        if self.folder is None:
            raise ValueError(NO_PACKAGE)
        if shutil.which("java") is None:
            raise ValueError("there is no Java on this machine")
        from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR

        lines = [" ".join(text.split()) for group in texts for text in group]
        jar = self.folder / "tokenizer" / STANFORD_CORENLP_3_4_1_JAR
        run = subprocess.run(
            ["java", "-cp", str(jar), *PTB_COMMAND],
            input="\n".join(lines).encode() + b"\n",
            capture_output=True,
        )
        found = run.stdout.decode().split("\n")[:-1]
        if run.returncode or len(found) != len(lines):
            last = (run.stderr.decode(errors="replace").strip().splitlines() or ["nothing"])[-1]
            raise ValueError(
                f"the PTB tokenizer gave {len(found)} lines for {len(lines)}; it said: {last}"
            )
        tokens = iter(
            " ".join(word for word in line.split() if word not in PUNCTUATIONS) for line in found
        )
        return {index: [next(tokens) for _ in group] for index, group in enumerate(texts)}

    def score(self, captions: Sequence[str]) -> dict:
        """{"bleu_4" ... "spice": number or None, "reasons": {name: why None}} of one caption an image."""
        single = [[caption] for caption in captions]
        texts = self.ptb(single) if self.tokenizer == PTB else simple_tokens(single)
        scores, reasons = {}, {}
        for name in NAMES:
            try:
                scores[name] = 100 * self.measure(name)(self.references, texts)
            except (OSError, ValueError, subprocess.CalledProcessError) as error:
                scores[name], reasons[name] = None, str(error) or type(error).__name__
        return scores | {"reasons": reasons}

    def measure(self, name: str) -> Callable[[Texts, Texts], float]:
        """The metric's function of (references, captions).

        Raises:
            ValueError: it can't run here, and why.
        """
        if self.folder is None:
            raise ValueError(NO_PACKAGE)
        if name in ("meteor", "spice") and shutil.which("java") is None:
            raise ValueError("there is no Java on this machine")
        absent = [
            file for file in SPICE_MODELS if not (self.folder / "spice" / "lib" / file).is_file()
        ]
        if name == "spice" and absent:
            raise ValueError(
                f'{" and ".join(absent)} not in {PACKAGE}; to fetch them: python -c "{FETCH_MODELS}"'
            )
        return {
            "bleu_4": bleu_4,
            "meteor": meteor,
            "rouge_l": rouge_l,
            "cider": cider,
            "spice": spice,
        }[name]


def simple_tokens(texts: Sequence[Sequence[str]]) -> Texts:
    """Lower-case words without punctuation."""
    return {
        index: [" ".join(WORD.findall(text.lower())) for text in group]
        for index, group in enumerate(texts)
    }


def bleu_4(references: Texts, captions: Texts) -> float:
    """BLEU of 1- to 4-grams over all captions, closest reference length."""
    from pycocoevalcap.bleu.bleu import Bleu

    return float(Bleu(4).compute_score(references, captions, verbose=0)[0][3])


def meteor(references: Texts, captions: Texts) -> float:
    """METEOR 1.5; a Java process."""
    from pycocoevalcap.meteor.meteor import Meteor

    return float(Meteor().compute_score(references, captions)[0])


def rouge_l(references: Texts, captions: Texts) -> float:
    """ROUGE-L, mean over images."""
    from pycocoevalcap.rouge.rouge import Rouge

    return float(Rouge().compute_score(references, captions)[0])


def cider(references: Texts, captions: Texts) -> float:
    """CIDEr(-D), mean over images."""
    from pycocoevalcap.cider.cider import Cider

    return float(Cider().compute_score(references, captions)[0])


def spice(references: Texts, captions: Texts) -> float:
    """SPICE; a Java process, made for Java 8 or 11."""
    from pycocoevalcap.spice.spice import Spice

    return float(Spice().compute_score(references, captions)[0])
