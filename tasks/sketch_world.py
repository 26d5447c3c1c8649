"""The small world of the generated suite: its words, what they mean to one another, its events and their sentences.

Everything is drawn from a `random.Random`, so that a seed fixes it. The tasks that are built on this world are in `sketch.py`,
the running text that the embedded T5 is pretrained on in `sketch_text.py`, its exercises in `sketch_exercises.py`.
"""

import dataclasses
import random
from typing import Any

NAMES = (
    "anna ben carla david emma frank grace henry irene jack karen leo maria nick olga peter rosa simon tina victor wendy adam "
    "bella carl diana eric fiona george hanna ivan julia kevin laura martin nora oscar paula ralph sara tom"
).split()

CATEGORIES = {
    "bird": "robin sparrow crow eagle duck owl swan goose".split(),
    "fish": "trout salmon shark carp herring eel".split(),
    "fruit": "apple pear plum peach cherry lemon melon fig".split(),
    "vegetable": "carrot onion potato cabbage turnip leek".split(),
    "tool": "hammer saw axe spade drill shovel".split(),
    "vehicle": "car bus truck bike van tractor".split(),
    "furniture": "chair table bed shelf desk sofa".split(),
    "garment": "coat hat shirt dress scarf jacket".split(),
    "instrument": "piano guitar violin drum flute trumpet".split(),
    "container": "box bag basket bucket jar barrel".split(),
    "jewel": "necklace crown bracelet brooch earring".split(),
    "toy": "doll kite puzzle marble puppet".split(),
}
HYPERNYM = {noun: category for category, nouns in CATEGORIES.items() for noun in nouns}
NOUNS = sorted(HYPERNYM)

PLACES = (
    "kitchen garden market school station park library forest beach farm museum hotel church office hospital castle village "
    "harbour theatre bakery"
).split()
TIMES = (
    "on monday,on tuesday,on wednesday,on thursday,on friday,on saturday,on sunday,in the morning,at noon,in the evening,"
    "at night,last week,yesterday,in spring,in autumn"
).split(",")

# Properties: within an axis the groups exclude one another; the words of a group mean the same.
PROPERTIES = {
    "size": (("big", "large"), ("small", "little")),
    "age": (("old", "ancient"), ("new", "modern")),
    "colour": (("red",), ("blue",), ("green",), ("white",), ("black",), ("yellow",)),
    "look": (("pretty", "beautiful"), ("ugly", "hideous")),
    "price": (("cheap", "inexpensive"), ("costly", "expensive")),
}
AXIS = {word: axis for axis, groups in PROPERTIES.items() for group in groups for word in group}
ADJECTIVES = sorted(AXIS)


@dataclasses.dataclass(frozen=True)
class Verb:
    """One verb: base form, past, participle, a verb of the same meaning and one that excludes it (base forms; "" = none)."""

    base: str
    past: str
    participle: str
    same: str
    opposite: str


def _verbs(table: str) -> dict[str, Verb]:
    return {row.split()[0]: Verb(*(word.strip("-") for word in row.split())) for row in table.strip().splitlines()}


# Things that people do with things …
THING_VERBS = _verbs("""
buy bought bought purchase sell
purchase purchased purchased buy sell
sell sold sold - buy
find found found discover lose
discover discovered discovered find lose
lose lost lost misplace find
misplace misplaced misplaced lose find
break broke broken smash repair
smash smashed smashed break repair
repair repaired repaired fix break
fix fixed fixed repair break
clean cleaned cleaned wash stain
wash washed washed clean stain
stain stained stained - clean
hide hid hidden conceal show
conceal concealed concealed hide show
show showed shown - hide
lift lifted lifted raise drop
raise raised raised lift drop
drop dropped dropped - lift
push pushed pushed shove pull
shove shoved shoved push pull
pull pulled pulled drag push
drag dragged dragged pull push
choose chose chosen pick refuse
pick picked picked choose refuse
refuse refused refused reject choose
reject rejected rejected refuse choose
throw threw thrown toss catch
toss tossed tossed throw catch
catch caught caught - throw
borrow borrowed borrowed - -
paint painted painted - -
draw drew drawn sketch -
sketch sketched sketched draw -
""")
# … and to one another.
PERSON_VERBS = _verbs("""
help helped helped assist hinder
assist assisted assisted help hinder
hinder hindered hindered - help
praise praised praised - blame
blame blamed blamed - praise
follow followed followed - -
chase chased chased pursue -
pursue pursued pursued chase -
teach taught taught instruct -
instruct instructed instructed teach -
warn warned warned - -
visit visited visited - avoid
avoid avoided avoided - visit
call called called phone -
phone phoned phoned call -
thank thanked thanked - -
trust trusted trusted - distrust
distrust distrusted distrusted - trust
beat beat beaten defeat -
defeat defeated defeated beat -
""")
VERBS = THING_VERBS | PERSON_VERBS


@dataclasses.dataclass(frozen=True)
class Event:
    """Who did (or did not do) what to whom or which thing, where and when; "" stands for what is not said."""

    agent: str
    verb: str
    object: str  # a noun, a category or a name
    adjective: str = ""
    place: str = ""
    time: str = ""
    negated: bool = False

    @property
    def about_person(self) -> bool:
        return self.verb in PERSON_VERBS


def tidy(text: str) -> str:
    """Ordinary spacing: the grammar joins words and marks with blanks."""
    for mark in ",.?;:":
        text = text.replace(f" {mark}", mark)
    return text


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def draw_event(rng: random.Random, *, agent: str = "", person: float = 0.2, detail: float = 0.6, negation: float = 0.0) -> Event:
    """A random event; `person`, `detail`, `negation`: the chances of a person as object, of each detail, of a negation."""
    agent = agent or rng.choice(NAMES)
    if rng.random() < person:
        verb, noun, adjective = rng.choice(list(PERSON_VERBS)), rng.choice([n for n in NAMES if n != agent]), ""
    else:
        verb, noun = rng.choice(list(THING_VERBS)), rng.choice(NOUNS)
        adjective = rng.choice(ADJECTIVES) if rng.random() < detail else ""
    place = rng.choice(PLACES) if rng.random() < detail else ""
    time = rng.choice(TIMES) if rng.random() < detail else ""
    return Event(agent, verb, noun, adjective, place, time, rng.random() < negation)


def noun_phrase(event: Event) -> str:
    if event.object in NAMES:
        return event.object
    phrase = f"{event.adjective} {event.object}".strip()
    return phrase if event.object in ("furniture",) else f"{article(phrase)} {phrase}"


def sentence(event: Event, rng: random.Random | None = None, form: str = "") -> str:
    """The event as a sentence; `form` is "active", "passive", "fronted" or "" for a random one (active without `rng`)."""
    if not form:
        form = rng.choice(("active", "active", "passive", "fronted")) if rng else "active"
    verb, thing = VERBS[event.verb], noun_phrase(event)
    place = f"in the {event.place}" if event.place else ""
    if form == "passive":
        was = "was not" if event.negated else "was"
        core = f"{thing} {was} {verb.participle} by {event.agent}"
    else:
        core = f"{event.agent} {f'did not {verb.base}' if event.negated else verb.past} {thing}"
    if form == "fronted" and (event.time or place):
        front, back = (event.time, place) if event.time else (place, "")
        return " ".join(f"{front} , {core} {back} .".split())
    return " ".join(f"{core} {place} {event.time} .".split())


def question(event: Event, asked: str) -> str:
    """A question about the event: `asked` is "who", "what", "where", "when" or "did"."""
    verb, thing = VERBS[event.verb], noun_phrase(event)
    place = f"in the {event.place}" if event.place and asked != "where" else ""
    time = event.time if asked != "when" else ""
    if asked == "who":
        core = f"who {verb.past} {thing}"
    elif asked == "what":
        core = f"{'whom' if event.about_person else 'what'} did {event.agent} {verb.base}"
    else:
        core = f"{'' if asked == 'did' else asked} did {event.agent} {verb.base} {thing}"
    return " ".join(f"{core} {place} {time} ?".split())


def answer(event: Event, asked: str) -> str:
    """The answer to `question(event, asked)`, in the words of `sentence(event)`."""
    return {"who": event.agent, "what": noun_phrase(event), "where": event.place, "when": event.time}[asked]


def synonym(rng: random.Random, event: Event) -> Event:
    """The same event in other words, where there are any."""
    verb = VERBS[event.verb].same or event.verb
    adjective = event.adjective
    if adjective:
        group = next(g for g in PROPERTIES[AXIS[adjective]] if adjective in g)
        adjective = rng.choice([w for w in group if w != adjective] or group)
    if verb != event.verb and rng.random() < 0.7:
        event = dataclasses.replace(event, verb=verb)
    return dataclasses.replace(event, adjective=adjective) if rng.random() < 0.7 else event


def generalise(rng: random.Random, event: Event) -> Event:
    """A weaker statement that the (positive) event entails: a wider noun, or a detail left out."""
    changes: list[dict[str, Any]] = []
    if event.object in HYPERNYM:
        changes.append({"object": HYPERNYM[event.object], "adjective": event.adjective})
    changes += [{field: ""} for field in ("adjective", "place", "time") if getattr(event, field)]
    for change in rng.sample(changes, min(len(changes), rng.choice((1, 1, 2)))):
        event = dataclasses.replace(event, **change)
    return event


def contradict(rng: random.Random, event: Event) -> Event:
    """A statement that cannot hold together with the event: its negation, a verb or a property that excludes it."""
    kinds = ["negate"]
    if VERBS[event.verb].opposite and not event.negated:
        kinds.append("opposite")
    if event.adjective and not event.negated:
        kinds.append("property")
    kind = rng.choice(kinds)
    if kind == "negate":
        return dataclasses.replace(event, negated=not event.negated)
    if kind == "opposite":
        return dataclasses.replace(event, verb=VERBS[event.verb].opposite)
    groups = [g for g in PROPERTIES[AXIS[event.adjective]] if event.adjective not in g]
    return dataclasses.replace(event, adjective=rng.choice(rng.choice(groups)))


def alter(rng: random.Random, event: Event, fields: tuple[str, ...] = ("agent", "object", "place", "time")) -> Event:
    """The event with one filled field replaced by another value: a different event."""
    field = rng.choice([f for f in fields if getattr(event, f)])
    if field == "agent" or (field == "object" and event.object in NAMES):
        pool = [n for n in NAMES if n not in (event.agent, event.object)]
    elif field == "object":
        pool = [n for n in NOUNS if n != event.object and HYPERNYM[n] != HYPERNYM.get(event.object)]
    elif field == "verb":
        verbs, now = (PERSON_VERBS, VERBS[event.verb]) if event.about_person else (THING_VERBS, VERBS[event.verb])
        pool = [v for v in verbs if v not in (now.base, now.same, now.opposite) and verbs[v].same != now.opposite]
    elif field == "adjective":
        pool = [a for a in ADJECTIVES if AXIS[a] != AXIS[event.adjective]]
    else:
        pool = [p for p in (PLACES if field == "place" else TIMES) if p != getattr(event, field)]
    change: dict[str, Any] = {field: rng.choice(pool)}
    return dataclasses.replace(event, **change)


def relate(rng: random.Random, label: str) -> tuple[Event, Event]:
    """Two events, of which the second follows from the first ("yes"), cannot be so ("no") or is left open ("maybe")."""
    event = draw_event(rng, detail=0.7, negation=0.2)
    if label == "no":
        other = contradict(rng, event)
        # Leaving out a detail keeps "not" contradicted only when the positive statement is the more detailed one.
        if other.negated and not event.negated:
            other = dataclasses.replace(generalise(rng, event), negated=True)
    elif label == "yes":
        if event.negated:  # what did not happen at all did not happen in any particular way either
            other = event
            event = generalise(rng, event)
        else:
            other = generalise(rng, event)
    elif event.negated:  # not in every detail may still be so in part
        other = generalise(rng, event)
        if other == event:
            other = alter(rng, event, ("agent", "verb", "object"))
    elif rng.random() < 0.5:
        other, event = event, generalise(rng, event)
        if other == event:
            other = alter(rng, event, ("agent", "verb", "object"))
    else:
        other = alter(rng, event, ("agent", "verb", "object"))
        if rng.random() < 0.3:
            other = dataclasses.replace(other, negated=True)
    return event, synonym(rng, other) if rng.random() < 0.3 else other


def passage(rng: random.Random, size: int) -> list[Event]:
    """Events that share no name, no thing and no meaning of a verb, so that a question is about one of them."""
    events: list[Event] = []
    while len(events) < size:
        event = draw_event(rng, detail=0.5)
        verb = VERBS[event.verb]
        names = {name for e in events for name in (e.agent, e.object)}
        verbs = {v for e in events for v in (e.verb, VERBS[e.verb].same)}
        if not {event.agent, event.object} & names and not {verb.base, verb.same} & (verbs - {""}):
            events.append(event)
    return events


# Sentiment: aspects of a visit, with the words that praise or blame each; some words change sides with the aspect.
ASPECTS = {
    "soup": ("hot tasty delicious".split(), "cold bland salty".split()),
    "beer": ("cold fresh tasty".split(), "warm flat stale".split()),
    "waiter": ("friendly polite helpful".split(), "rude slow careless".split()),
    "room": ("clean quiet cosy".split(), "dirty noisy dark".split()),
    "film": ("funny clever moving".split(), "boring silly slow".split()),
    "story": ("clever gripping moving".split(), "dull confusing silly".split()),
    "music": ("lovely gentle moving".split(), "loud dreadful dull".split()),
    "bread": ("fresh warm tasty".split(), "stale dry burnt".split()),
    "price": ("fair low reasonable".split(), "high absurd unfair".split()),
    "guide": ("helpful patient clever".split(), "rude boring careless".split()),
    "bed": ("soft clean cosy".split(), "hard dirty narrow".split()),
    "view": ("lovely splendid clear".split(), "dreadful dark blocked".split()),
}
