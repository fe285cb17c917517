"""BLEU-4, METEOR, ROUGE-L, CIDEr, SPICE by pycocoevalcap; times 100, as papers print them.

Published numbers need Java: for the PTB tokenizer, METEOR and SPICE. Without it, captions are
tokenized by a regular expression, which gives other numbers (the report says which tokenizer it
was), and METEOR and SPICE are null with the reason. SPICE also needs Stanford's CoreNLP 3.6.0
models, which its package does not have and nothing here downloads. CIDEr weighs words by how rare
they are in the given references: only numbers on the same set can be compared.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

PTB, SIMPLE = "PTB (Stanford CoreNLP 3.4.1)", "regular expression (not that of published numbers)"
PTB_COMMAND = ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
WORD = re.compile(r"\w+(?:['-]\w+)*")
SCORERS = {  # of pycocoevalcap: module and class; each scores the whole set
    "bleu_4": ("bleu.bleu", "Bleu"),
    "meteor": ("meteor.meteor", "Meteor"),
    "rouge_l": ("rouge.rouge", "Rouge"),
    "cider": ("cider.cider", "Cider"),
    "spice": ("spice.spice", "Spice"),
}
PACKAGE = "pycocoevalcap"
NO_PACKAGE = f"{PACKAGE} is not installed (requirements-eval.txt)"
NO_JAVA = "there is no Java on this machine"
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

    `tokenizer` says how texts are split, `tokenizer_reason` why not by PTB.
    """

    def __init__(self, references: Sequence[Sequence[str]]):
        self.folder = package_folder()
        try:
            self.references = self.ptb_tokens(references)
            self.tokenizer, self.tokenizer_reason = PTB, None
        except (OSError, ValueError) as error:
            self.references = simple_tokens(references)
            self.tokenizer, self.tokenizer_reason = SIMPLE, str(error)

    def ptb_tokens(self, texts: Sequence[Sequence[str]]) -> Texts:
        """Texts of each image, split as the COCO caption evaluation does, without punctuation.

        Raises:
            ValueError, OSError: it can't run, and why.
        """
        self.check_installed(needs_java=True)
        tokenizer = import_module(f"{PACKAGE}.tokenizer.ptbtokenizer")
        # One text a line, in and out; the package's own wrapper writes into site-packages
        lines = [" ".join(text.split()) for group in texts for text in group]
        jar = self.folder / "tokenizer" / tokenizer.STANFORD_CORENLP_3_4_1_JAR
        run = subprocess.run(
            ["java", "-cp", str(jar), *PTB_COMMAND],
            input="\n".join(lines).encode() + b"\n",
            capture_output=True,
        )
        found = run.stdout.decode().split("\n")[:-1]
        if run.returncode or len(found) != len(lines):
            said = (run.stderr.decode(errors="replace").strip().splitlines() or ["nothing"])[-1]
            raise ValueError(f"the PTB tokenizer gave {len(found)} of {len(lines)} lines: {said}")
        # Words without punctuation, back to their images
        words = ([w for w in line.split() if w not in tokenizer.PUNCTUATIONS] for line in found)
        tokens = iter(" ".join(line) for line in words)
        return {index: [next(tokens) for _ in group] for index, group in enumerate(texts)}

    def score(self, captions: Sequence[str]) -> dict:
        """{"bleu_4" ... "spice": number or None, "reasons": {name: why}} of a caption an image."""
        single = [[caption] for caption in captions]
        texts = self.ptb_tokens(single) if self.tokenizer == PTB else simple_tokens(single)
        scores, reasons = {}, {}
        for name in SCORERS:
            try:
                scores[name] = 100 * self.score_one(name, texts)
            except (OSError, ValueError, subprocess.CalledProcessError) as error:
                scores[name], reasons[name] = None, str(error) or type(error).__name__
        return scores | {"reasons": reasons}

    def score_one(self, name: str, texts: Texts) -> float:
        """One metric of the captions.

        Raises:
            ValueError: it can't run here, and why.
        """
        self.check_installed(needs_java=name in ("meteor", "spice"))
        library = self.folder / "spice" / "lib"
        absent = [file for file in SPICE_MODELS if not (library / file).is_file()]
        if name == "spice" and absent:
            files = " and ".join(absent)
            raise ValueError(f'{files} not in {PACKAGE}; to fetch: python -c "{FETCH_MODELS}"')
        module, kind = SCORERS[name]
        scorer = getattr(import_module(f"{PACKAGE}.{module}"), kind)()
        # BLEU gives a list, of 1- to 4-grams
        if name == "bleu_4":
            return float(scorer.compute_score(self.references, texts, verbose=0)[0][3])
        return float(scorer.compute_score(self.references, texts)[0])

    def check_installed(self, needs_java: bool) -> None:
        """ValueError without the package, or without Java where it is needed."""
        if self.folder is None:
            raise ValueError(NO_PACKAGE)
        if needs_java and shutil.which("java") is None:
            raise ValueError(NO_JAVA)


def simple_tokens(texts: Sequence[Sequence[str]]) -> Texts:
    """Lower-case words without punctuation."""
    return {
        index: [" ".join(WORD.findall(text.lower())) for text in group]
        for index, group in enumerate(texts)
    }
