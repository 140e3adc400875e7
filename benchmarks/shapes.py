"""The shapes that are timed, by name: every benchmark, chart and table takes its cases from here, or from a user's own
file (`read`), and nowhere else.

`SUITES` has a list of cases for each name:

* `sizes`: the cells over batch and hidden sizes that are usual on a CPU; `one-step`: T = 1, one step a call.
* `cells`: loops of LSTMCell, GRUCell and RNNCell, one call a step, and single steps (T = 1), against torch.nn's cells;
  cells of real models.
* `packed`: packed rows of different lengths. `lengths`: the same and smaller ones, packed, and padded with `lengths=`.
  Packed rows are compared with the same rows padded and with dense ones too.
* `grid`: every cell over hidden sizes and batch sizes, for heat maps. `flashrnn` and `deepbench`: others' benchmarks.
* `corners`: where cuDNN is expected to leave its fast paths: at the upper end of its kernel for small H, at batches
  that it is not made for; packed rows with two directions and several layers.
* `models`: layers of real models. Layer sizes are the source's; where it leaves batch or length open, they are a usual
  choice that a processor can do in seconds.
* `service`: one call at a time with pauses in between, or beside other processes that compute.
* `quantized`: small batches with every type of quantized weights; some of them with pauses.
* `sixteen-bit`: bfloat16 and float16, from one row to many, at sizes of other suites and between them.
* `variants`: layers with rnnfast's own options, against a loop of PyTorch's operations and the plain layer.
* `smoke`: as small as can be, for tests.
"""

from __future__ import annotations

import json
import re
from dataclasses import MISSING, fields
from itertools import product
from pathlib import Path

from rnnfast.benchmark.case import CELLS, KINDS, Case
from rnnfast.quantization import TYPES
from variants import VARIANTS, VariantCase

DEEPBENCH = "DeepBench, code/kernels/rnn_problems.h (github.com/baidu-research/DeepBench)"
FLASHRNN = "FlashRNN, speed experiments (github.com/NX-AI/flashrnn, arXiv 2412.07752)"
OWN = "rnnfast: input size = H"
# Bytes of a suite's name: file systems take 255 in all, and a figure's file has much besides.
MOST_LETTERS = 100


def deepbench() -> list[Case]:
    """The training set and the server inference set; DeepBench's cells have as many inputs as hidden units."""
    vanilla = [("RNN", hidden, batch, 50) for hidden, batch in product((1760, 2048, 2560), (16, 32, 64, 128))]
    lstm = [("LSTM", hidden, batch, 25) for hidden, batch in product((512, 1024, 2048, 4096), (16, 32, 64, 128))]
    lstm += [("LSTM", 1536, batch, 50) for batch in (8, 16, 32)] + [("LSTM", 256, batch, 150) for batch in (16, 32, 64)]
    # The set leaves out H = 2816 at 1500 steps, which was too much memory for the cards of its time.
    gru = [("GRU", 2816, 32, steps) for steps in (750, 375, 187)]
    gru += [("GRU", hidden, 32, steps) for hidden, steps in product((2048, 1536, 2560), (1500, 750, 375, 187))]
    gru += [("GRU", 512, 32, 1), ("GRU", 1024, 32, 1500), ("GRU", 1024, 64, 1500)]
    few = (1, 2, 4)
    inference = [("LSTM", hidden, batch, 25) for hidden, batch in product((512, 1024, 2048), few)]
    inference += [("LSTM", 1536, batch, 50) for batch in few] + [("LSTM", 256, batch, 150) for batch in few]
    long = (1500, 750, 375, 187)
    inference += [
        ("GRU", hidden, batch, steps) for hidden, batch, steps in product((2816, 2048, 1536, 2560), few, long)
    ]
    inference += [("GRU", 512, batch, 1) for batch in few] + [("GRU", 1024, batch, 1500) for batch in few]
    return [
        Case(cell, batch, hidden, steps=steps, source=f"{DEEPBENCH}: {part}")
        for part, shapes in (("training_set", vanilla + lstm + gru), ("inference_server_set", inference))
        for cell, hidden, batch, steps in shapes
    ]


def flashrnn() -> list[Case]:
    """The headline shape, B = 16, T = 1024, H = 768, and sweeps of batch and length around it."""
    shapes = [(16, 1024), *((batch, 1024) for batch in (1, 4, 64, 256)), *((16, steps) for steps in (128, 512, 2048))]
    # Half as long, for runs of minutes (gpu_check.py).
    shapes += [(1, 512), (64, 512)]
    return [
        Case(cell, batch, 768, steps=steps, source=FLASHRNN)
        for cell, (batch, steps) in product(("LSTM", "GRU"), shapes)
    ]


MODELS = [
    Case(
        "LSTM",
        8,
        1024,
        steps=100,
        directions=2,
        model="DeepSpeech2",
        source="github.com/SeanNaren/deepspeech.pytorch, configs/train_config.py: LSTM of 1024, both directions (their "
        "sum goes on), one of 5 layers; 8 utterances of 2 s in 20 ms frames",
    ),
    Case(
        "LSTM",
        4,
        2048,
        steps=50,
        input_size=640,
        proj_size=640,
        layers=2,
        model="RNN-T predictor",
        source="He et al. 2019, arXiv 1811.06621, section 2: two layers of 2048 with a projection to 640; 50 labels",
    ),
    Case(
        "LSTM",
        64,
        256,
        steps=26,
        input_size=512,
        directions=2,
        model="CRNN OCR",
        source="Shi et al. 2015, arXiv 1507.05717; github.com/meijieru/crnn.pytorch: BiLSTM of 256 on 512 channels, "
        "26 columns of a 32 x 100 image, batch 64",
    ),
    Case(
        "LSTM",
        32,
        256,
        steps=16,
        input_size=2148,
        directions=2,
        packed=True,
        model="BiLSTM tagger",
        source="flair/ner-english-fast (huggingface.co), training.log: LSTM(2148, 256), both directions, batch 32; "
        "sentences of 16 words in the mean",
    ),
    Case(
        "LSTM",
        16,
        512,
        steps=75,
        layers=2,
        model="EnCodec",
        source="github.com/facebookresearch/encodec, modules/lstm.py and seanet.py: two layers of 512 at 75 frames a "
        "second; 16 clips of 1 s",
    ),
    Case(
        "LSTM",
        4,
        768,
        steps=250,
        layers=2,
        model="Demucs denoiser",
        source="github.com/facebookresearch/denoiser, dns48: hidden 48, depth 5, so two layers of 768, causal, at 62.5 "
        "frames a second; 4 clips of 4 s",
    ),
    Case(
        "LSTM",
        8,
        128,
        steps=128,
        input_size=512,
        resets=0.01,
        model="PPO-LSTM",
        source="github.com/vwxyzjn/cleanrl, ppo_atari_lstm.py: LSTM(512, 128), 8 environments of 128 steps; an episode "
        "ends once in 100 steps",
    ),
    Case(
        "GRU",
        16,
        512,
        steps=64,
        model="DreamerV3",
        source="Hafner et al. 2023, arXiv 2301.04104 (first version), model size S: GRU of 512; batch 16 x 64",
    ),
    Case(
        "LSTM",
        1,
        128,
        steps=125,
        input_size=257,
        layers=2,
        model="DTLN",
        source="github.com/breizhn/DTLN, DTLN_model.py: two layers of 128 on 257 frequencies, a frame each 8 ms; 1 s",
    ),
    Case(
        "LSTM",
        50,
        128,
        steps=50,
        layers=2,
        model="char-LM",
        source="github.com/karpathy/char-rnn, train.lua: two layers of 128, batch 50, 50 characters",
    ),
]


CELLS_OF_MODELS = [
    Case(
        "LSTM",
        16,
        1024,
        steps=20,
        input_size=768,
        cells=True,
        model="Tacotron2 decoder",
        source="github.com/NVIDIA/tacotron2, model.py and hparams.py: attention_rnn, an LSTMCell of 1024 on 256 "
        "features of the prenet and 512 of the encoder; 16 utterances, 20 frames",
    ),
    Case(
        "GRU",
        2000,
        64,
        steps=5,
        cells=True,
        model="GatedGraphConv",
        source="github.com/pyg-team/pytorch_geometric, nn/conv/gated_graph_conv.py: a GRUCell with as many inputs as "
        "channels; 64 channels, 2000 nodes, 5 layers",
    ),
    Case(
        "LSTM",
        64,
        128,
        steps=20,
        cells=True,
        model="BabyAI PPO",
        source="github.com/mila-iqia/babyai, model.py and arguments.py: an LSTMCell of 128 on 128 features, 1280 "
        "frames a batch and 20 steps of recurrence, so 64 rows",
    ),
]


def cells() -> list[Case]:
    """Every cell in a loop and in a single step, from one row to a decoder's batch; then cells of models."""
    sizes = ((1, 64), (1, 256), (8, 64), (8, 256), (32, 128), (32, 512))
    found = [
        Case(cell, *size, steps=steps, cells=True, source=OWN) for steps, cell, size in product((20, 1), CELLS, sizes)
    ]
    return found + CELLS_OF_MODELS


def service() -> list[Case]:
    """Small batches, called with pauses of each length; some of them without, beside busy neighbours."""
    shapes = [*(("LSTM", 1, hidden) for hidden in (208, 256, 320)), ("LSTM", 8, 256), ("LSTM", 12, 144)]
    shapes += [("GRU", 1, 256), ("GRU", 1, 320), ("RNN", 1, 256)]
    beside = [("LSTM", 1, 256), ("LSTM", 8, 256), ("GRU", 1, 256)]
    cases = [Case(*shape, pause_ms=pause, source=OWN) for shape, pause in product(shapes, (1.0, 10.0, 50.0, 200.0))]
    return cases + [Case(*shape, neighbours=count, source=OWN) for shape, count in product(beside, (1, 2))]


def quantized() -> list[Case]:
    """Every type of quantized weights: one row and a few, weights that fit a core's cache and that do not; after pauses
    the one that rounds nothing and the smallest."""
    shapes = [*product(("LSTM",), (1, 3, 8), (128, 256, 512, 1024)), ("GRU", 1, 256), ("GRU", 1, 1024), ("GRU", 3, 512)]
    cases = [Case(*shape, steps=60, quantized=kind, source=OWN) for shape, kind in product(shapes, TYPES)]
    paused = [("LSTM", 1, 256), ("LSTM", 8, 256), ("LSTM", 12, 144), ("GRU", 1, 256), ("RNN", 1, 256)]
    return cases + [
        Case(*shape, pause_ms=pause, quantized=kind, source=OWN)
        for shape, pause, kind in product(paused, (50.0, 200.0), ("float32", "int8"))
    ]


def sixteen_bit() -> list[Case]:
    """Weights that fit a core's cache and that do not, rows from one to more than the kernels take at once."""
    found = [("LSTM", batch, hidden) for batch, hidden in ((1, 64), (1, 512), (8, 64), (8, 320), (8, 512), (12, 144))]
    found += [("LSTM", batch, hidden) for batch, hidden in ((24, 96), (48, 512), (64, 64), (64, 256))]
    found += [("GRU", 1, 256), ("GRU", 8, 256), ("GRU", 48, 512), ("RNN", 8, 256), ("RNN", 64, 256)]
    return [Case(*shape, steps=60, dtype=dtype, source=OWN) for shape, dtype in product(found, ("bfloat16", "float16"))]


def with_options() -> list[Case]:
    """Every variant of every cell at the size for which something is asked of it (`variants.ASKED_OF`); some of them
    with one row of a small layer, and one with many rows of a large one."""
    found = [("LSTM", name) for name in ("cell-norm-carried", "peephole", "coupled")] + [("GRU", "reset-before")]
    found += product(CELLS, ("layer-norm-separate", "layer-norm-joint", "zoneout", "heads"))
    of_sizes = {
        (16, 256): [(cell, name) for cell in CELLS for name in VARIANTS if cell in VARIANTS[name].cells],
        (1, 128): sorted(found, key=lambda pair: CELLS.index(pair[0])),
        (64, 512): [(cell, "layer-norm-joint") for cell in CELLS],
    }
    return [
        VariantCase(cell, *size, variant=name, source=OWN) for size, pairs in of_sizes.items() for cell, name in pairs
    ]


# Of `benchmarks/recompute.py`, which times rnnfast's layers against themselves: the longest is one that does not fit
# without, in many a machine; the others are usual lengths.
RECOMPUTE = [
    Case("LSTM", 8, 256, steps=100_000, input_size=16),
    *[Case(cell, 8, 256, steps=4000) for cell in ("LSTM", "GRU", "RNN")],
    Case("LSTM", 32, 128, steps=2000, input_size=16),
    Case("GRU", 64, 512, steps=500),
]

SUITES: dict[str, list[Case]] = {
    "sizes": [
        Case(cell, batch, hidden, source=OWN) for cell, batch, hidden in product(CELLS, (1, 8, 64), (64, 256, 512))
    ],
    "one-step": [
        Case(cell, batch, hidden, steps=1, source=OWN) for cell, batch, hidden in product(CELLS, (1, 8), (64, 256))
    ],
    "cells": cells(),
    "packed": [Case(cell, 64, 256, packed=True, source=OWN) for cell in CELLS],
    "lengths": [
        Case(cell, batch, hidden, packed=not lengths, lengths=lengths, source=OWN)
        for cell, (batch, hidden), lengths in product(CELLS, ((16, 128), (64, 256)), (False, True))
    ],
    "grid": [
        Case(cell, batch, hidden, source=OWN)
        for cell, hidden, batch in product(CELLS, (64, 128, 256, 512, 1024, 2048), (1, 4, 16, 64, 256))
    ],
    "corners": [
        *(Case("LSTM", batch, hidden, source=OWN) for hidden, batch in ((192, 32), (192, 64), (168, 62))),
        *(Case("LSTM", 32, hidden, layers=3, directions=2, packed=True, source=OWN) for hidden in (320, 512)),
    ],
    "flashrnn": flashrnn(),
    "deepbench": deepbench(),
    "models": MODELS,
    "service": service(),
    "quantized": quantized(),
    "sixteen-bit": sixteen_bit(),
    "variants": with_options(),
    "smoke": [
        Case("LSTM", 2, 8, steps=3),
        Case("GRU", 3, 8, steps=4, packed=True),
        Case("RNN", 3, 8, steps=4, lengths=True, directions=2),
        Case("LSTM", 2, 8, steps=6, resets=0.3, proj_size=4, layers=2),
    ],
}


def read(path: Path) -> tuple[str, list[Case]]:
    """One's own suite, from a JSON file: a list of cases, objects with the fields of `Case`, or an object with the
    suite's ``name`` and the list, ``cases``.

    Returns:
        The suite's name (the file's, unless it has one) and its cases.

    Raises:
        ValueError: it is no such file; the message names the case (the first is 0), the field, what is expected of it
            and what stands there.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected JSON in UTF-8, got other bytes") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: expected a list of cases, got lists or objects nested too deeply to read") from error
    whole = {"cases": found} if isinstance(found, list) else found
    if not isinstance(whole, dict) or not isinstance(whole.get("cases"), list) or not whole["cases"]:
        raise ValueError(f"{path}: expected a list of cases, or an object with cases and a name; got {shown(found)}")
    if unknown := sorted(set(whole) - {"name", "cases"}):
        raise ValueError(f"{path}: {unknown[0]}: unknown, expected one of name, cases")
    name = whole.get("name", path.stem)
    # It is a part of a file's name.
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"{path}: name: expected letters, digits, '-', '_' and '.', got {shown(name)}")
    if (letters := len(name.encode())) > MOST_LETTERS:
        raise ValueError(f"{path}: name: expected at most {MOST_LETTERS} characters (bytes in UTF-8), got {letters}")
    if name in SUITES:
        raise ValueError(f"{path}: name: {name!r} is one of the suites here; expected another")
    cases: list[Case] = []
    for number, entry in enumerate(whole["cases"]):
        try:
            cases.append(case_of(entry))
        except ValueError as error:
            raise ValueError(f"{path}: case {number}: {error}") from error
        if (first := [case.name for case in cases].index(cases[-1].name)) != number:
            raise ValueError(
                f"{path}: case {number}: expected a name of its own, got that of case {first} ({cases[-1].name}); what "
                "differs in its rate of resets alone needs a model"
            )
    return name, cases


def case_of(entry: object) -> Case:
    """The case that an object of a JSON file describes.

    Raises:
        ValueError: a field that is unknown, missing, or has a value that it cannot have.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object, got {shown(entry)}")
    known = [field.name for field in fields(Case)]
    for name in entry:
        if name not in known:
            raise ValueError(f"{name}: unknown, expected one of {', '.join(known)}")
    for field in fields(Case):
        if field.default is MISSING and field.name not in entry:
            raise ValueError(f"{field.name}: expected {KINDS[str(field.type)]}, got nothing")
    return Case(**entry)


def shown(value: object, most: int = 60) -> str:
    """A JSON value in a message."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return "lists or objects nested too deeply to show"
    return text if len(text) <= most else f"{text[:most]}..."
