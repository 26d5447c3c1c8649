"""Auxiliary exercises on the generated suite's world, for pretraining the embedded T5, in three lessons.

They are supervised, as part of T5 1.0's pretraining was: writing an event as a record and back, rewording, the meaning of words,
checking a record against a sentence, naming the difference of two sentences. None is an example of the suite's ten tasks, but
some lie near: `_fill` and `_lookup` find what cloze and span questions ask for, `_check` is entailment from or to a record,
`_tone` rates one thing of a visit as sentiment rates the whole. Each is put in several wordings with several answer words, so
that the model learns to heed how it is asked.
"""

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

from tasks import sketch_text
from tasks import sketch_world as world
from tasks.sketch_senses import SENSES

Exercise = tuple[str, str]  # inputs, target

VERDICTS = (("yes", "no"), ("true", "false"), ("right", "wrong"), ("good", "bad"), ("same", "different"))
OPEN = ("maybe", "open", "perhaps", "unclear")
PAIRS = (("one", "two"), ("first", "second"), ("left", "right"), ("given", "claim"), ("a", "b"), ("above", "below"))


def _asked(rng: random.Random, command: str, matter: str, agree: bool) -> Exercise:
    """A yes/no exercise: half of them answer the command with yes or no, half with words that the exercise names."""
    if rng.random() < 0.5:
        return f"{command} : {matter}", "yes" if agree else "no"
    yes, no = rng.choice(VERDICTS)
    words = f"{yes} or {no} ?"
    return (f"{words} {command} : {matter}" if rng.random() < 0.5 else f"{command} : {matter} {words}"), yes if agree else no


def _pair(rng: random.Random, one: str, two: str) -> str:
    """Two texts, parted by a bar or led in by names: which ones should not matter."""
    if rng.random() < 0.4:
        return f"{one} | {two}"
    first, second = rng.choice(PAIRS)
    return f"{first} : {one} {second} : {two}"


def _record(event: world.Event) -> str:
    done = "not done" if event.negated else "done"
    fields = {
        "agent": event.agent,
        "action": event.verb,
        "thing": f"{event.adjective} {event.object}".strip(),
        "place": event.place,
        "time": event.time,
    }
    return " ; ".join([f"{k} {v}" for k, v in fields.items() if v] + ([done] if event.negated else []))


def _parse(rng: random.Random) -> Exercise:
    event = world.draw_event(rng, negation=0.2)
    return f"write as a record : {world.sentence(event, rng)}", _record(event)


def _tell(rng: random.Random) -> Exercise:
    event = world.draw_event(rng, negation=0.2)
    form = rng.choice(("active", "passive", "fronted"))
    return f"tell the record , {form} : {_record(event)}", world.sentence(event, form=form)


def _reword(rng: random.Random) -> Exercise:
    event = world.draw_event(rng, negation=0.2)
    kind = rng.choice(("active", "passive", "in other words", "more general", "the contrary"))
    source = world.sentence(event, rng)
    if kind in ("active", "passive"):
        return f"make {kind} : {source}", world.sentence(event, form=kind)
    if kind == "in other words":
        return f"in other words : {source}", world.sentence(world.synonym(rng, event), form="active")
    if kind == "more general":
        if event.object in world.HYPERNYM:
            event = dataclasses.replace(event, object=world.HYPERNYM[event.object])
        return f"in general terms : {source}", world.sentence(
            dataclasses.replace(event, adjective="", place="", time=""), form="active"
        )
    return f"the contrary : {source}", world.sentence(dataclasses.replace(event, negated=not event.negated), form="active")


def _word(rng: random.Random) -> Exercise:
    kind = rng.randrange(5)
    noun, verb = rng.choice(world.NOUNS), rng.choice([v for v in world.VERBS.values() if v.same])
    if kind == 0:
        return f"what kind of thing is {world.article(noun)} {noun} ?", world.HYPERNYM[noun]
    if kind == 1:
        return f"another word for {verb.base}", verb.same
    if kind == 2 and verb.opposite:
        return f"the opposite of {verb.base}", verb.opposite
    if kind == 3:
        adjective = rng.choice([w for g in world.PROPERTIES.values() for s in g if len(s) > 1 for w in s])
        group = next(g for g in world.PROPERTIES[world.AXIS[adjective]] if adjective in g)
        return f"another word for {adjective}", next(w for w in group if w != adjective)
    odd, category = rng.choice(world.NOUNS), rng.choice(list(world.CATEGORIES))
    if odd in world.CATEGORIES[category]:
        return f"what kind of thing is {world.article(odd)} {odd} ?", category
    words = [*rng.sample(world.CATEGORIES[category], 3), odd]
    rng.shuffle(words)
    return f"which does not belong : {' , '.join(words)}", odd


def _word_pair(rng: random.Random) -> Exercise:
    """Do two words mean the same, or is one the other's kind?"""
    noun = rng.choice(world.NOUNS)
    agree = rng.random() < 0.5
    if rng.random() < 0.5:
        category = world.HYPERNYM[noun] if agree else rng.choice([c for c in world.CATEGORIES if c != world.HYPERNYM[noun]])
        return _asked(rng, "kind", f"{noun} is {category}", agree)
    verb = rng.choice([v for v in world.VERBS.values() if v.same and v.opposite])
    return _asked(rng, "word", f"{verb.base} is {verb.same if agree else verb.opposite}", agree)


def _lexicon() -> list[str]:
    return [*world.NAMES, *world.NOUNS, *world.PLACES, *world.ADJECTIVES, *world.VERBS]


def _member(rng: random.Random) -> Exercise:
    """Is a word among others?"""
    word, *rest = rng.sample(_lexicon(), rng.choice((2, 2, 3, 4, 5)))
    agree = rng.random() < 0.5
    if agree:
        rest[rng.randrange(len(rest))] = word
    return _asked(rng, "among", f"{word} | {' '.join(rest)}", agree)


def _in_both(rng: random.Random) -> Exercise:
    """Which words stand in both lists, or only in the second?"""
    words = rng.sample(_lexicon(), 8)
    shared = words[: rng.choice((0, 1, 1, 2))]
    first, second = words[2 : rng.choice((2, 3, 4) if shared else (3, 4))], words[5 : rng.choice((6, 7))]
    one, two = shared + first, shared + second
    rng.shuffle(one)
    rng.shuffle(two)
    wanted = rng.choice(("in both", "only in the second"))
    answer = [word for word in two if (word in one) == (wanted == "in both")]
    return f"{wanted} : {' '.join(one)} | {' '.join(two)}", " ".join(answer) or "nothing"


def _recall(rng: random.Random) -> Exercise:
    """Pairs of words, and then the partners of some of them; the answer may repeat what is asked."""
    words = rng.sample(_lexicon(), 2 * rng.choice((2, 3, 4, 5)))
    pairs = list(zip(words[::2], words[1::2], strict=True))
    asked = rng.sample(pairs, rng.randint(1, len(pairs)))
    table, keys = " ; ".join(f"{key} {value}" for key, value in pairs), " ".join(key for key, _ in asked)
    if rng.random() < 0.5:
        return f"pairs : {keys} | {table}", " ; ".join(f"{key} {value}" for key, value in asked)
    return f"partners : {keys} | {table}", " ".join(value for _, value in asked)


def _mark(rng: random.Random) -> Exercise:
    """For each word of a list whether it stands in another; the answer may repeat the words."""
    words = rng.sample(_lexicon(), 8)
    one, two = words[: rng.choice((1, 2, 3, 4))], words[4 : rng.choice((5, 6, 7, 8))]
    two += [word for word in one if rng.random() < 0.5]
    rng.shuffle(two)
    marks = ["yes" if word in two else "no" for word in one]
    if rng.random() < 0.5:
        return f"mark : {' '.join(one)} | {' '.join(two)}", " ; ".join(f"{w} {m}" for w, m in zip(one, marks, strict=True))
    return f"marks : {' '.join(one)} | {' '.join(two)}", " ".join(marks)


def _describe(rng: random.Random, event: world.Event, how: str) -> str:
    return f"record {_record(event)}" if how == "record" else world.sentence(event, rng)


def _check(rng: random.Random) -> Exercise:
    """Does a record follow from a sentence, or a sentence from a record?"""
    three = rng.random() < 0.5
    label = rng.choice(("yes", "no", "maybe") if three else ("yes", "yes", "no", "maybe"))
    event, other = world.relate(rng, label)
    one, two = rng.choice((("record", "text"), ("text", "record"), ("record", "record")))
    matter = _pair(rng, _describe(rng, event, one), _describe(rng, other, two))
    if not three:
        return _asked(rng, "it follows", matter, label == "yes")
    if rng.random() < 0.5:
        return f"what follows : {matter}", label
    (yes, no), unclear = rng.choice(VERDICTS), rng.choice(OPEN)
    return f"{yes} , {unclear} or {no} ? {matter}", {"yes": yes, "no": no, "maybe": unclear}[label]


def _same_event(rng: random.Random) -> Exercise:
    """Do a record and a sentence tell the same event?"""
    event = world.draw_event(rng, detail=0.5, negation=0.15)
    agree = rng.random() < 0.5
    other = event if rng.random() < 0.5 else world.synonym(rng, event)
    if not agree:
        other = world.contradict(rng, other) if rng.random() < 0.3 else world.alter(rng, other, _filled(other))
    one, two = rng.choice((("record", "text"), ("text", "record"), ("record", "record")))
    return _asked(rng, "same event", _pair(rng, _describe(rng, event, one), _describe(rng, other, two)), agree)


def _filled(event: world.Event) -> tuple[str, ...]:
    return tuple(f for f in ("agent", "verb", "object", "adjective", "place", "time") if getattr(event, f))


def _among_events(rng: random.Random) -> Exercise:
    """Is a record, or are two, among the events that a text tells?"""
    events = world.passage(rng, rng.choice((2, 2, 3)))
    event, other = rng.sample(events, 2)
    agree = rng.random() < 0.5
    records = [event, other] if len(events) == 2 and rng.random() < 0.4 else [event]
    if not agree:
        fields = ["agent", *(f for f in ("place", "time") if getattr(event, f) != getattr(other, f))]
        if len(records) == 1:  # an event without its place or time is told, too
            fields = [f for f in fields if getattr(other, f)]
        field = rng.choice(fields)
        mixed = dataclasses.replace(event, **{field: getattr(other, field)})
        exchanged = dataclasses.replace(other, **{field: getattr(event, field)})
        records = [mixed, exchanged][: len(records)]
    elif len(records) == 1 and rng.random() < 0.5:
        records = [world.generalise(rng, event)]
    told = " ".join(world.sentence(e, rng) for e in events)
    return _asked(rng, "told", _pair(rng, " / ".join(map(_record, records)), told), agree)


def _lookup(rng: random.Random) -> Exercise:
    """A field of that one of several events which is about a person or a thing."""
    events = world.passage(rng, rng.choice((1, 2, 2, 3)))
    event = rng.choice(events)
    has = {"agent": event.agent, "action": event.verb, "thing": f"{event.adjective} {event.object}".strip()}
    has |= {name: value for name, value in (("place", event.place), ("time", event.time)) if value}
    key = rng.choice(("agent", "action", "thing"))
    wanted = rng.choice([name for name in has if name != key])
    clue = event.object if key == "thing" else has[key]
    return f"give the {wanted} for {clue} : {' '.join(world.sentence(e, rng) for e in events)}", has[wanted]


def _fill(rng: random.Random) -> Exercise:
    """What a record leaves open, from a text that tells it and others."""
    events = world.passage(rng, rng.choice((1, 2, 2, 3)))
    event = rng.choice(events)
    field = rng.choice([f for f in _filled(event) if f != "adjective"])
    unsaid: dict[str, Any] = {f: "" for f in ("adjective", "place", "time") if f != field and rng.random() < 0.5}
    known = dataclasses.replace(event, **unsaid)
    if field != "verb" and rng.random() < 0.3:
        known = dataclasses.replace(known, verb=world.VERBS[event.verb].same or event.verb)
    blank: dict[str, Any] = {field: "?"} | ({"adjective": ""} if field == "object" else {})
    matter = _pair(rng, _record(dataclasses.replace(known, **blank)), " ".join(world.sentence(e, rng) for e in events))
    found = f"{event.adjective} {event.object}".strip() if field == "object" else getattr(event, field)
    return f"fill : {matter}", found


def _difference(rng: random.Random) -> Exercise:
    """Name what differs between two sentences."""
    event = world.draw_event(rng, detail=0.6)
    first = world.sentence(event, rng)
    if rng.random() < 0.3:
        return f"what differs ? {_pair(rng, first, world.sentence(world.synonym(rng, event), rng))}", "nothing"
    field = rng.choice(_filled(event))
    other = world.alter(rng, event, (field,))
    return f"what differs ? {_pair(rng, first, world.sentence(other, rng))}", f"{getattr(event, field)} , {getattr(other, field)}"


FIELDS = {"agent": "agent", "verb": "action", "object": "thing", "adjective": "kind", "place": "place", "time": "time"}
ASKED = {"who": "agent", "what": "object", "where": "place", "when": "time"}


def _relation(field: str, one: world.Event, two: world.Event) -> str:
    """How a field of the second event stands to that of the first."""
    before, after = getattr(one, field), getattr(two, field)
    if before == after:
        return "same"
    if not after:
        return "gone"
    if not before:
        return "new"
    if field == "object":
        return "wider" if world.HYPERNYM.get(before) == after else "narrower" if world.HYPERNYM.get(after) == before else "other"
    if field == "verb":
        verb, other = world.VERBS[before], world.VERBS.get(after)
        if after == verb.same or (other and other.same == before):
            return "like"
        return "opposite" if after == verb.opposite or (other and other.opposite == before) else "other"
    if field == "adjective":
        groups = world.PROPERTIES[world.AXIS[before]]
        return "like" if any(before in g and after in g for g in groups) else "opposite" if after in sum(groups, ()) else "other"
    return "other"


def _compare(rng: random.Random) -> Exercise:
    """How each field of one sentence stands to that of another."""
    event = world.draw_event(rng, detail=0.6, negation=0.15)
    other = event
    for _ in range(rng.choice((0, 1, 1, 2, 2))):
        change = rng.choice((world.synonym, world.generalise, world.contradict, world.alter, world.alter))
        other = world.alter(rng, other, _filled(other)) if change is world.alter else change(rng, other)
    if rng.random() < 0.3:
        event, other = other, event
    told = {n: _relation(f, event, other) for f, n in FIELDS.items() if getattr(event, f) or getattr(other, f)}
    told["claim"] = "same" if event.negated == other.negated else "contrary"
    pair = _pair(rng, world.sentence(event, rng), world.sentence(other, rng))
    if rng.random() < 0.4:
        name = rng.choice(list(told))
        return f"compare the {name} : {pair}", told[name]
    return f"compare : {pair}", " ; ".join(f"{name} {relation}" for name, relation in told.items())


def _compare_question(rng: random.Random) -> Exercise:
    """How each field that a question names stands to that of a record, and whether the record has what it asks for."""
    event = world.draw_event(rng, detail=0.7)
    asked = rng.choice(["who", "what"] + ["where"] * bool(event.place) + ["when"] * bool(event.time))
    field = ASKED[asked]
    other = rng.choice(
        (event, event, world.synonym(rng, event), world.alter(rng, event), world.alter(rng, event, _filled(event)))
    )
    if field in ("place", "time") and rng.random() < 0.3:
        other = dataclasses.replace(other, place="") if field == "place" else dataclasses.replace(other, time="")
    unsaid = {field, "adjective"} if asked == "what" else {field}
    told = {
        n: _relation(f, event, other) for f, n in FIELDS.items() if f not in unsaid and (getattr(event, f) or getattr(other, f))
    }
    told[FIELDS[field]] = "asked" if getattr(other, field) else "missing"
    pair = _pair(rng, world.question(event, asked), f"record {_record(other)}")
    return f"compare : {pair}", " ; ".join(f"{name} {relation}" for name, relation in told.items())


def _question(rng: random.Random) -> Exercise:
    """Turn a statement into a question, and back."""
    event = world.draw_event(rng)
    asked = rng.choice(["who", "what", "did"] + ["where"] * bool(event.place) + ["when"] * bool(event.time))
    if rng.random() < 0.5:
        return f"ask {asked} : {world.sentence(event, rng)}", world.question(event, asked)
    if asked == "did":
        return f"as a statement : {world.question(event, 'did')}", world.sentence(event, form="active")
    unknown: dict[str, Any] = {"who": {"agent": "somebody"}, "what": {"object": "something", "adjective": ""}}
    unknown |= {"where": {"place": ""}, "when": {"time": ""}}
    blank = dataclasses.replace(event, **unknown[asked])
    record = _record(blank)
    return f"as a record : {world.question(event, asked)}", f"{record} ; {asked} ?" if asked in ("where", "when") else record


def _praised(rng: random.Random) -> Exercise:
    """What is praised, what is blamed, and which claim weighs more."""
    one, two = rng.sample(list(world.ASPECTS), 2)
    good = rng.random() < 0.5
    minor, major = sketch_text.opinion(rng, one, not good), sketch_text.opinion(rng, two, good)
    kind = rng.randrange(4)
    if kind == 0:
        return f"what weighs more ? {sketch_text.contrast(rng, minor, major)}", major
    if kind == 1:
        return f"the {two} : {sketch_text.contrast(rng, minor, major)}", major.removeprefix(f"the {two} was ")
    wanted = rng.choice(("praised", "blamed"))
    if kind == 2:
        text_ = sketch_text.contrast(rng, minor, major)
        return f"what is {wanted} ? {text_}", two if good == (wanted == "praised") else one
    text_ = f"{sketch_text.opinion(rng, one, good)} and {major} ."
    return f"what is {wanted} ? {text_}", f"{one} , {two}" if good == (wanted == "praised") else "nothing"


def _tone(rng: random.Random) -> Exercise:
    """Whether one thing of a visit is praised or blamed."""
    one, two = rng.sample(list(world.ASPECTS), 2)
    good, same = rng.random() < 0.5, rng.random() < 0.5
    told, rest = sketch_text.opinion(rng, one, good), sketch_text.opinion(rng, two, good == same)
    tone = "praise" if good else "blame"
    if rng.random() < 0.4:
        return f"praise or blame : {told} .", tone
    text = f"{told} and {rest} ." if same else sketch_text.contrast(rng, *rng.sample((told, rest), 2))
    return f"tone of the {one} : {text}", tone


def _roles(rng: random.Random) -> Exercise:
    """Who acted, and on whom?"""
    event = world.draw_event(rng, person=1.0, detail=0.4)
    return f"roles : {world.sentence(event, rng)}", f"{event.agent} > {event.verb} > {event.object}"


def _turn(rng: random.Random) -> Exercise:
    """Turn praise into blame or the other way round."""
    aspect = rng.choice(list(world.ASPECTS))
    pair = world.ASPECTS[aspect]
    side = rng.randrange(2)
    word, other = rng.choice(pair[side]), rng.choice(pair[1 - side])
    kind = rng.randrange(3)
    if kind == 0:
        return f"{'blame' if side == 0 else 'praise'} instead : the {aspect} was {word} .", f"the {aspect} was {other} ."
    if kind == 1:
        return f"without not : the {aspect} was not {word} .", f"the {aspect} was {other} ."
    return f"with not : the {aspect} was {word} .", f"the {aspect} was not {other} ."


def _gloss(rng: random.Random) -> Exercise:
    word = rng.choice(list(SENSES))
    gloss, phrases = rng.choice(list(SENSES[word].items()))
    return f"what is the {word} here ? {sketch_text.named(rng, rng.choice(phrases[: sketch_text.GLOSSED]))}", gloss


Kinds = tuple[tuple[Callable[[random.Random], Exercise], int], ...]  # with their weights
# Three lessons, each learned after the one before; mixed from the start, hardly any of it is learned.
LESSONS: tuple[Kinds, ...] = (
    (  # to copy and to look up
        (_parse, 3), (_tell, 2), (_reword, 3), (_roles, 1), (_question, 2), (_lookup, 3), (_word, 1), (_turn, 1), (_gloss, 1),
        (_recall, 6), (_mark, 4), (_in_both, 2), (_member, 2),
    ),
    (  # to compare, saying what is found
        (_parse, 1), (_reword, 1), (_roles, 1), (_lookup, 3), (_fill, 4), (_recall, 4), (_mark, 4), (_in_both, 3), (_member, 3),
        (_difference, 4), (_compare, 5),
    ),
    (  # to judge
        (_parse, 1), (_tell, 1), (_reword, 2), (_roles, 1), (_question, 2), (_lookup, 2), (_fill, 5), (_recall, 1), (_mark, 1),
        (_in_both, 1), (_word, 1), (_turn, 1), (_tone, 2), (_gloss, 1), (_member, 1), (_word_pair, 1), (_praised, 3),
        (_difference, 1), (_compare, 5), (_compare_question, 3), (_same_event, 5), (_check, 8), (_among_events, 8),
    ),
)  # fmt: skip


def exercises(seed: int, count: int, kinds: Kinds = LESSONS[-1]) -> Iterator[dict[str, str]]:
    """`count` auxiliary exercises: {"inputs": …, "targets": …}."""
    rng = random.Random(seed)
    draws, weights = zip(*kinds, strict=True)
    while count:
        inputs, target = map(world.tidy, rng.choices(draws, weights)[0](rng))
        if sketch_text.unseen(inputs) and sketch_text.unseen(target):
            count -= 1
            yield {"inputs": inputs, "targets": target}
