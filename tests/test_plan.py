"""The plan of the CUDA kernels (csrc/cuda/plan.h), without a GPU: what is legal, what the model may say, the command.

All times are predictions, and nothing here is timed.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import plan_constants
import plan_table
import rnnfast
from rnnfast import cli, cuda_plan, explain_command, ops
from rnnfast.cell_types import CELLS
from rnnfast.cuda_plan import ARCHITECTURES, ARITHMETICS, Illegal, Plan, plan

CSRC = Path(__file__).resolve().parent.parent / "csrc"
LIMITS = ["launch", "exchange", "mma", "issue", "shared memory", "L2", "HBM", "latency"]
PERSISTENT = ("block", "cluster", "grid", "grid-barrier")
FORCED = ("step", "split", *PERSISTENT)

pytestmark = pytest.mark.skipif(ops.library_error is not None, reason=str(ops.library_error))


def constant(name: str) -> int:
    """Of csrc/cuda/persistent/persistent.h."""
    found = re.search(rf"\b{name} = (\d+)", (CSRC / "cuda/persistent/persistent.h").read_text())
    assert found is not None, name
    return int(found[1])


def check(found: Plan, hidden: int, batch: int, directions: int) -> None:
    """That a persistent layout can be launched on its device."""
    at, device = found.layout, found.device
    units, rows, threads = at["units"], 8 * at["batch_tiles"], 32 * at["warps"]
    assert units % 8 == 0
    assert (at["group"] - 1) * units < hidden <= at["group"] * units, "a block without units, or a unit without a block"
    assert 1 <= at["batch_tiles"] <= 4
    assert 1 <= at["warps"] <= constant("kMostWarps")
    assert units * rows <= constant("kMostCells") * threads
    assert 0 < at["shared_bytes"] <= device["shared_per_block"]
    assert at["row_warps"] * at["sum_warps"] <= at["warps"]
    assert at["groups"] == -(-batch // rows) * directions
    if found.name == "block":
        assert at["group"] == 1
        assert at["waves"] == -(-at["groups"] // device["sms"])
    elif found.name == "cluster":
        assert device["sm"] >= 90
        assert 2 <= at["group"] <= min(device["largest_cluster"], constant("kMostCluster"))
        assert 1 <= device["clusters"] <= device["sms"] // at["group"]
        assert at["waves"] == -(-at["groups"] // device["clusters"])
    else:
        assert found.name in ("grid", "grid-barrier")
        assert at["group"] >= 2
        at_once = min(at["groups"], at["groups_at_once"])
        assert at_once * at["group"] <= device["sms"], "not all blocks of a launch at the same time"
        # As many groups of both directions as there is room for, the others in launches of their own.
        assert at["groups_at_once"] == device["sms"] // at["group"] // directions * directions
        assert at["waves"] == -(-at["groups"] // at["groups_at_once"])


def random_request(draw: random.Random) -> dict[str, Any]:
    mode = draw.choice(list(CELLS))
    return {
        "mode": mode,
        "arithmetic": draw.choice(ARITHMETICS),
        "hidden_size": draw.choice([1, 8, 9, draw.randint(1, 300), draw.randint(1, 3000), 128 << draw.randint(0, 5)]),
        "batch": draw.choice([1, 8, 9, 16, 17, draw.randint(1, 100), draw.randint(1, 3000)]),
        "steps": draw.choice([1, 2, 100, 1024]),
        "directions": draw.choice([1, 2]),
        "projection": draw.choice([0, 0, 0, 32]) if CELLS[mode].may_project else 0,
        "training": draw.random() < 0.5,
        "backward": draw.random() < 0.5,
        "in_graph": draw.random() < 0.5,
        "sm": draw.choice(ARCHITECTURES),
        # Slices of a card too: of an H100 16, 32, 60 or 132 SMs.
        "sms": draw.choice([0, 0, 1, 2, 7, 14, 16, 32, 60]),
    }


def test_plans_are_legal() -> None:
    draw, names = random.Random(15), dict.fromkeys(FORCED, 0)
    refused: list[tuple[str, str]] = []
    for name, _ in itertools.product(("auto", *FORCED), range(1500)):
        request = random_request(draw)
        try:
            found = plan(**request, name=name)
        except Illegal as why:
            refused.append((name, str(why)))
            continue
        names[found.name] += 1
        assert name in ("auto", found.name)
        assert found.predicted_us > 0
        assert list(found.limits_us) == LIMITS
        assert found.limited_by in LIMITS
        assert all(0 <= us < float("inf") for us in found.limits_us.values())
        assert found.limits_us[found.limited_by] > 0
        assert not found.recompute
        assert found.why
        if found.persistent:
            check(found, request["hidden_size"], request["batch"], request["directions"])
            assert request["arithmetic"] != "float64"
            assert not request["projection"]
        else:
            assert found.name in ("step", "split")
    assert all(why.startswith(name.removesuffix("-barrier")) for name, why in refused)
    assert "auto" not in dict(refused)
    # The sample reaches all of them.
    assert all(count > 50 for count in names.values()), names


def test_nothing_cheaper_is_passed_over() -> None:
    draw = random.Random(16)
    for _ in range(300):
        request = random_request(draw)
        chosen = plan(**request)
        for name in FORCED:
            try:
                other = plan(**request, name=name)
            except Illegal:
                continue
            assert chosen.predicted_us <= other.predicted_us * (1 + 1e-6), (request, name)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_more_to_do_takes_no_less(sm: int, arithmetic: str, backward: bool) -> None:
    def us(hidden: int, batch: int) -> float:
        return plan("LSTM", arithmetic, hidden, batch, training=True, backward=backward, sm=sm).predicted_us

    batches = [1, 2, 8, 9, 16, 24, 64, 100, 256, 1000]
    for hidden in (5, 64, 200, 512, 1024):
        times = [us(hidden, batch) for batch in batches]
        assert times == sorted(times), (hidden, times)
    for batch in (1, 16, 200):
        times = [us(16 << i, batch) for i in range(9)]
        assert times == sorted(times), (batch, times)


def test_what_is_left_to_the_step_kernels() -> None:
    assert plan("LSTM", "float64", 64, 4).name == "step"
    assert plan("LSTM", "float64", 1024, 64).name == "split"
    assert "float64" in plan("LSTM", "float64", 64, 4).why
    projected = plan("LSTM", "bfloat16", 64, 4, projection=32)
    assert (projected.name, projected.layout["launches"]) == ("step", 2)
    assert "projection" in projected.why
    for name in PERSISTENT:
        with pytest.raises(Illegal, match=f"{name}: float64 runs step by step"):
            plan("LSTM", "float64", 64, 4, name=name)
        with pytest.raises(Illegal, match=f"{name}: a projection runs step by step"):
            plan("LSTM", "bfloat16", 64, 4, projection=32, name=name)
    assert plan("LSTM", "bfloat16", 8192, 16).name == "step"


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("projection", [0, 512])
def test_the_large_end_is_split(projection: int, backward: bool) -> None:
    """A block of the step kernels reads its weights again for every 8 to 32 batch indices, a library for 128 or so."""
    for mode, arithmetic in itertools.product(("LSTM", "GRU"), ARITHMETICS):
        sizes = (2048, 512, 100, 1, projection if CELLS[mode].may_project else 0)
        found = plan(mode, arithmetic, *sizes, backward=backward)
        assert (found.name, found.persistent) == ("split", False)
        assert found.layout["launches"] == (4 if sizes[-1] else 2)
        assert str(found).startswith(f"split: {found.layout['launches']} launches a step, a product of ")
        step = plan(mode, arithmetic, *sizes, backward=backward, name="step")
        assert found.predicted_us < step.predicted_us
        assert f"step {step.predicted_us:.2f} us" in found.why
        # Where a graph launches, the host's share is gone.
        small = (64, 4, 100, 1, 32 if sizes[-1] else 0)
        alone, graphed = (plan(mode, arithmetic, *small, name="split", in_graph=graph) for graph in (False, True))
        assert alone.limited_by == "launch"
        assert graphed.predicted_us < 0.8 * alone.predicted_us


def test_why_a_plan_is_not_possible() -> None:
    with pytest.raises(Illegal, match=r"cluster: needs compute capability 9\.0 \(sm_90\) or later, got sm_80"):
        plan("LSTM", "bfloat16", 256, 16, sm=80, name="cluster")
    with pytest.raises(Illegal, match=r"grid: needs \d+ KB of shared memory a block, there are 227 KB"):
        plan("LSTM", "float32", 2048, 16, name="grid")
    with pytest.raises(Illegal, match="grid: needs 4 blocks at the same time, one an SM; there are 3 SMs"):
        plan("LSTM", "bfloat16", 16, 256, directions=2, sms=3, name="grid")
    with pytest.raises(Illegal, match=r"block: needs .* KB of shared memory|block: more cells"):
        plan("LSTM", "bfloat16", 1024, 16, name="block")
    with pytest.raises(Illegal, match="cluster: there are too few units"):
        plan("LSTM", "bfloat16", 8, 16, name="cluster")
    with pytest.raises(
        Illegal, match="expected one of auto, step, split, block, cluster, grid, grid-barrier, got tiles"
    ):
        plan("LSTM", "bfloat16", 8, 16, name="tiles")


def test_a_slice_with_few_sms() -> None:
    """Of an H100 a seventh: 16 SMs hold one cluster of 16, or two of 8."""
    found = plan("LSTM", "bfloat16", 256, 64, sm=90, sms=16, name="cluster")
    assert found.device["clusters"] == 16 // found.layout["group"]
    # One SM: no exchange at all.
    assert plan("LSTM", "bfloat16", 64, 4, sm=90, sms=1).name in ("step", "block")
    whole, part = (plan("LSTM", "bfloat16", 1024, 64, sm=90, sms=sms) for sms in (0, 16))
    assert part.predicted_us > whole.predicted_us


def test_clusters_follow_the_gpcs() -> None:
    """132 SMs in GPCs of 16 or 18: 8 clusters of 16, 16 of 8, and of 12 not 11 but 8."""
    expected = {16: 8, 12: 8, 8: 16, 4: 32, 2: 64}
    seen = {}
    for hidden in range(8, 1000, 8):
        try:
            found = plan("RNN_TANH", "bfloat16", hidden, 2000, sm=90, name="cluster")
        except Illegal:
            continue
        seen[found.layout["group"]] = found.device["clusters"]
    assert {size: seen[size] for size in expected if size in seen} == {
        size: count for size, count in expected.items() if size in seen
    }
    assert len(set(expected) & set(seen)) >= 3, seen


def test_the_tag_is_worth_something() -> None:
    tagged, flags = (plan("LSTM", "bfloat16", 768, 16, name=name) for name in ("grid", "grid-barrier"))
    assert tagged.predicted_us < flags.predicted_us


def test_inside_a_graph_launches_cost_less() -> None:
    alone, graphed = (plan("LSTM", "bfloat16", 512, 16, in_graph=graph, name="step") for graph in (False, True))
    saved = alone.limits_us["launch"] - graphed.limits_us["launch"]
    assert saved == pytest.approx(alone.predicted_us - graphed.predicted_us)


def test_wrong_arguments() -> None:
    for arguments, message in [
        (("LSTM", "bfloat16", 0, 16), "hidden: expected 1"),
        (("LSTM", "bfloat16", 8, -1), "batch: expected 0"),
        (("LSTM", "bfloat16", 1 << 50, 1), "hidden: expected 1"),
        (("LSTM", "int8", 8, 1), "arithmetic: expected one of float64"),
        (("LSTN", "bfloat16", 8, 1), "mode: expected one of LSTM"),
        (("LSTM", "bfloat16", 8, 1, 10, 3), "directions: expected 1 or 2"),
        (("GRU", "bfloat16", 8, 1, 10, 1, 4), "projection: expected 0 with mode GRU"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            plan(*arguments)
    with pytest.raises(RuntimeError):
        plan("LSTM", "bfloat16", 8, 1, sm=75)


def test_nothing_to_compute() -> None:
    for batch, steps in ((0, 5), (4, 0)):
        found = plan("LSTM", "bfloat16", 8, batch, steps)
        assert (found.name, found.why) == ("step", "there is nothing to compute")
        assert str(found).startswith("step: ")


def test_sizes_at_the_edge() -> None:
    """Nothing overflows on the way to a plan."""
    most = 1 << 31
    for hidden, batch, steps in itertools.product((1, 8191, 8192, 8193, most), (1, most), (1, most)):
        for arithmetic, backward in itertools.product(ARITHMETICS, (False, True)):
            found = plan("LSTM", arithmetic, hidden, batch, steps, 2, backward=backward)
            assert 0 < found.predicted_us < float("inf")
            assert all(value >= 0 for value in found.layout.values())
    with pytest.raises(RuntimeError):
        plan("LSTM", "bfloat16", most + 1, 1)


def test_an_architecture_that_is_not_listed() -> None:
    known, later = (plan("LSTM", "bfloat16", 64, 4, sm=sm) for sm in (100, 103))
    assert (later.device["name"], later.device["sm"]) == (known.device["name"], 103)


def test_names_agree() -> None:
    text = (CSRC / "cuda/plan.h").read_text()
    listed = re.search(r"kPlanNames = \{(.*?)\}", text)
    assert listed is not None
    assert tuple(re.findall(r'"(.*?)"', listed[1])) == cuda_plan.NAMES
    for sm in ARCHITECTURES:
        assert plan("LSTM", "bfloat16", 8, 1, sm=sm).device["sm"] == sm


def test_the_step_kernels_tiles_are_those_of_the_model() -> None:
    """What plan/model.h says of them stands in their own sources."""
    arithmetic = (CSRC / "cuda/arithmetic.cuh").read_text()
    tiles = dict(re.findall(r"struct (\w+) \{[^}]*?kLargeBatchTiles = (\d+)", arithmetic))
    for name, count in tiles.items():
        found = plan("LSTM", name.lower(), 64, 1024, name="step")
        assert found.layout["blocks"] == 1024 // (8 * int(count)) * 4, name
    assert len(tiles) == len(ARITHMETICS)
    assert "constexpr int kUnits = 16;" in (CSRC / "cuda/step/block.cuh").read_text()


def test_blocks_take_few_batch_indices_where_sms_would_be_idle() -> None:
    """And many where all SMs have some anyway, and L2 would have to hand out the weights once more."""

    def blocks(hidden: int, batch: int, arithmetic: str = "bfloat16", **more: Any) -> int:
        return plan("LSTM", arithmetic, hidden, batch, name="step", **more).layout["blocks"]

    assert blocks(256, 8) == 256 // 16
    assert blocks(256, 32) == 4 * 256 // 16
    assert blocks(1024, 32) == 1024 // 16
    assert blocks(1024, 32, backward=True) == 1024 // 16
    assert blocks(256, 256) == 8 * 256 // 16
    assert blocks(512, 16, "float32") == 2 * 512 // 16
    assert blocks(1024, 16, "float64") == 1024 // 16


# ---- the table of constants -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_every_constant_has_a_unit_and_a_source(sm: int) -> None:
    found = cuda_plan.constants(sm)
    assert len(found) == len({c.name for c in found}) > 20
    for each in found:
        assert each.unit
        assert re.match(r"(estimated: |data sheet|counted in |measured on )", each.source), each
        # Only what an architecture does not have is zero.
        assert each.value > 0 or (sm < 90 and ("cluster" in each.name or "another SM" in each.name)), each


def test_measured_constants(tmp_path: Path) -> None:
    cluster = {"what": "cluster_exchange", "way": "st_async", "ctas": 8, "clusters": 16, "correct": True}
    rows: list[dict[str, Any]] = [
        {"what": "device", "name": "NVIDIA H200", "capability": "9.0", "sms": 132, "clock_mhz": 1980},
        {"what": "launch", "ctas": 1, "dependent": True, "graph": False, "us": 2.0, "correct": True},
        {"what": "launch", "ctas": 132, "dependent": True, "graph": False, "us": 2.2, "correct": True},
        {"what": "launch", "ctas": 132, "dependent": False, "graph": False, "us": 4.0, "correct": True},
        {"what": "launch", "ctas": 132, "dependent": True, "graph": True, "us": 1.1, "correct": True},
        {"what": "grid_exchange", "way": "polling", "ctas": 64, "bytes": 1024, "us": 0.61, "correct": True},
        {"what": "grid_exchange", "way": "polling", "ctas": 64, "bytes": 32768, "us": 0.9, "correct": True},
        {"what": "grid_exchange", "way": "flags", "ctas": 64, "bytes": 1024, "us": 1.4, "correct": True},
        {"what": "grid_exchange", "way": "flags", "ctas": 64, "bytes": 1024, "us": 0.1, "correct": False},
        {**cluster, "bytes": 128, "us": 0.3},
        {**cluster, "bytes": 32896, "us": 1.3},
        {"what": "mma", "weights": "registers", "n": 8, "clocks_an_mma": 9.0, "correct": True},
        {"what": "mma", "weights": "registers", "n": 32, "clocks_an_mma": 5.5, "correct": True},
        {"what": "mma", "weights": "shared", "n": 32, "clocks_an_mma": 8.0, "correct": True},
    ]  # fmt: skip
    found = plan_constants.measured(rows)
    assert found.pop("dsmem_bandwidth") == pytest.approx(32768 * 7 / 8 / 1980)
    assert found == {
        "launch": 2.2, "graph_launch": 1.1, "grid_exchange": 0.61, "grid_barrier_exchange": 1.4,
        "cluster_exchange": 0.3, "mma": 5.5,
    }  # fmt: skip
    file = tmp_path / "h200-microbench.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    text = plan_constants.lines(file)
    assert '    {Constant::launch, 90, 2.2, "measured on NVIDIA H200: h200-microbench.jsonl"},' in text
    # Each is a constant of the table.
    known = re.search(r"enum class Constant \{(.*?)\}", (CSRC / "cuda/plan/costs.h").read_text(), re.DOTALL)
    assert known is not None
    assert {line.split("::")[1].split(",")[0] for line in text} <= set(re.findall(r"\w+", known[1]))
    with pytest.raises(ValueError, match="which card is it of"):
        plan_constants.measured([])


def test_the_table_of_shapes() -> None:
    lines = plan_table.table().splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert any("| 768 | 16 |" in line and "1.96 / 3.1 (float16)" in line for line in lines)
    assert not any("1.96" in line for line in lines if "float16" not in line)


# ---- explain --------------------------------------------------------------------------------------------------------


def test_explain_has_the_plan() -> None:
    module = rnnfast.LSTM(3, 64, bidirectional=True, dtype=torch.bfloat16, device="meta", batch_first=True)
    input = torch.empty(16, 100, 3, dtype=torch.bfloat16, device="meta")
    expected = [plan("LSTM", "bfloat16", 64, 16, 100, 2, training=True, backward=b) for b in (False, True)]
    found = rnnfast.explain(module, input)
    assert (found.plan, found.predicted_us, found.limited_by) == (
        str(expected[0]), expected[0].predicted_us, expected[0].limited_by,
    )  # fmt: skip
    assert (found.backward_plan, found.predicted_backward_us) == (str(expected[1]), expected[1].predicted_us)
    assert f"predicted, not measured: {expected[0].predicted_us:.2f} us a step forward" in str(found)
    with torch.no_grad():
        assert rnnfast.explain(module, input).backward_plan is None
    # A cell is one step.
    cell = rnnfast.GRUCell(3, 64, device="meta")
    assert rnnfast.explain(cell, torch.empty(3, device="meta")).predicted_us is not None


def test_explain_on_the_cpu_has_none() -> None:
    found = rnnfast.explain(rnnfast.LSTM(3, 5), torch.randn(4, 2, 3))
    assert (found.plan, found.predicted_us, found.limited_by) == (None, None, None)
    assert "plan" not in str(found)


# ---- the command ----------------------------------------------------------------------------------------------------

EXAMPLE = "explain --cell lstm --hidden 512 --batch 16 --dtype bf16 --sm 90"


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert EXAMPLE in explain_command.EXAMPLE
    assert cli.main(EXAMPLE.split()) == 0
    text = capsys.readouterr().out
    assert "predicted, not measured" in text
    assert "LSTM, H=512, B=16, T=1000, bfloat16, training\non H100 SXM: sm_90, 132 SMs\n" in text
    for backward in (False, True):
        found = plan("LSTM", "bfloat16", 512, 16, training=True, backward=backward)
        name = "backward" if backward else "forward"
        assert re.search(rf"^{name} +{re.escape(str(found))}$", text, re.MULTILINE)
        assert f"{found.predicted_us:.2f} us a step, limited by {found.limited_by}\n" in text
    rows = re.findall(r"^  ([\w ]+?) +(\d+\.\d+) +(\d+\.\d+)$", text, re.MULTILINE)
    assert [name for name, *_ in rows] == LIMITS


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--inference", "inference"),
        ("--backward", "backward  "),
        ("--plan step", "step: 1 launch a step"),
        ("--plan grid-barrier --sm 80", "on A100: sm_80, 108 SMs"),
        ("--directions 2 --steps 7", "T=7, two directions"),
        ("--projection 32", "P=32"),
        ("--sms 16", "16 SMs"),
        ("--cell rnn --dtype fp32 --graph", "RNN_TANH"),
        ("--cell mgu --dtype tf32", "MGU"),
        ("--dtype FP64", "float64 runs step by step"),
    ],
)
def test_its_options(options: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "--hidden", "128", *options.split()]) == 0
    text = capsys.readouterr().out
    assert expected in text
    assert ("forward   " in text) == ("--backward" not in options)
    assert ("backward  " in text) == ("--inference" not in options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--hidden 0", "--hidden: expected an integer of at least 1 and at most 2147483648, got '0'"),
        ("--hidden many", "--hidden: expected an integer of at least 1 and at most 2147483648, got 'many'"),
        ("--hidden 2147483649", "--hidden: expected an integer of at least 1 and at most 2147483648"),
        ("--hidden 8 --sms 65536", "--sms: expected an integer of at least 1 and at most 65535, got '65536'"),
        ("--hidden 8 --sm 1000", "--sm: expected an integer of at least 80 and at most 999, got '1000'"),
        ("", "required: --hidden"),
        ("--hidden 8 --cell lstn", "--cell: invalid choice: 'lstn'"),
        ("--hidden 8 --dtype int8", "--dtype: invalid choice: 'int8'"),
        ("--hidden 8 --sm 75", "--sm: expected an integer of at least 80 and at most 999, got '75'"),
        ("--hidden 8 --batch 0", "--batch: expected an integer of at least 1"),
        ("--hidden 8 --directions 3", "--directions: invalid choice"),
        ("--hidden 8 --cell gru --projection 4", "--projection: gru has none"),
        ("--hidden 256 --sm 80 --plan cluster", "cluster: needs compute capability 9.0 (sm_90) or later, got sm_80"),
        ("--hidden 8 --inference --backward", "not allowed with argument"),
    ],
)
def test_its_errors(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["explain", *options.split()])
    assert left.value.code == 2
    assert message in capsys.readouterr().err
