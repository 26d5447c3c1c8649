"""Running text of the generated suite's world, for pretraining the embedded T5.

It tells events, what words mean and how a visit was; nobody labels anything in it. The exercises that go with it are in
`sketch_exercises.py`.
"""

import dataclasses
import random
from collections.abc import Callable, Iterator

from tasks import sketch
from tasks import sketch_world as world
from tasks.sketch_senses import SENSES

GLOSSED = 2  # sentences of each sense that pretraining explains; it shows the others without a word on what they mean


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


def opinion(rng: random.Random, aspect: str, favourable: bool) -> str:
    good, bad = world.ASPECTS[aspect]
    if rng.random() < 0.75:
        return f"the {aspect} was {rng.choice(good if favourable else bad)}"
    return f"the {aspect} was {rng.choice(('not', 'never', 'hardly'))} {rng.choice(bad if favourable else good)}"


def contrast(rng: random.Random, minor: str, major: str) -> str:
    """Two opposite claims in one sentence, of which the second weighs more."""
    return rng.choice((f"{minor} , but {major} .", f"although {minor} , {major} .", f"{major} , even though {minor} ."))


def _visit(rng: random.Random) -> str:
    """What a visit was like, and what the visitors did in the end."""
    pleased = rng.random() < 0.5
    one, two, three = rng.sample(list(world.ASPECTS), 3)
    if rng.random() < 0.5:
        said = contrast(rng, opinion(rng, one, not pleased), opinion(rng, two, pleased))
    else:
        said = f"{opinion(rng, one, pleased)} and {opinion(rng, two, pleased)} ."
    more = f"{opinion(rng, three, pleased)} . " if rng.random() < 0.5 else ""
    end = rng.choice(
        ("we loved it", "a great evening", "we will come again", "it was wonderful")
        if pleased
        else ("we hated it", "a poor evening", "we will never come again", "it was terrible")
    )
    return f"{said} {more}{end} ."


def _senses(rng: random.Random) -> str:
    """Several sentences with one word in one sense; half of the sentences also with what it is there."""
    word = rng.choice(list(SENSES))
    gloss, phrases = rng.choice(list(SENSES[word].items()))
    if rng.random() < 0.3:
        return f"{named(rng, rng.choice(phrases[:GLOSSED]))} here the {word} is {world.article(gloss)} {gloss} ."
    return " ".join(named(rng, phrase) for phrase in rng.sample(phrases, rng.choice((2, 3))))


def named(rng: random.Random, phrase: str) -> str:
    return f"{phrase.format(n=rng.choice(world.NAMES))} ."


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


def unseen(text: str) -> bool:
    """Does the text keep clear of every sentence of the suite's validation and test sets, in whatever words it is led in?"""
    for part in sketch.sentences(text):
        words = part.split()
        if any(" ".join(words[start:]) in sketch.held_out() for start in range(len(words) - 3)):
            return False
    return True


def text(seed: int, documents: int) -> Iterator[str]:
    """`documents` paragraphs of running text."""
    rng = random.Random(seed)
    kinds, weights = zip(*TEXTS, strict=True)
    while documents:
        document = world.tidy(rng.choices(kinds, weights)[0](rng))
        if unseen(document):
            documents -= 1
            yield document
