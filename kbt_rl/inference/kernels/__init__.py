"""The named fast paths in machine code (numba), each a restatement of the definition in ``network``.

``outputs``: one layer with independent outputs (``shared``, ``neuron``). ``average``: such a layer under several label
noises. ``classes``: one softmax layer of independent
classes. ``small``: two layers with one output, one head or many. ``roots``: what they share. An update is one call,
which no signal handler can interrupt. ``tests/inference/test_engine.py`` holds each to the definition.
"""
