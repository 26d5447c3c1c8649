"""The letters used in names, docstrings and tests.

    B  batch            T  input length      P  prompt length     S  P + T
    L  target length    D  model width       F  feed-forward width
    H  heads            K  head width        V  vocabulary
    N  streams (task_ids)                    G  groups (independent prompts)            R  rank
    C  labels of an example (targets of one input)                 M  longest generated output
    E  most examples of a packed row

A batch is a dict of arrays; `BATCH_SHAPES` is its contract between the loader and the train step, `PACKED_SHAPES` that of a
packed batch, whose rows hold up to E examples each: there B counts rows, and S and L are positions of a row.
"""

BATCH_SHAPES = {
    "encoder_tokens": "B T",  # int32, 0 = padding
    "decoder_input_tokens": "B L",  # int32, targets shifted right, starts with 0
    "decoder_target_tokens": "B L",  # int32, 0 = padding
    "loss_weights": "B L",  # float32, 1 on target tokens (EOS included), 0 on padding
    "task_ids": "B",  # int32, number of the stream
}

PACKED_SHAPES = {
    "encoder_tokens": "B S",  # int32, 0 = padding, and where an example's prompt comes before its text
    "encoder_segments": "B S",  # int32, the number in its row, from 1 on, of the example that a position belongs to; 0 = padding
    "decoder_input_tokens": "B L",  # int32, each example's targets shifted right, starts with 0
    "decoder_target_tokens": "B L",
    "decoder_segments": "B L",
    "loss_weights": "B L",
    "task_ids": "B E",  # int32, of the row's examples; 0 where there are fewer
}
