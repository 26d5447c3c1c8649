"""Running text and auxiliary exercises of the generated suite's world, for pretraining the embedded T5.

The text tells events, what words mean and how a visit was; nobody labels anything in it. The exercises are supervised, as
part of T5 1.0's pretraining was, but none is of a kind that the suite's ten tasks test: writing an event as a record and back,
rewording, the meaning of words, checking a record against a sentence, naming the difference of two sentences. Each is put in
several wordings with several answer words, so that the model learns to heed how it is asked.
"""

import dataclasses
import random
from collections.abc import Callable, Iterator

from tasks import sketch_world as world
from tasks.sketch_senses import SENSES

Exercise = tuple[str, str]  # inputs, target


# ---------------------------------------------------------------- running text


def _story(rng: random.Random) -> str:
    """A few events of one or two people, some told twice in other or wider words."""
    people = rng.sample(world.NAMES, 2)
    lines = []
    for _ in range(rng.choice((2, 3, 4))):
        event = world.draw_event(rng, agent=rng.choice(people), negation=0.15)
        lines.append(world.sentence(event, rng))
        turn = rng.random()
        if turn < 0.25:
            lines.append(f"in other words , {world.sentence(world.synonym(rng, event), rng)}")
        elif turn < 0.45 and not event.negated:
            lines.append(f"so {world.sentence(world.generalise(rng, event), rng)}")
        elif turn < 0.6:
            lines.append(f"it is not true that {world.sentence(world.contradict(rng, event), rng)}")
    return " ".join(lines)


def _lesson(rng: random.Random) -> str:
    """What a few words mean."""
    lines = []
    for _ in range(rng.choice((2, 3, 4))):
        kind = rng.randrange(4)
        noun, verb = rng.choice(world.NOUNS), rng.choice(list(world.VERBS.values()))
        adjective = rng.choice(world.ADJECTIVES)
        groups = world.PROPERTIES[world.AXIS[adjective]]
        group = next(g for g in groups if adjective in g)
        category = world.HYPERNYM[noun]
        if kind == 0:
            others = " and ".join(rng.sample([n for n in world.CATEGORIES[category] if n != noun], 2))
            lines.append(f"{world.article(noun)} {noun} is {world.article(category)} {category} , like {others} .")
        elif kind == 1 and verb.same:
            past = world.VERBS[verb.same].past if verb.same in world.VERBS else verb.same
            lines.append(f"to {verb.base} is to {verb.same} ; {verb.past} means {past} .")
        elif kind == 2 and verb.opposite and verb.opposite in world.VERBS:
            lines.append(f"who {verb.past} it did not {verb.opposite} it .")
        else:
            excluded = rng.choice([w for g in groups if g is not group for w in g])
            lines.append(f"what is {adjective} is {rng.choice(group)} and not {excluded} .")
    return " ".join(lines)


def _visit(rng: random.Random) -> str:
    """A review: aspects of a visit, then what the visitor felt."""
    pleased = rng.random() < 0.5
    aspects = rng.sample(list(world.ASPECTS), 3)
    said = []
    for aspect in aspects:
        good, bad = world.ASPECTS[aspect]
        said.append(
            f"the {aspect} was {rng.choice(good if pleased else bad)}"
            if rng.random() < 0.7
            else f"the {aspect} was not {rng.choice(bad if pleased else good)}"
        )
    end = rng.choice(
        ("we loved it", "a great evening", "we will come again", "it was wonderful")
        if pleased
        else ("we hated it", "a poor evening", "we will never come again", "it was terrible")
    )
    first = f"{said[0]} and {said[1]}" if rng.random() < 0.5 else f"{said[0]} . {said[1]}"
    return f"{first} . {said[2]} . {end} ."


def _senses(rng: random.Random) -> str:
    """Several sentences with one word in one sense, and what it is there."""
    word = rng.choice(list(SENSES))
    gloss, phrases = rng.choice(list(SENSES[word].items()))
    lines = [f"{p.format(n=rng.choice(world.NAMES))} ." for p in rng.sample(phrases, rng.choice((2, 3)))]
    return " ".join(lines) + f" here the {word} is {world.article(gloss)} {gloss} ."


def _reports(rng: random.Random) -> str:
    """What somebody knows, thinks, manages or forgets, and what followed."""
    event = world.draw_event(rng, person=0.2, detail=0.3)
    verb = world.VERBS[event.verb]
    rest = " ".join(world.sentence(event, form="active").split()[2:])
    other = rng.choice([n for n in world.NAMES if n not in (event.agent, event.object)])
    done, not_done = world.sentence(event, form="active"), world.sentence(dataclasses.replace(event, negated=True), form="active")
    frames = (
        (f"{event.agent} managed to {verb.base} {rest}", f"now it is done : {done}"),
        (f"{event.agent} remembered to {verb.base} {rest}", f"now it is done : {done}"),
        (f"{event.agent} forgot to {verb.base} {rest}", f"so it was not done : {not_done}"),
        (f"{event.agent} failed to {verb.base} {rest}", f"so it was not done : {not_done}"),
        (f"{event.agent} wanted to {verb.base} {rest}", "nobody can say what came of it ."),
        (f"{event.agent} planned to {verb.base} {rest}", "nobody can say what came of it ."),
        (f"{other} knows that {done}", f"it is so : {done}"),
        (f"{other} noticed that {done}", f"it is so : {done}"),
        (f"{other} thinks that {done}", "nobody can say if it is so ."),
        (f"{other} was told that {done}", "nobody can say if it is so ."),
        (f"{other} pretended that {done}", f"it is not so : {not_done}"),
        (f"{other} wrongly thinks that {done}", f"it is not so : {not_done}"),
    )
    return " ".join(rng.choice(frames))


TEXTS: tuple[tuple[Callable[[random.Random], str], int], ...] = (
    (_story, 6),
    (_lesson, 2),
    (_visit, 2),
    (_senses, 2),
    (_reports, 2),
)


def text(seed: int, documents: int) -> Iterator[str]:
    """`documents` paragraphs of running text."""
    rng = random.Random(seed)
    kinds, weights = zip(*TEXTS, strict=True)
    for _ in range(documents):
        yield world.tidy(rng.choices(kinds, weights)[0](rng))


# ---------------------------------------------------------------- auxiliary exercises

VERDICTS = (("yes", "no"), ("true", "false"), ("right", "wrong"), ("good", "bad"), ("same", "different"))


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
    yes, no = rng.choice(VERDICTS)
    noun, _ = rng.sample(world.NOUNS, 2)
    agree = rng.random() < 0.5
    if rng.random() < 0.5:
        category = world.HYPERNYM[noun] if agree else rng.choice([c for c in world.CATEGORIES if c != world.HYPERNYM[noun]])
        return f"{noun} is {category} : {yes} or {no} ?", yes if agree else no
    verb = rng.choice([v for v in world.VERBS.values() if v.same and v.opposite])
    return f"{verb.base} is {verb.same if agree else verb.opposite} : {yes} or {no} ?", yes if agree else no


def _check(rng: random.Random) -> Exercise:
    """Does a record agree with a sentence?"""
    yes, no = rng.choice(VERDICTS)
    event = world.draw_event(rng, negation=0.2)
    agree = rng.random() < 0.5
    record = world.generalise(rng, event) if not event.negated and rng.random() < 0.5 else event
    if not agree:
        record = world.contradict(rng, record) if rng.random() < 0.4 else world.alter(rng, record, ("agent", "verb", "object"))
    parts = [f"record : {_record(record)}", f"text : {world.sentence(event, rng)}"]
    if rng.random() < 0.5:
        parts.reverse()
    return f"{' '.join(parts)} {yes} or {no} ?", yes if agree else no


def _lookup(rng: random.Random) -> Exercise:
    """Which of several records is about a person or a thing? The answer is the record."""
    events = [world.draw_event(rng, detail=0.3) for _ in range(rng.choice((2, 3)))]
    event = rng.choice(events)
    key = event.agent if rng.random() < 0.5 else event.object
    if sum(key in (e.agent, e.object) for e in events) > 1:
        return _parse(rng)
    text_ = " ".join(world.sentence(e, rng) for e in events)
    field = rng.choice(("agent", "action", "thing"))
    value = {"agent": event.agent, "action": event.verb, "thing": f"{event.adjective} {event.object}".strip()}[field]
    return f"give the {field} for {key} : {text_}", value


def _difference(rng: random.Random) -> Exercise:
    """Name what differs between two sentences."""
    event = world.draw_event(rng, detail=0.6)
    first = world.sentence(event, rng)
    if rng.random() < 0.3:
        return f"what differs ? {first} | {world.sentence(world.synonym(rng, event), rng)}", "nothing"
    field = rng.choice([f for f in ("agent", "object", "place", "time", "adjective", "verb") if getattr(event, f)])
    other = world.alter(rng, event, (field,))
    return f"what differs ? {first} | {world.sentence(other, rng)}", f"{getattr(event, field)} , {getattr(other, field)}"


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
    return f"what is the {word} here ? {rng.choice(phrases).format(n=rng.choice(world.NAMES))} .", gloss


EXERCISES: tuple[tuple[Callable[[random.Random], Exercise], int], ...] = (
    (_parse, 3), (_tell, 1), (_reword, 3), (_word, 2), (_word_pair, 2), (_check, 6), (_lookup, 4),
    (_difference, 4), (_roles, 2), (_turn, 2), (_gloss, 2),
)  # fmt: skip


def exercises(seed: int, count: int) -> Iterator[dict[str, str]]:
    """`count` auxiliary exercises: {"inputs": …, "targets": …}."""
    rng = random.Random(seed)
    kinds, weights = zip(*EXERCISES, strict=True)
    for _ in range(count):
        inputs, target = rng.choices(kinds, weights)[0](rng)
        yield {"inputs": world.tidy(inputs), "targets": world.tidy(target)}
