"""Instructions by task: many wordings to train on, and some that training never sees; the fixed ones are the core's.

The banks were composed from sentence patterns written for this project; `extend` adds to them.
"""

import re
from pathlib import Path

from ipadapter_instruct_core.tasks import Task

BANK = Path(__file__).parent / "bank"
UNSEEN = BANK / "unseen"  # 50 a task for tests, never trained on

# Each task's own words; no other task's instructions hold them (paper, Sec. 3.4, where a face is an identity too).
KEYWORDS: dict[Task, tuple[str, ...]] = {
    Task.EVERYTHING: ("everything",),
    Task.STYLE: ("style",),
    Task.COMPOSITION: ("composition",),
    Task.OBJECT: ("object",),
    Task.FACE: ("face", "identity"),
}
_FORMS = {  # the keywords with their inflections and derivations, as whole words
    "everything": r"everything",
    "style": r"(re)?styl(es?|ed|ing|ish\w*|ist\w*|i[sz]\w*)",
    "composition": r"(re)?compos(e[sd]?|ing|ition\w*)",
    "object": r"objects?",
    "face": r"faces?|faced|facing|facial\w*",
    "identity": r"identit(y|ies)",
}
_PLURALS = {"people", "men", "women", "children", "teeth", "feet", "mice", "geese", "skis", "taxis"}
_SINGULARS_IN_S = {"lens", "canvas", "gas", "atlas"}
_TO_PLURAL = {"this": "these", "that": "those", "is": "are", "was": "were", "has": "have", "a": "", "an": ""}


def load(task: Task, folder: Path | None = None) -> list[str]:
    """The wordings of one task, in the file's order, from our bank or from another ``folder`` of ``{task}.txt``.

    Raises:
        ValueError: the folder has no such file, or there is nothing in it.
    """
    path = (folder or BANK) / f"{task.value}.txt"
    try:
        phrases = [line.strip() for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The instructions {path} cannot be read ({error}); write them there, one a line.") from error
    if not phrases:
        raise ValueError(f"{path} holds no instruction; write some there, one a line.")
    return phrases


def load_bank(folder: Path | None = None) -> dict[Task, list[str]]:
    """The wordings of the paper's five tasks; raises what `load` raises."""
    return {task: load(task, folder) for task in KEYWORDS}


def keeps_to_its_task(task: Task, phrase: str) -> bool:
    """Whether the phrase holds no keyword of another task, in any of its forms."""
    others = "|".join(_FORMS[word] for other, words in KEYWORDS.items() if other is not task for word in words)
    return not re.search(rf"\b({others})\b", phrase, re.IGNORECASE)


def plain(phrase: str) -> str:
    """The phrase without case and punctuation, by which two are told to be the same."""
    return " ".join(re.findall(r"\w+", phrase.lower().replace("'", "").replace("’", "")))


def with_subject(phrase: str, subject: str) -> str:
    """An object phrase that names its ``subject`` where it said "object" (paper, Sec. 3.4), with its grammar mended.

    "an object" becomes "a dog", "this object is" becomes "these skis are". Without a subject nothing changes.
    """
    noun = re.sub(r"^(an?|the)\s+", "", subject.strip(), flags=re.IGNORECASE)
    if not noun:
        return phrase
    plural = _is_plural(noun)

    def put(match: re.Match[str]) -> str:
        before, word, owner, after = match["before"] or "", match["word"], match["owner"] or "", match["after"] or ""
        article = before.strip().lower()
        if plural and article in _TO_PLURAL:
            before = f"{_TO_PLURAL[article]} ".lstrip()
        elif article in ("a", "an"):
            before = f"{'an' if _starts_with_a_vowel(noun) else 'a'} "
        if plural and owner:
            owner = "'" if noun.endswith("s") else "'s"
        if plural and after:
            after = f" {_TO_PLURAL[after.strip()]}"
        words = f"{before}{noun}{owner}{after}"
        return words[0].upper() + words[1:] if (match["before"] or word)[0].isupper() else words

    return re.sub(
        r"(?P<before>\b(?:an?|this|that)\s+)?\b(?P<word>object)(?P<owner>['’]s)?\b(?P<after> (?:is|was|has)\b)?",
        put,
        phrase,
        flags=re.IGNORECASE,
    )


def _is_plural(noun: str) -> bool:
    head = noun.lower().split(" of ")[0].split()[-1]
    return head in _PLURALS or (head not in _SINGULARS_IN_S and re.search(r"[^siu]s$", head) is not None)


def _starts_with_a_vowel(noun: str) -> bool:
    sounds_like_you = re.match(r"(uni(?!n|m)|us[aeu]|ufo|ut[ei]|uk|eu|ewe|one\b|once\b)", noun, re.IGNORECASE)
    return not sounds_like_you and re.match(r"([aeiou]|hour|heir|honou?r|honest)", noun, re.IGNORECASE) is not None
