"""On a machine with an NVIDIA GPU: are the kernels right, and how fast are they beside torch.nn? Two runs of minutes.

    make card                                        # builds all that is run; needs nvcc, no GPU
    python benchmarks/gpu_check.py first FOLDER      # 200 s: constants of the card, every kernel, sanitizers, tests
    python benchmarks/gpu_check.py measure FOLDER --after FIRST   # 400 s: the other tests, the suites, ncu, Triton

Nothing is compiled here, so that every minute of a card is used: `make card` may have run on another machine, and what
it lists is brought along. A stage that fails or hangs takes no time from the next. In FOLDER are table.txt, logs.txt
(both written as things go), the tests' outcomes and the result files.

Exit status 0: nothing failed; 1: something did; 2: wrong arguments, or libraries of other sources than the tree's; 3:
nothing was checked, and each stage says why; 130: interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import card_kit
from cuda_tools import cuda_tool
from outcomes import failures, kernels_of
from records import INTERRUPTED, PARTIAL, Record, load, short_table, worst_of
from stages import Job, Missing, Run, Stage

ROOT = Path(__file__).resolve().parent.parent
SECONDS = {"first": 200.0, "measure": 400.0}
# For the last lines.
RESERVE = 5.0

# Of each run the stages in their order: the seconds that each has for itself, and how many it may have at most.
SHARES: dict[str, dict[str, tuple[float, float]]] = {
    "first": {
        "about": (45, 60),
        "microbench": (25, 45),
        "programs": (20, 40),
        "kernels": (40, 70),
        "plans": (30, 60),
        "tests": (35, 130),
    },
    "measure": {
        "about": (45, 60),
        "tests": (40, 60),
        "flashrnn": (45, 60),
        "grid": (90, 150),
        "models": (40, 70),
        "compare": (35, 60),
        "ncu": (35, 45),
        "triton": (40, 60),
        "alone": (25, 60),
    },
}
# And one that no run has by itself.
STAGES = {run: {**stages, "cudnn": (60, 120)} for run, stages in SHARES.items()}
# What is measured in minutes: the headline of others' benchmarks and its neighbours; a grid; of both, what Triton's
# kernels are made for. (shapes.py has them all.)
HEADLINE = r"T1024-B16-|T512-B(1|16|64)-"
GRID = r"^(LSTM|GRU)-T100-B(1|16|64)-I\d+-H(128|256|512|1024)(-|$)"
TRITON = r"^(LSTM|GRU)-T100-B(1|16|64)-I\d+-H(128|256)(-|$)"
# What stages want besides torch: without these they run less, or not at all.
MODULES = ("pytest", "xdist", "pytest_timeout", "rich", "tqdm")
# Parts of the microbenchmark, the one that polls, and so could wait for ever, last.
MICROBENCHMARKS = ("device", "launch", "residency", "mma", "cluster", "grid")
# Beside a dozen other processes the program may take long to begin.
SANITIZED = ("--launch-timeout", "0", "--error-exitcode", "99")
# How card_tests is called there: with more patience, without the large shapes.
UNDER_SANITIZERS = ("--seconds", "120", "-step/large", "-persistent/large", "-split/large")
# The tests of the card that are run: where they are, and which.
PLACES = ("tests/gpu", "tests/test_bench.py")
CHOSEN = "gpu and not exhaustive and not alone"
# Plans of the CUDA kernels, those that are most likely to be wrong first, and the tests that are run on each: where the
# kernels are tested in full, and in graphs.
PLANS = ("cluster", "grid", "split", "block", "grid-barrier", "step")
OF_PLANS = ("tests/gpu/test_gpu_ops.py", "tests/gpu/test_gpu_parity.py", "tests/gpu/test_gpu_execution.py")
OF_PLANS_NAMES = "(test_against_float64 or test_parity or test_graph_of or test_cells) and not triton"
# Of card_tests those that come first.
FIRST_CASES = "persistent"
# The last line of a run of tests in which none was run.
ALL_SKIPPED = r"^(?!.* passed).* skipped"
# Tools of compute-sanitizer, and what else they are told. A question that the driver refuses is no error. initcheck
# does not see all that others write.
SANITIZERS = {"memcheck": ["--report-api-errors", "no"], "racecheck": [], "synccheck": [], "initcheck": []}


def facts() -> dict[str, Any]:
    """What this Python, its torch and its card are; `problem` is why nothing can run on the card, None if it can.

    The one import of torch that is made to find out: seconds, on a machine that has just started.
    """
    found: dict[str, Any] = {"python": sys.version.split()[0], "problem": None, "libraries": {}}
    found["modules"] = [name for name in MODULES if has(name)]
    if not has("torch"):
        return {**found, "problem": f"no torch in this Python ({sys.executable})"}
    sys.path.insert(0, str(ROOT))
    import torch

    from rnnfast import libraries
    from rnnfast.benchmark.timing import short_name
    from rnnfast.triton import availability

    found |= {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": version("triton")}
    problems = {"cpu": libraries.cpu_error, "cuda": libraries.cuda_problem(), "triton": availability.problem()}
    found["libraries"] = problems
    if (why := libraries.device_problem()) is not None:
        return {**found, "problem": why}
    device = torch.device("cuda")
    torch.zeros(1, device=device)
    card = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info()
    found |= {
        "card": card.name,
        "short": short_name(device),
        "capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "memory": f"{free / 2**30:.1f} GiB free of {total / 2**30:.1f}",
        "cudnn": torch.backends.cudnn.version(),
    }
    if libraries.cuda_error is None:
        found["archs"] = torch.ops.rnnfast.cuda_archs()
    return found


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def version(package: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cores() -> int:
    """Those of this process, which may be fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2


def kernel_names(case: str) -> str:
    """A regular expression for our kernels of a case (options of `python -m rnnfast bench`), and for no others."""
    return "^(project_)?(forward|backward)$" if "--backends triton" in case else "^(step|persistent|split)"


class Check:
    """The stages of a run, and what they need to know.

    Args:
        options: the command line.
        out: the folder.
    """

    def __init__(self, options: argparse.Namespace, out: Path) -> None:
        self.out = out
        self.after: Path | None = options.after
        self.device: str = options.device
        self.interpreter: str = options.python
        self.kit = card_kit.Kit(options.kit)
        self.facts: dict[str, Any] = {}
        self.notes: list[str] = []
        # For what stands in the table, or is of no use later.
        self.scratch = tempfile.TemporaryDirectory(prefix="rnnfast-", ignore_cleanup_errors=True)
        self.facts_file = Path(self.scratch.name) / "facts"
        self.earlier = self.earlier_outcomes()
        self.environment = {
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            # For the result files, where there is no repository.
            "RNNFAST_COMMIT": self.kit.commit(),
            # There may be no home to write to. Outside of the scratch folder, for the run that comes after.
            "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", f"{tempfile.gettempdir()}/rnnfast-triton"),
            # torch.compile would start a process for each core, in each process of the tests.
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }

    def earlier_outcomes(self) -> list[Path]:
        """Files of tests' outcomes that hold for the kernels that are here: of this folder, and of the run named. As
        they are now: a process of the tests that takes another's place has to find the same tests as that one."""
        mine, now = self.out / "tests.jsonl", card_kit.kernels()
        if mine.exists() and (then := kernels_of(mine)) != now:
            mine.replace(mine.with_name(f"tests-{then}.jsonl"))
        files = [mine]
        if self.after is not None:
            theirs = self.after / "tests.jsonl"
            if theirs.exists() and kernels_of(theirs) != now:
                self.notes.append(f"{self.after}: its tests are of other kernels, so all are due")
            else:
                files.append(theirs)
        copies = []
        for number, file in enumerate(file for file in files if file.exists()):
            copies.append(Path(self.scratch.name) / f"earlier-{number}.jsonl")
            shutil.copyfile(file, copies[-1])
        if not mine.exists():
            mine.write_text(json.dumps({"kernels": now}) + "\n", encoding="utf-8")
        return copies

    # ---- what is here ----

    def look(self) -> str | None:
        """Reads the facts once they are there. Why nothing can run on the card, None if it can."""
        if not self.facts and self.facts_file.exists():
            # Not there, or not whole, where what writes them has failed.
            with contextlib.suppress(ValueError, IndexError):
                self.facts = json.loads(self.facts_file.read_text(encoding="utf-8").splitlines()[-1])
        if not self.facts:
            return "stage about failed: logs.txt has the reason"
        if self.device == "cpu":
            return None
        return self.facts["problem"]

    def problem(self, *modules: str, library: str | None = "cuda", on_card: bool = False) -> str | None:
        """Why a stage cannot run that needs these modules and this library; `on_card`: and a real card."""
        if (why := self.look()) is not None:
            return why
        if on_card and self.device == "cpu":
            return "a rehearsal on the CPU"
        if self.device == "cpu":
            library = library and "cpu"
        if library and (why := self.facts["libraries"].get(library)) is not None:
            return str(why)
        missing = [module for module in modules if module not in self.facts["modules"]]
        return f"no {', '.join(missing)} in {self.interpreter}" if missing else None

    def python(self, *arguments: str, **options: Any) -> Job:
        environment = {**self.environment, **options.pop("environment", {})}
        return Job([self.interpreter, *arguments], environment=environment, **options)

    # ---- stages ----

    def about(self, limit: float) -> list[Job]:
        query = "name,compute_cap,driver_version,clocks.max.sm,clocks.sm,power.limit,temperature.gpu"
        jobs = [self.python(str(Path(__file__)), "facts", output=self.facts_file)]
        if smi := shutil.which("nvidia-smi"):
            jobs.append(
                Job([smi, f"--query-gpu={query}", "--format=csv,noheader"], name="nvidia-smi", informative=True)
            )
        return jobs

    def state(self) -> str:
        """The card's clock, temperature and power now, for the log: whether it is slowed down."""
        if (smi := shutil.which("nvidia-smi")) is None:
            return ""
        query = [
            smi,
            "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw,memory.used",
            "--format=csv,noheader",
        ]
        try:
            return subprocess.run(query, capture_output=True, text=True, check=False, timeout=5).stdout.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)

    def program(self, name: str) -> str:
        """Where one of `make card`'s programs is, fit to run."""
        path = self.kit.program(name, self.facts.get("capability", ""))
        # The permission may have been lost on the way here.
        path.chmod(path.stat().st_mode | 0o111)
        return str(path)

    def no_program(self, name: str) -> str | None:
        """Why one of `make card`'s programs cannot be run, None where there is a card (with torch or without)."""
        why = self.look()
        if self.device == "cpu":
            return "a rehearsal on the CPU"
        if why is not None and shutil.which("nvidia-smi") is None:
            return why
        return self.kit.missing(name, self.facts.get("capability", ""))

    def microbench(self, limit: float) -> list[Job] | str:
        if why := self.no_program("microbench"):
            return why
        output = self.out / f"{self.facts.get('short', 'card')}-microbench.jsonl"
        # What an earlier run into this folder measured is measured again.
        output.unlink(missing_ok=True)
        program = self.program("microbench")
        return [Job([program, part], name=part, most=limit / 2, output=output) for part in MICROBENCHMARKS]

    def programs(self, limit: float) -> list[Job] | str:
        """The persistent kernels first. The program's own watchdog says which case hangs, before the time is up."""
        if why := self.no_program("card_tests"):
            return why
        program = [self.program("card_tests"), "--seconds", "10"]
        return [
            Job([*program, FIRST_CASES], name=FIRST_CASES, most=limit * 2 / 3),
            Job([*program, f"-{FIRST_CASES}"], name="others"),
        ]

    def pytest(self, limit: float, *arguments: str, processes: int = 1, name: str = "", plan: str = "") -> Job:
        """Tests of the card. The outcomes go into a file; what has passed by its account is not run again. (On a plan
        that is asked for by name all is run again: it has a file of its own.)"""
        options = ["-q", "-p", "no:cacheprovider", "--tb=short", "--maxfail=30", "--durations=5"]
        environment = {"RNNFAST_GPU_TESTS_DEVICE": self.device, **({"RNNFAST_CUDA_PLAN": plan} if plan else {})}
        if "xdist" in self.facts["modules"]:
            # One, too: another can take its place.
            options += ["-n", str(processes), "--dist", "worksteal"]
        if processes > 1:
            environment["OMP_NUM_THREADS"] = "1"
        if "pytest_timeout" in self.facts["modules"]:
            # A kernel that hangs does not listen: the process is ended.
            options += ["--timeout", f"{limit / 2:.0f}", "--timeout-method", "thread"]
        if plan:
            outcomes = self.out / f"plan-{plan}.jsonl"
            outcomes.write_text(json.dumps({"kernels": card_kit.kernels(), "plan": plan}) + "\n", encoding="utf-8")
            command = ["-m", "pytest", *arguments, *options, "--outcomes", str(outcomes)]
            return self.python(*command, environment=environment, name=name, nothing=ALL_SKIPPED)
        outcomes = self.out / "tests.jsonl"
        options += ["--outcomes", str(outcomes)]
        # What has passed in this run, too.
        now = Path(self.scratch.name) / f"now-{len(list(Path(self.scratch.name).iterdir()))}.jsonl"
        shutil.copyfile(outcomes, now)
        earlier = [*self.earlier, now]
        options += [word for file in earlier for word in ("--except-passed", str(file))]
        # With nothing left to run, which is good only where something has run before.
        good = (0, 5) if self.earlier else (0,)
        command = ["-m", "pytest", *arguments, *options]
        return self.python(*command, environment=environment, good=good, name=name, nothing=ALL_SKIPPED)

    def both(self, limit: float, *places: str) -> list[Job | Missing]:
        """The tests there of each backend, side by side: where one fails in everything the other still has its say. In
        many processes, because it is the host that takes the time."""
        processes = min(6, max(2, cores() * 3 // 8))
        return [
            self.pytest(limit, *places, "-m", CHOSEN, "-k", expression, processes=processes, name=name)
            for name, expression in (("cuda", "not triton"), ("triton", "triton"))
        ]

    def kernels(self, limit: float) -> list[Job | Missing] | str:
        """Each cell in each type on each backend against float64, and beside that the sanitizers."""
        if why := self.problem("pytest"):
            return why
        if self.device == "cpu":
            # Some, as a rehearsal.
            return [self.pytest(limit, "tests/gpu/test_gpu_precision.py", "-m", "gpu", "-k", "nan")]
        sanitizer = cuda_tool("compute-sanitizer")
        without = self.no_program("card_tests") or (None if sanitizer else "no compute-sanitizer")
        if without or not sanitizer:
            return [*self.both(limit, "tests/gpu/test_gpu_ops.py"), Missing("sanitizers", str(without))]
        return self.both(limit, "tests/gpu/test_gpu_ops.py") + [
            Job(
                [sanitizer, "--tool", tool, *options, *SANITIZED, self.program("card_tests"), *UNDER_SANITIZERS],
                name=tool,
                # It ends well, too, where it has not found what it should look at.
                needs=r"SUMMARY: \d",
                stop=signal.SIGTERM,
                informative=tool == "initcheck",
            )
            for tool, options in SANITIZERS.items()
        ]

    def tests(self, limit: float) -> list[Job | Missing] | str:
        return self.problem("pytest", on_card=True) or self.both(limit, *PLACES)

    def plans(self, limit: float) -> list[Job] | str:
        """What shows most about a kernel, on every plan of the CUDA kernels in turn, side by side."""
        if why := self.problem("pytest", on_card=True):
            return why
        processes = min(3, max(1, cores() // len(PLANS)))
        options = ("-m", CHOSEN, "-k", OF_PLANS_NAMES)
        return [self.pytest(limit, *OF_PLANS, *options, processes=processes, name=plan, plan=plan) for plan in PLANS]

    def alone(self, limit: float) -> list[Job] | str:
        """What takes most of the card's memory, last: nothing runs beside it, and nothing after it can suffer."""
        if why := self.problem("pytest", on_card=True):
            return why
        place = ["tests/gpu", "--ignore", "tests/gpu/test_gpu_sanitizer.py"]
        return [self.pytest(limit, *place, "-m", CHOSEN.replace("not alone", "alone"))]

    def suites(self, limit: float, names: str, dtypes: str, cases: str, backends: str, out: Path) -> list[Job] | str:
        """Suites of benchmarks/run.py; it ends by itself before the limit, and writes what was measured by then."""
        if why := self.problem("rich", "tqdm"):
            return why
        script = str(ROOT / "benchmarks/run.py")
        if self.device == "cpu":
            options = ["--suite", "smoke", "--seconds", "0.05", "--patience", "0"]
            return [self.python(script, *options, "--out", str(out))]
        options = ["--suite", names, "--device", "cuda", "--dtype", dtypes, "--cases", cases, "--backends", backends]
        options += [
            "--workload",
            "inference,training",
            "--seconds",
            "0.15",
            "--limit",
            f"{limit - min(15.0, limit / 3):.1f}",
        ]
        return [self.python(script, *options, "--case-limit", f"{limit / 3:.0f}", "--out", str(out))]

    def flashrnn(self, limit: float) -> list[Job] | str:
        return self.suites(limit, "flashrnn", "bfloat16,float16", HEADLINE, "cuda,cuda-graph", self.out)

    def grid(self, limit: float) -> list[Job] | str:
        return self.suites(limit, "grid", "bfloat16,float16,float32", GRID, "cuda,cuda-graph", self.out)

    def models(self, limit: float) -> list[Job] | str:
        return self.suites(limit, "corners,models", "bfloat16,float32", "", "cuda,cuda-graph", self.out)

    def compare(self, limit: float) -> list[Job] | str:
        """Every plan beside the one that is chosen, with what the model predicts; ends by itself before the limit."""
        if why := self.problem(on_card=True):
            return why
        end = limit - min(12.0, limit / 2)
        return [self.python(str(ROOT / "benchmarks/plan_check.py"), str(self.out), "--limit", f"{end:.1f}")]

    def triton(self, limit: float) -> list[Job] | str:
        """Last of the timings: Triton compiles on first use. Its results have a folder of their own."""
        if why := self.problem(library="triton"):
            return why
        backends = "cuda-graph,triton,triton-graph"
        return self.suites(limit, "grid", "bfloat16,float32", TRITON, backends, self.out / "triton")

    def ncu(self, limit: float) -> list[Job] | str:
        """Reports of the kernels of the two worst cases. The clocks stay as they are."""
        if why := self.problem(on_card=True):
            return why
        program = cuda_tool("ncu")
        if program is None:
            return "no ncu"
        cases = worst_of(self.records(), 2)
        if not cases:
            return f"no result file in {self.out} to choose the worst cases from"
        sections = "SpeedOfLight,LaunchStats,Occupancy,WarpStateStats,MemoryWorkloadAnalysis".split(",")
        options = ["--clock-control", "none", "--kill", "yes", "--launch-skip", "20", "--launch-count", "2"]
        options += [word for section in sections for word in ("--section", section)]
        bench = [self.interpreter, "-m", "rnnfast", "bench", "--device", "cuda", "--seconds", "0.01"]
        return [
            Job(
                [program, *options, "--kernel-name", f"regex:{kernel_names(case)}", *bench, *case.split()],
                name=f"case {number}",
                stop=signal.SIGTERM,
                environment=self.environment,
                # --kill ends the program with a status of its own.
                proof=r"^\s*Duration\s",
            )
            for number, case in enumerate(cases, start=1)
        ]

    def cudnn(self, limit: float) -> list[Job] | str:
        """torch.nn's own times, for more shapes than are compared."""
        if why := self.problem(library=None, on_card=True):
            return why
        script = str(ROOT / "benchmarks/microbench/cudnn.py")
        output = self.out / f"{self.facts['short']}-cudnn.jsonl"
        return [self.python(script, "--seconds", f"{limit - 10:.0f}", output=output)]

    def stages(self, run: str, wanted: Sequence[str] = ()) -> list[Stage]:
        """The run's stages in their order; `wanted`: about and those of them, in the order given."""
        together = ("kernels", "plans", "tests")
        names = ["about", *(name for name in wanted if name != "about")] if wanted else SHARES[run]
        return [Stage(name, *STAGES[run][name], jobs=getattr(self, name), together=name in together) for name in names]

    def head(self) -> str:
        """What is known of the machine, a line each."""
        self.look()
        lines = [f"rnnfast: {self.kit.commit()}", *self.notes]
        for key, value in self.facts.items():
            if key == "libraries":
                lines += [f"{name}: {why or 'kernels can run'}" for name, why in value.items()]
            elif key == "modules":
                lines += [f"not installed: {name}" for name in MODULES if name not in value]
            elif value:
                lines.append(f"{key}: {value}")
        return "\n".join(lines)

    def records(self) -> list[Record]:
        """Of the result files, those of parts of suites too. Half a file is none."""
        folders = [self.out, self.out / "triton"]
        found = []
        for folder in [*folders, *(folder / part for part in (PARTIAL, INTERRUPTED) for folder in folders)]:
            for file in sorted(folder.glob("*.json")):
                with contextlib.suppress(OSError, ValueError):
                    found.append(load(file))
        return [record for record in found if record is not None]

    def tail(self) -> str:
        """The tests that failed, and a table of the suites' results."""
        records = self.records()
        ratios = ["", "ratio = torch.nn's time / the row's time", short_table(records)] if records else []
        lines = failures(self.out / "tests.jsonl")
        for plan in PLANS:
            lines += [f"plan {plan}: {line}" for line in failures(self.out / f"plan-{plan}.jsonl", 6)]
        return "\n".join([*lines, *ratios])


def interrupt(number: int, frame: FrameType | None) -> None:
    """Once: what has to be done at the end is not to be interrupted too."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    raise KeyboardInterrupt


def summary(run: Run, check: Check) -> tuple[str, int]:
    """The last line, and the exit status."""
    counts = Counter(outcome.outcome for outcome in run.outcomes if outcome.stage != "about")
    failed = sum(outcome.failed for outcome in run.outcomes)
    where = check.facts.get("card") or ("the CPU, a rehearsal" if check.device == "cpu" else "no card")
    if not counts["ok"] and not failed:
        return f"NOTHING was checked: {check.look() or 'see the table'}", 3
    return f"{where}: {counts['ok']} ok, {failed} failed, {counts['skipped']} skipped", int(failed > 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=(*SECONDS, "facts"), help="which run; facts: only what is here, as JSON")
    parser.add_argument("folder", type=Path, nargs="?", help="for the results")
    parser.add_argument(
        "--after",
        type=Path,
        metavar="FOLDER",
        help="of an earlier run: what passed there with the same kernels is left out",
    )
    parser.add_argument("--seconds", type=float, help="for all stages together (default 200 and 400)")
    parser.add_argument(
        "--stages", default="", help="only these, with commas; cudnn (torch.nn's own times) is one more"
    )
    parser.add_argument("--kit", type=Path, default=card_kit.FOLDER, help="where `make card` has put its programs")
    parser.add_argument("--python", default=sys.executable, help="the Python that has torch (default: this one)")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a tiny rehearsal without a card"
    )
    options = parser.parse_args()
    if options.run == "facts":
        return options
    if options.folder is None:
        parser.error("a folder for the results is needed")
    if options.folder.exists() and not options.folder.is_dir():
        parser.error(f"{options.folder} is no folder")
    if options.after is not None and not options.after.is_dir():
        parser.error(f"--after {options.after}: there is no such folder")
    if options.seconds is not None and options.seconds <= 0:
        parser.error(f"--seconds {options.seconds:g}: a number above 0 is needed")
    # Whoever calls may be elsewhere; the stages run in the tree.
    options.folder, options.kit = options.folder.resolve(), options.kit.resolve()
    options.after = options.after and options.after.resolve()
    options.stages = [name.strip() for name in options.stages.split(",") if name.strip()]
    if wrong := [name for name in options.stages if name not in STAGES[options.run]]:
        parser.error(
            f"no stage of {options.run} is called {', '.join(wrong)}; there are: {', '.join(STAGES[options.run])}"
        )
    return options


def main() -> int:
    options = parse()
    if options.run == "facts":
        found = facts()
        print(json.dumps(found))
        # For who reads along.
        print(found["problem"] or f"{found['card']}, torch {found['torch']}", file=sys.stderr)
        return 0
    os.chdir(ROOT)
    # SIGINT too: the background job of a shell ignores it, and so would all that it starts.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    if why := card_kit.Kit(options.kit).stale():
        print(f"gpu_check: {why}", file=sys.stderr)
        return 2
    out: Path = options.folder
    out.mkdir(parents=True, exist_ok=True)
    check = Check(options, out)
    seconds = options.seconds or SECONDS[options.run]
    run = Run(
        check.stages(options.run, options.stages),
        seconds - min(RESERVE, seconds / 4),
        out,
        check.head,
        check.tail,
        check.state,
    )
    interrupted = False
    try:
        run.run()
    except KeyboardInterrupt:
        interrupted = True
    text, status = summary(run, check)
    print("\n" + (out / "table.txt").read_text(encoding="utf-8") + "\n" + text, flush=True)
    return 130 if interrupted else status


if __name__ == "__main__":
    sys.exit(main())
