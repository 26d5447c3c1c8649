"""What the embedded T5, `mini`, is pretrained on, stage by stage (`make mini`).

Three lessons of auxiliary exercises (`sketch_exercises.py`); span corruption and then prefix language modelling, on English
(`$MPT_JAX_CORPUS`) and on running text of the generated suite, both mixed with the last lesson. No example of the suite's ten
tasks is among it.
"""

import functools
from collections.abc import Iterator

import seqio

from tasks import features, pretrain, sketch_exercises, sketch_text

ENGLISH_EXAMPLES = 100_000
SIZES = {"train": 1, "validation": 100}  # the split's part of each generated set is 1/size

SEEDS = {"train": 1, "validation": 2}


def _texts(split: str, documents: int) -> Iterator[dict[str, str]]:
    for text in sketch_text.text(100 + SEEDS[split], documents // SIZES[split]):
        yield {"text": text}


def _exercises(split: str, count: int, lesson: int) -> Iterator[dict[str, str]]:
    return sketch_exercises.exercises(200 + SEEDS[split], count // SIZES[split], sketch_exercises.LESSONS[lesson])


_text_source = features.RowsSource(functools.partial(_texts, documents=120_000), SIZES)
pretrain.register("sketch_text_spans", pretrain.span_corruption_pairs, source=_text_source)
pretrain.register("sketch_text_prefix", pretrain.prefix_lm_pairs, source=_text_source, seed=1)
pretrain.register("english_spans", pretrain.span_corruption_pairs, max_examples=ENGLISH_EXAMPLES)
pretrain.register("english_prefix", pretrain.prefix_lm_pairs, max_examples=ENGLISH_EXAMPLES, seed=1)
for _lesson, _count in enumerate((200_000, 300_000, 600_000)):
    seqio.TaskRegistry.add(
        f"sketch_lesson_{_lesson + 1}",
        source=features.RowsSource(functools.partial(_exercises, count=_count, lesson=_lesson), SIZES),
        preprocessors=features.TOKENIZE,
        output_features=features.output_features(),
        metric_fns=[],
    )
# Per example; a text's targets are several times as long as an exercise's, so that the tokens are about even.
seqio.MixtureRegistry.add(
    "mini_spans", [("sketch_lesson_3", 0.75), ("sketch_text_spans", 0.1), ("sketch_text_prefix", 0.05), ("english_spans", 0.1)]
)
seqio.MixtureRegistry.add("mini_prefix", [("sketch_lesson_3", 0.75), ("sketch_text_prefix", 0.15), ("english_prefix", 0.1)])
