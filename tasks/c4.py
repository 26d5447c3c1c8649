"""C4 from TFDS: T5's span corruption, and the prefix language modelling of LM adaptation (Lester et al. 2021, §3.1).

The token cache holds a whole split, so these tasks read the first documents only (some 90 million tokens of training text); for
another part of C4, register a task as below. For text files of your own: `pretrain.py`.
"""

import seqio

from mpt_jax.config import OFFICIAL
from tasks import pretrain

VERSION = "c4/en:3.1.0"
DOCUMENTS = {"train": "train[:200000]", "validation": "validation[:2000]"}
DOCUMENTS |= {f"{OFFICIAL}{name}": slice_ for name, slice_ in DOCUMENTS.items()}  # so that mixtures of official splits have them

for _name, _objective in (("c4_span_corruption", pretrain.span_corruption_pairs), ("c4_prefix_lm", pretrain.prefix_lm_pairs)):
    pretrain.register(_name, _objective, source=seqio.TfdsDataSource(tfds_name=VERSION, splits=DOCUMENTS))
