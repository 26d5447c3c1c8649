"""The letters used in names, docstrings and tests.

    B  batch            T  input length      P  prompt length     S  P + T
    L  target length    D  model width       F  feed-forward width
    H  heads            K  head width        V  vocabulary
    N  streams (task_ids)                    G  groups (independent prompts)            R  rank
    C  labels of an example (targets of one input)                 M  longest generated output

A batch is a dict of arrays; `BATCH_SHAPES` is its contract between the loader and the train step.
"""

BATCH_SHAPES = {
    "encoder_tokens": "B T",  # int32, 0 = padding
    "decoder_input_tokens": "B L",  # int32, targets shifted right, starts with 0
    "decoder_target_tokens": "B L",  # int32, 0 = padding
    "loss_weights": "B L",  # float32, 1 on target tokens (EOS included), 0 on padding
    "task_ids": "B",  # int32, number of the stream
}
