"""MPT's six source tasks from TFDS (downloaded at first use), in ATTEMPT's formats, and their mixture `mpt_sources`.

Splits follow ATTEMPT: 1,000 training examples are held out for validation and the official validation split is the test split
(MNLI: validation = mismatched, test = matched). The held-out ones are the first of TFDS's shuffled order. Mixing rates are
proportional to size, capped at 2^18, as in the code that derives from MPT's.
"""

import seqio

from tasks import features, preprocessors

CAP = 2**18
HELD_OUT = {"train": "train[1000:]", "validation": "train[:1000]", "test": "validation"}
MNLI_SPLITS = {"train": "train", "validation": "validation_mismatched", "test": "validation_matched"}

SOURCES = {  # name: (TFDS dataset, splits, training examples of the dataset)
    "mnli": ("glue/mnli:2.0.0", MNLI_SPLITS, 392_702),
    "qnli": ("glue/qnli:2.0.0", HELD_OUT, 104_743),
    "qqp": ("glue/qqp:2.0.0", HELD_OUT, 363_846),
    "sst2": ("glue/sst2:2.0.0", HELD_OUT, 67_349),
    "squad": ("squad/v1.1:3.0.0", HELD_OUT, 87_599),
    "record": ("super_glue/record:1.0.2", HELD_OUT, 100_730),
}

for _name, (_dataset, _splits, _) in SOURCES.items():
    _format = preprocessors.format_of(_name)
    seqio.TaskRegistry.add(
        _name,
        source=seqio.TfdsDataSource(tfds_name=_dataset, splits=_splits),
        preprocessors=[_format.preprocessor, *features.TOKENIZE],
        output_features=features.output_features(),
        postprocess_fn=_format.postprocess_fn,
        metric_fns=list(_format.metric_fns),
    )

seqio.MixtureRegistry.add("mpt_sources", [(name, min(size, CAP)) for name, (_, _, size) in SOURCES.items()])
