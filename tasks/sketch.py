"""A generated English-like task suite: the stand-in for MPT's setting where nothing can be downloaded.

Six source tasks and four target tasks of other kinds over one small world (`sketch_world.py`): who did what to which thing, where
and when; what words mean; how people rate a visit. Every example is right by construction, so the ceiling of each task is 100.
An example belongs to the split that a hash of its facts chooses, so that no fact of a test example is ever trained on; labels
alternate, so that they are balanced. No single word gives a label away (the tests fit a bag-of-words classifier).

| task | kind (its model in the literature) | labels | chance | ceiling |
|---|---|---|---|---|
| sketch_entailment | sentence pair (MNLI) | yes, maybe, no | 33.3 | 100 |
| sketch_question_entailment | does the sentence answer the question (QNLI) | yes, no | 50 | 100 |
| sketch_paraphrase | same meaning (QQP) | yes, no | 50 | 100 |
| sketch_sentiment | review (SST-2) | good, bad | 50 | 100 |
| sketch_span_qa | question on a passage (SQuAD) | a span | ≈ 12 (exact match of a random slot) | 100 |
| sketch_cloze | fill the blank from the passage (ReCoRD) | a name or thing | ≈ 25 | 100 |
| sketch_yesno | yes/no question on a passage (BoolQ) | yes, no | 50 | 100 |
| sketch_commitment | is the speaker committed to it (CB), 240 training examples | yes, maybe, no | 33.3 | 100 |
| sketch_adversarial_paraphrase | pairs of nearly the same words (PAWS) | yes, no | 50 | 100 |
| sketch_word_sense | same sense of a word (WiC): 11 words to train on, 2 and 3 others to test | yes, no | 50 | 100 |
"""

import dataclasses
import functools
import random
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import seqio

from mpt_jax import metrics
from tasks import features
from tasks import sketch_world as world
from tasks.sketch_senses import SENSES

SEED = 20230301
SPLITS = {"train": (0, 1, 2, 3, 4, 5, 6), "validation": (7,), "test": (8, 9)}  # buckets of the hash, out of ten

Example = tuple[str, str, str]  # inputs, target, the facts that decide the split


def _join(**fields: str) -> str:
    return " ".join(f"{name}: {value}" for name, value in fields.items())


def entailment(rng: random.Random, label: str) -> Example:
    event, hypothesis = world.relate(rng, label)
    text = _join(premise=world.sentence(event, rng), hypothesis=world.sentence(hypothesis, rng))
    return text, label, f"{dataclasses.replace(event, negated=False)}"


def question_entailment(rng: random.Random, label: str) -> Example:
    asked = rng.choice(("who", "what", "where", "when"))
    event = world.draw_event(rng, detail=0.8)
    if asked == "where" and not event.place:
        event = dataclasses.replace(event, place=rng.choice(world.PLACES))
    if asked == "when" and not event.time:
        event = dataclasses.replace(event, time=rng.choice(world.TIMES))
    shown = event
    if label == "no":
        fixed = tuple(f for f in ("agent", "verb", "object") if f != {"who": "agent", "what": "object"}.get(asked))
        if asked in ("where", "when") and rng.random() < 0.4:
            shown = dataclasses.replace(event, place="") if asked == "where" else dataclasses.replace(event, time="")
        else:
            shown = world.alter(rng, event, fixed)
    elif rng.random() < 0.4:
        shown = world.synonym(rng, event)
    asked_of = dataclasses.replace(event, adjective="") if rng.random() < 0.5 else event
    text = _join(question=world.question(asked_of, asked), sentence=world.sentence(shown, rng))
    return text, label, f"{event}"


def paraphrase(rng: random.Random, label: str) -> Example:
    event = world.draw_event(rng, detail=0.6, negation=0.2)
    other = world.synonym(rng, event)
    if label == "no":
        other = (
            world.contradict(rng, other)
            if rng.random() < 0.4
            else world.alter(rng, other, ("agent", "verb", "object", "place", "time"))
        )
    first, second = (event, other) if rng.random() < 0.5 else (other, event)
    text = _join(sentence1=world.sentence(first, rng), sentence2=world.sentence(second, rng))
    return text, label, f"{dataclasses.replace(event, negated=False)}"


def sentiment(rng: random.Random, label: str) -> Example:
    aspects = rng.sample(list(world.ASPECTS), 2)
    good = label == "good"

    def claim(aspect: str, favourable: bool) -> str:
        if rng.random() < 0.2:  # "not dirty" praises
            return f"the {aspect} was {rng.choice(('not', 'never', 'hardly'))} {rng.choice(world.ASPECTS[aspect][favourable])}"
        return f"the {aspect} was {rng.choice(world.ASPECTS[aspect][not favourable])}"

    first, second = aspects
    form = rng.randrange(5)
    if form == 0:  # the last word counts
        text = f"{claim(first, not good)} , but {claim(second, good)} ."
    elif form == 1:
        text = f"although {claim(first, not good)} , {claim(second, good)} ."
    elif form == 2:
        text = f"{claim(first, good)} , even though {claim(second, not good)} ."
    else:
        text = f"{claim(first, good)} and {claim(second, good)} ."
    return f"review: {text}", label, text


def _tell(rng: random.Random, events: list[world.Event]) -> str:
    return " ".join(world.sentence(event, rng) for event in events)


def span_qa(rng: random.Random, label: str) -> Example:
    events = world.passage(rng, rng.choice((2, 3)))
    event = rng.choice(events)
    asked = rng.choice(["who", "what"] + ["where"] * bool(event.place) + ["when"] * bool(event.time))
    about = dataclasses.replace(event, adjective="") if asked != "what" and rng.random() < 0.5 else event
    if rng.random() < 0.6 and asked != "where":
        about = dataclasses.replace(about, place="")
    if rng.random() < 0.6 and asked != "when":
        about = dataclasses.replace(about, time="")
    text = _join(question=world.question(about, asked), context=_tell(rng, events))
    return text, world.answer(event, asked), f"{sorted(map(str, events))}"


def cloze(rng: random.Random, label: str) -> Example:
    events = world.passage(rng, rng.choice((2, 3)))
    event = rng.choice(events)
    blank_agent = rng.random() < 0.5
    wanted = event.agent if blank_agent else event.object
    told = dataclasses.replace(event, adjective="", place="", time="")
    told = dataclasses.replace(told, verb=world.VERBS[event.verb].same or event.verb)
    blanked = world.sentence(told, form=rng.choice(("active", "passive"))).split()
    blanked = ["___" if word == wanted else word for word in blanked]
    text = _join(query=" ".join(blanked), passage=_tell(rng, events))
    return text, wanted, f"{sorted(map(str, events))}"


def yesno(rng: random.Random, label: str) -> Example:
    events = world.passage(rng, rng.choice((2, 3)))
    event, other = rng.sample(events, 2)
    if label == "yes":
        asked = world.generalise(rng, event)
    else:  # somebody else did it, or they did something else: every word of the question may stand in the passage
        asked = dataclasses.replace(event, agent=other.agent, place="", time="")
        if rng.random() < 0.4:
            asked = world.generalise(rng, asked)
        if rng.random() < 0.3 and world.VERBS[event.verb].opposite:
            asked = dataclasses.replace(event, verb=world.VERBS[event.verb].opposite, time="")
    text = _join(question=world.question(asked, "did"), passage=_tell(rng, events))
    return text, label, f"{sorted(map(str, events))}"


# How a frame commits its speaker to what is embedded: as a clause (with a past sentence) or as an infinitive.
CLAUSES = {
    "yes": ("knows that", "realised that", "is glad that", "forgot that", "does not know that", "noticed that", "is sorry that"),
    "maybe": ("thinks that", "believes that", "hopes that", "says that", "does not believe that", "was told that", "doubts that"),
    "no": ("wrongly thinks that", "pretended that", "lied that", "dreamed that", "falsely said that", "imagined that"),
}
INFINITIVES = {
    "yes": ("managed to", "did not forget to", "remembered to", "did not fail to", "was able to"),
    "maybe": ("wanted to", "hoped to", "did not want to", "planned to", "promised to"),
    "no": ("forgot to", "failed to", "did not manage to", "was not able to", "did not remember to", "refused to"),
}


def commitment(rng: random.Random, label: str) -> Example:
    event = world.draw_event(rng, person=0.2, detail=0.3)
    denied = rng.random() < 0.5  # the hypothesis may be the negation of what is embedded; "maybe" stays
    held = {"yes": "no", "no": "yes"}.get(label, label) if denied else label
    if rng.random() < 0.5:
        speaker = rng.choice([n for n in world.NAMES if n not in (event.agent, event.object)])
        frame = rng.choice(CLAUSES[held])
        premise = f"{speaker} {frame} {world.sentence(event, form='active')}"
    else:
        frame = rng.choice(INFINITIVES[held])
        verb = world.VERBS[event.verb].base
        rest = world.sentence(event, form="active").split()[2:]
        premise = f"{event.agent} {frame} {verb} {' '.join(rest)}"
    claim = dataclasses.replace(event, negated=True) if denied else world.generalise(rng, event)
    hypothesis = world.sentence(claim, form="active")
    return _join(premise=premise, hypothesis=hypothesis), label, f"{frame} {event}"


def _both(rng: random.Random, one: world.Event, two: world.Event) -> str:
    return f"{world.sentence(one, rng)[:-2]} and {world.sentence(two, rng)}"


def _placed(rng: random.Random, event: world.Event) -> world.Event:
    """The event with a place or a time: without, there are so few sentences that pretraining would know them."""
    return event if event.place or event.time else dataclasses.replace(event, time=rng.choice(world.TIMES))


def adversarial_paraphrase(rng: random.Random, label: str) -> Example:
    kind = rng.randrange(6)
    if kind < 3:
        first, second, facts = _other_word(rng, label)
    elif kind == 3:
        first, second, facts = _other_roles(rng, label)
    else:
        first, second, facts = _other_event(rng, label, swap_agents=kind == 4)
    return _join(sentence1=first, sentence2=second), label, facts


def _other_word(rng: random.Random, label: str) -> Example:
    """One word makes the difference, while a paraphrase may have two of its own; sentences and facts."""
    event = _placed(rng, world.draw_event(rng, detail=0.6))
    fields = tuple(f for f in ("agent", "verb", "object", "place", "time") if getattr(event, f))
    other = world.synonym(rng, event) if label == "yes" else world.alter(rng, event, fields)
    first, second = world.sentence(event, rng), world.sentence(other, rng)
    if first == second:
        active = world.sentence(other, form="active")
        second = active if first != active else world.sentence(other, form="passive")
    return first, second, f"{event}"


def _other_roles(rng: random.Random, label: str) -> Example:
    """Who did it to whom; sentences and facts."""
    event = _placed(rng, world.draw_event(rng, person=1.0, detail=0.6))
    other = event if label == "yes" else dataclasses.replace(event, agent=event.object, object=event.agent)
    forms = rng.choice((("active", "passive"), ("passive", "active"), ("active", "fronted"), ("passive", "passive")))
    if label == "yes" and forms not in (("active", "passive"), ("passive", "active")):
        forms = ("active", "passive")  # the same words would be no paraphrase to find
    first, second = (world.sentence(e, form=f) for e, f in zip((event, other), forms, strict=True))
    return first, second, f"{event}"


def _other_event(rng: random.Random, label: str, swap_agents: bool) -> Example:
    """Which of two did which, or where, when and with what; sentences and facts."""
    one, two = world.passage(rng, 2)
    others = [one, two]
    if label == "no":
        fields = {"agent": two.agent}
        if not swap_agents and not one.about_person and not two.about_person:
            details = {"place": two.place, "time": two.time, "adjective": two.adjective}
            fields = {k: v for k, v in details.items() if v != getattr(one, k)} or fields
        field = "agent" if swap_agents else rng.choice(sorted(fields))
        swapped: dict[str, Any] = {field: getattr(two, field)}
        back: dict[str, Any] = {field: getattr(one, field)}
        others = [dataclasses.replace(one, **swapped), dataclasses.replace(two, **back)]
    if rng.random() < 0.5:
        others.reverse()
    first, second = _both(rng, one, two), _both(rng, *others)
    if first == second:
        second = _both(rng, others[1], others[0])
    return first, second, f"{sorted(map(str, (one, two)))}"


def word_sense(rng: random.Random, label: str) -> Example:
    word = rng.choice(list(SENSES))
    one, two = rng.sample(list(SENSES[word].values()), 2)
    pair = rng.sample(one, 2) if label == "yes" else [rng.choice(one), rng.choice(two)]
    rng.shuffle(pair)
    first, second = (f"{phrase.format(n=rng.choice(world.NAMES))} ." for phrase in pair)
    # Split by words. Were it by pairs, a sentence whose like pairs are trained on would have the unlike ones left for the test.
    return _join(word=word, sentence1=first, sentence2=second), label, word


@dataclasses.dataclass(frozen=True)
class Sketch:
    """One generated task: its examples, labels ("" = free text) and sizes; `chance` and ceiling are percentages."""

    draw: Callable[[random.Random, str], Example]
    labels: tuple[str, ...]
    chance: float
    train: int = 4000
    ceiling: float = 100.0


TASKS = {
    "entailment": Sketch(entailment, ("yes", "maybe", "no"), 33.33),
    "question_entailment": Sketch(question_entailment, ("yes", "no"), 50.0),
    "paraphrase": Sketch(paraphrase, ("yes", "no"), 50.0),
    "sentiment": Sketch(sentiment, ("good", "bad"), 50.0),
    "span_qa": Sketch(span_qa, ("",), 12.0),
    "cloze": Sketch(cloze, ("",), 25.0),
    "yesno": Sketch(yesno, ("yes", "no"), 50.0, train=2000),
    "commitment": Sketch(commitment, ("yes", "maybe", "no"), 33.33, train=240),
    "adversarial_paraphrase": Sketch(adversarial_paraphrase, ("yes", "no"), 50.0, train=2000),
    "word_sense": Sketch(word_sense, ("yes", "no"), 50.0, train=2000),
}
SOURCES = ("entailment", "question_entailment", "paraphrase", "sentiment", "span_qa", "cloze")
TARGETS = ("yesno", "commitment", "adversarial_paraphrase", "word_sense")
EVAL_SIZE = {"validation": 240, "test": 600}


def examples(name: str, split: str) -> Iterator[dict[str, str]]:
    """The examples of one split, always the same: {"inputs": …, "targets": …}."""
    task = TASKS[name]
    rng = random.Random(zlib.crc32(f"{SEED} {name} {split}".encode()))
    seen: set[str] = set()
    size = EVAL_SIZE.get(split, task.train)
    while len(seen) < size:
        label = task.labels[len(seen) % len(task.labels)]
        inputs, target, facts = task.draw(rng, label)
        if zlib.crc32(facts.encode()) % 10 in SPLITS[split] and inputs not in seen:
            seen.add(inputs)
            yield {"inputs": world.tidy(inputs), "targets": target}


def sentences(text: str) -> list[str]:
    """The sentences, questions and fields of a text, without their marks."""
    return [part.strip() for part in re.split(r"[.?|;:]", text)]


@functools.cache
def held_out() -> frozenset[str]:
    """Every sentence of the validation and test sets: what pretraining must not show (but for word_sense's few sentences)."""
    names = [name for name in TASKS if name != "word_sense"]
    inputs = (example["inputs"] for name in names for split in EVAL_SIZE for example in examples(name, split))
    return frozenset(part for text in inputs for part in sentences(text) if len(part.split()) > 3)


for _name, _task in TASKS.items():
    seqio.TaskRegistry.add(
        f"sketch_{_name}",
        source=features.RowsSource(functools.partial(examples, _name), SPLITS),
        preprocessors=features.TOKENIZE,
        output_features=features.output_features(),
        postprocess_fn=metrics.strip,
        metric_fns=[metrics.accuracy if _task.labels != ("",) else metrics.squad],
    )
seqio.MixtureRegistry.add("sketch_sources", [f"sketch_{name}" for name in SOURCES], default_rate=1)
seqio.MixtureRegistry.add("sketch_targets", [f"sketch_{name}" for name in TARGETS], default_rate=1)
