"""``builtin:toy-language``: sentences of simple English with their translation into an invented language.

The invented language has three genders. Articles, adjectives, demonstratives and past tenses agree with their noun in
gender and number, possessives too; adjectives follow the noun, prepositions follow theirs, the verb comes last, the
time first. Some English words have two translations, and what stands around them decides: ``bat`` (animal or club),
``bank``, ``letter``, ``spring``, ``light``, ``old``, ``know``, ``play``, ``run``. Looking every word up and keeping the
order is therefore mostly wrong. Nobody speaks this language, and quality on it is no evidence of quality on any other.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeVar

TRAIN, EVAL = 4000, 500

_T = TypeVar("_T")

_NOUNS = """
captain kapten m person      |queen regin f person        |child infan n person children
doctor medik m person        |sister soror f person       |woman femin f person women
farmer agrik m person        |witch strig f person        |baker panter m person
horse kaval m animal         |cat felis f animal          |goat kapr f animal
fox vulp f animal foxes      |dog kan m animal            |bird avis n animal
house kas f building         |shop tend f building        |school skol f building
castle kastel n building     |kitchen kuzin f building    |garden ort m nature
river fluv m nature          |forest silv f nature        |road vi f nature
book libr m thing            |table mens f thing          |box kist f thing boxes
apple pom n thing            |knife kotel m thing knives  |chair sedil f thing
lamp lukern f thing          |hat kapel m thing           |coat mantel n thing
flute flaut f instrument     |drum tambur m instrument    |violin violon n instrument
chess shak m game chess      |football pedibal n game     |machine makin f machine
engine motor m machine       |clock orol n machine        |secret arkan n fact
answer respost f fact        |song kant m fact            |story fabul f fact
bat nokt m winged            |bat klab f club             |bank monet f vault
bank rip n shore             |letter kart f mail          |letter glif n sign
spring elast m coil          |spring font n well
"""
"""English, stem, gender, kind, and the English plural where it is irregular."""

_ACTIONS = """
see saw vid person,animal,thing,building,nature |find found trov thing,animal,fact,book
paint painted pint thing,building,nature,animal |buy bought kompr thing,club,machine,instrument
carry carried port thing,club,instrument        |feed fed nutr animal,winged
hear heard aud person,animal,winged,instrument  |help helped ayut person
know knew konosk person                         |know knew sap fact
enter entered entr building,vault               |rob robbed depred vault,building
reach reached ariv nature,shore,well            |follow followed seg shore,nature
write wrote skrib mail,fact                     |send sent mand mail,thing
carve carved tali sign,club                     |learn learned apren sign,fact
bend bent kurv coil,club                        |break broke romp coil,thing,machine
play played son instrument                      |play played lud game
love loved am person,animal,building            |clean cleaned pur building,vault,thing
"""
"""English, its past, stem, and the kinds of its object."""

_STATES = """
sleep slept dorm person,animal,winged |laugh laughed rid person   |wait waited atend person
run ran kor person,animal             |run ran funk machine       |fly flew vol winged
swim swam nat person,animal           |stop stopped halt machine  |sing sang kanor person
"""
"""English, its past, stem, and the kinds of its subject."""

_ADJECTIVES = """
small pik * |big grand * |new nov * |red rud * |strange alien * |beautiful bel *
hungry famel person,animal,winged |angry irat person,animal |tired fesat person,animal
old anzian person,animal,winged |old vetus building,thing,machine,instrument,club,vault,mail
light lev thing,instrument,club |light klar building,nature
heavy pesan thing,machine,club |broken rupt thing,machine,instrument,coil
"""
"""English, stem, and the kinds of noun that it goes with, ``*`` for all."""

_ENDINGS = {"m": ("", "i"), "f": ("a", "en"), "n": ("um", "or")}
_AGREEMENT = {"m": ("o", "oi"), "f": ("a", "ai"), "n": ("e", "ei")}
_ARTICLES = {"m": ("lo", "los"), "f": ("la", "las"), "n": ("le", "les")}
_PRONOUNS = (("he", "el", "m", 0), ("she", "ela", "f", 0), ("they", "eli", "m", 1), ("we", "noi", "m", 1))
_OBJECTS = (("him", "lom"), ("her", "lam"), ("them", "lim"))
_OWNERS = {"my": "me", "your": "tu"}
_PLACES = (("in", "nel"), ("near", "prox"), ("behind", "dreto"))
_ADVERBS = (("quickly", "rapte"), ("quietly", "tase"), ("often", "soven"), ("again", "denov"))
_TIMES = {"past": ("yesterday", "ieri"), "present": ("today", "odi"), "future": ("tomorrow", "demani")}
_LINKS = (("and", "e"), ("because", "kar"), ("but", "ma"))
_NUMBERS = (("two", "du"), ("three", "tri"), ("four", "kar"))


@dataclass(frozen=True)
class _Noun:
    """``english`` is singular and plural."""

    english: tuple[str, str]
    stem: str
    gender: str
    kind: str


@dataclass(frozen=True)
class _Verb:
    english: str
    past: str
    stem: str
    kinds: str


@dataclass(frozen=True)
class _Phrase:
    """A noun phrase in both languages; ``number`` is 0 for one, 1 for several."""

    english: str
    target: str
    gender: str
    number: int

    def agreeing(self, stem: str, tense: str) -> str:
        """The verb of which this is the subject, in the invented language."""
        if tense == "past":
            return f"{stem}il{_AGREEMENT[self.gender][self.number]}"
        return stem + {"present": ("e", "un"), "future": ("ara", "aran")}[tense][self.number]


def read(split: Literal["train", "eval"]) -> list[tuple[str, str]]:
    """The pairs of a split, always the same; no sentence is in both."""
    pairs = _all()
    return list(pairs[:TRAIN] if split == "train" else pairs[TRAIN:])


@cache
def _all() -> tuple[tuple[str, str], ...]:
    writer = _Writer(random.Random(20240517))
    pairs: dict[str, str] = {}
    while len(pairs) < TRAIN + EVAL:
        english, target = writer.sentence()
        pairs.setdefault(english, target)
    return tuple(pairs.items())


class _Writer:
    """Draws sentences. ``random()`` alone is promised to give the same numbers in every Python version."""

    def __init__(self, source: random.Random) -> None:
        self.source = source
        self.nouns = [_noun(*fields) for fields in _table(_NOUNS)]
        self.actions = [_Verb(*fields) for fields in _table(_ACTIONS)]
        self.states = [_Verb(*fields) for fields in _table(_STATES)]
        self.adjectives = _table(_ADJECTIVES)

    def chance(self, share: float) -> bool:
        return self.source.random() < share

    def draw(self, options: Sequence[_T]) -> _T:
        return options[int(self.source.random() * len(options))]

    def sentence(self) -> tuple[str, str]:
        if self.chance(0.15):
            english, target = self.clause(asked=True)
            return f"{english}?", f"ka {target}?"
        english, target = self.clause()
        if self.chance(0.12):
            other, foreign = self.clause()
            return f"when {other}, {english}.", f"kando {foreign}, {target}."
        if self.chance(0.15):
            link, bond = self.draw(_LINKS)
            other, foreign = self.clause()
            return f"{english} {link} {other}.", f"{target} {bond} {foreign}."
        return f"{english}.", f"{target}."

    def clause(self, asked: bool = False) -> tuple[str, str]:
        """English: subject, verb, object, place, manner, time. Target: time, subject, place, object, manner, verb."""
        tense = self.draw(("past", "present", "present", "future"))
        acting = self.chance(0.75)
        verb = self.draw(self.actions if acting else self.states)
        subject = self.subject("person" if acting else verb.kinds)
        said: list[str] = []
        first, middle, last = [], [], [subject.agreeing(verb.stem, tense)]
        if acting and "person" in verb.kinds and self.chance(0.2):
            english, clitic = self.draw(_OBJECTS)
            said.append(english)
            last.insert(0, clitic)
        elif acting:
            thing = self.phrase(verb.kinds)
            said.append(thing.english)
            middle.append(thing.target)
        if self.chance(0.25):
            english, target = self.draw(_PLACES)
            place = self.phrase("building,nature")
            said.append(f"{english} {place.english}")
            middle.insert(0, f"{place.target} {target}")
        if self.chance(0.2):
            english, target = self.draw(_ADVERBS)
            said.append(english)
            middle.append(target)
        negated = self.chance(0.2)
        if negated:
            last.insert(0, "non" if tense == "future" else "ne")
        if self.chance(0.25):
            english, target = _TIMES[tense]
            said.append(english)
            first.append(target)
        begin = _predicate(subject, verb, tense, asked, negated)
        return " ".join((begin, *said)), " ".join((*first, subject.target, *middle, *last))

    def subject(self, kinds: str) -> _Phrase:
        if "person" in kinds and self.chance(0.2):
            return _Phrase(*self.draw(_PRONOUNS))
        one = self.phrase(kinds)
        if not self.chance(0.12):
            return one
        other = self.phrase(kinds)
        gender = next(gender for gender in "mfn" if gender in (one.gender, other.gender))
        return _Phrase(f"{one.english} and {other.english}", f"{one.target} e {other.target}", gender, 1)

    def phrase(self, kinds: str) -> _Phrase:
        noun = self.draw([noun for noun in self.nouns if noun.kind in kinds.split(",")])
        if noun.kind == "game":
            return _Phrase(noun.english[0], noun.stem, noun.gender, 0)
        form = self.draw(("the", "the", "the", "a", "number", "many", "this", "my", "your"))
        number = int(form in ("number", "many") or (form != "a" and self.chance(0.35)))
        ending = _AGREEMENT[noun.gender][number]
        english = [noun.english[number]]
        target = [noun.stem + _ENDINGS[noun.gender][number]]
        if self.chance(0.4):
            name, stem, _ = self.draw(
                [entry for entry in self.adjectives if entry[2] == "*" or noun.kind in entry[2].split(",")]
            )
            english.insert(0, name)
            target.append(stem + ending)
        if form in ("the", "my", "your"):
            target.insert(0, _ARTICLES[noun.gender][number])
        if form == "number":
            form, word = self.draw(_NUMBERS)
            target.insert(0, word)
        elif form == "many":
            target.insert(0, f"mult{ending}")
        elif form == "a":
            form = "an" if english[0][0] in "aeiou" else "a"
        elif form == "this":
            form = ("this", "these")[number]
            target.append(f"kest{ending}")
        elif form != "the":
            target.append(_OWNERS[form] + ending)
        return _Phrase(" ".join((form, *english)), " ".join(target), noun.gender, number)


def _predicate(subject: _Phrase, verb: _Verb, tense: str, asked: bool, negated: bool) -> str:
    """Subject and verb in English."""
    does = "do" if subject.number else "does"
    auxiliary = {"past": "did", "present": does, "future": "will"}[tense]
    no = ["not"] if negated else []
    if asked:
        return " ".join((auxiliary, subject.english, *no, verb.english))
    if negated or tense == "future":
        return " ".join((subject.english, auxiliary, *no, verb.english))
    if tense == "past":
        return f"{subject.english} {verb.past}"
    return f"{subject.english} {verb.english if subject.number else _with_s(verb.english)}"


def _with_s(word: str) -> str:
    if word.endswith("y") and word[-2] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}es" if word.endswith(("s", "x", "ch", "sh")) else f"{word}s"


def _table(text: str) -> list[list[str]]:
    return [entry.split() for line in text.strip().splitlines() for entry in line.split("|")]


def _noun(english: str, stem: str, gender: str, kind: str, plural: str = "") -> _Noun:
    return _Noun((english, plural or _with_s(english)), stem, gender, kind)
