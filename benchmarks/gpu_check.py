"""On a machine with an NVIDIA GPU: are the kernels right, and how fast are they beside torch.nn? Two runs of minutes.

    make card                                        # builds all that is run; needs nvcc, no GPU
    python benchmarks/gpu_check.py first FOLDER      # 200 s: constants of the card, every kernel, sanitizers, tests
    python benchmarks/gpu_check.py measure FOLDER --after FIRST   # 400 s: the other tests, the suites, ncu, Triton

Nothing is compiled here, so that every minute of a card is used: `make card` may have run on another machine, and what
it lists is brought along. A stage that fails or hangs takes no time from the next. In FOLDER are table.txt, logs.txt
(both written as things go), the tests' outcomes and the result files. Exit status 1: something failed. Without a card
every stage says why it is skipped, and the status is 0.
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
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import card_kit
from records import load_all, short_table, worst_of
from stages import Job, Run, Stage

ROOT = Path(__file__).resolve().parent.parent
SECONDS = {"first": 200.0, "measure": 400.0}
# For the last lines.
RESERVE = 5.0

# What is measured in minutes: the shapes of the suites that most was asked of. (shapes.py has them all.)
HEADLINE = r"T1024-B16-|T512-B(1|16|64)-"
GRID = r"^(LSTM|GRU)-T100-B(1|16|64)-I\d+-H(128|256|512|1024)(-|$)"
TRITON = r"^(LSTM|GRU)-T100-B(1|16|64)-I\d+-H(128|256)(-|$)"
# Parts of the microbenchmark, the one that polls, and so could wait for ever, last.
MICROBENCHMARKS = ("device", "launch", "residency", "mma", "cluster", "grid")
# How card_tests is called there: with more patience, without the large shapes.
UNDER_SANITIZERS = ("--seconds", "120", "-step/large")
# The tests of the card that are run.
CHOSEN = "gpu and not exhaustive and not alone"
# Tools of compute-sanitizer, and what else they are told. A question that the driver refuses is no error. initcheck
# does not see all that others write.
SANITIZERS = {"memcheck": ["--report-api-errors", "no"], "racecheck": [], "synccheck": [], "initcheck": []}


def facts() -> dict[str, Any]:
    """What this Python, its torch and its card are; `problem` is why nothing can run on the card, None if it can.

    The one import of torch that is made to find out: seconds, on a machine that has just started.
    """
    found: dict[str, Any] = {"python": sys.version.split()[0], "problem": None, "libraries": {}}
    found["modules"] = [name for name in ("pytest", "xdist", "pytest_timeout", "rich", "tqdm") if has(name)]
    if not has("torch"):
        return {**found, "problem": f"no torch in this Python ({sys.executable})"}
    import torch

    from rnnfast import libraries
    from rnnfast.benchmark.timing import short_name

    found |= {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": version("triton")}
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else f": torch {torch.__version__} is built without CUDA"
        return {**found, "problem": f"no CUDA device{built}"}
    device = torch.device("cuda")
    torch.zeros(1, device=device)
    card = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info()
    found |= {
        "card": card.name,
        "short": short_name(device),
        "capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "gib": [round(free / 2**30, 1), round(total / 2**30, 1)],
        "cudnn": torch.backends.cudnn.version(),
        "libraries": {
            "cpu": libraries.cpu_error,
            "cuda": libraries.cuda_problem(),
            "triton": libraries.triton_problem(),
        },
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


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, or where the toolkit puts it."""
    place = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    return shutil.which(name) or shutil.which(name, path=place)


def kernel_names(case: str) -> str:
    """A regular expression for our kernels of a case (options of `python -m rnnfast bench`), and for no others."""
    return "^(project_)?(forward|backward)$" if "--backends triton" in case else "^(step|persistent)"


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
        self.facts_file = out / "facts.jsonl"
        self.facts_file.unlink(missing_ok=True)
        self.environment = {
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            # For the result files, where there is no repository.
            "RNNFAST_COMMIT": self.kit.commit(),
        }

    # ---- what is here ----

    def look(self) -> str | None:
        """Reads the facts once they are there. Why nothing can run on the card, None if it can."""
        if not self.facts and self.facts_file.exists():
            # Not there, or not whole, where what writes them has failed.
            with contextlib.suppress(ValueError, IndexError):
                self.facts = json.loads(self.facts_file.read_text(encoding="utf-8").splitlines()[-1])
        if not self.facts:
            return "stage about did not say what is here"
        if self.device == "cpu":
            return None
        return self.facts["problem"]

    def problem(self, *modules: str, library: str | None = "cuda", on_card: bool = False) -> str | None:
        """Why a stage cannot run that needs these modules and this library; `on_card`: and a real card."""
        if (why := self.look()) is not None:
            return why
        if on_card and self.device == "cpu":
            return "a rehearsal on the CPU"
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

    def microbench(self, limit: float) -> list[Job] | str:
        if why := self.problem(library=None, on_card=True) or self.kit.missing("microbench"):
            return why
        output = self.out / f"{self.facts['short']}-microbench.jsonl"
        program = str(self.kit.program("microbench"))
        return [Job([program, part], name=part, most=limit / 5, output=output) for part in MICROBENCHMARKS]

    def programs(self, limit: float) -> list[Job] | str:
        if why := self.problem(library=None, on_card=True) or self.kit.missing("card_tests"):
            return why
        return [Job([str(self.kit.program("card_tests"))])]

    def pytest(self, limit: float, *arguments: str, processes: int = 1, name: str = "") -> Job:
        """Tests of the card. The outcomes go into a file; what has passed by its account is not run again."""
        options = ["-q", "-p", "no:cacheprovider", "--tb=short", "--maxfail=30", "--durations=5"]
        environment = {"RNNFAST_GPU_TESTS_DEVICE": self.device}
        if processes > 1 and "xdist" in self.facts["modules"]:
            options += ["-n", str(processes), "--dist", "worksteal"]
            environment["OMP_NUM_THREADS"] = "1"
        if "pytest_timeout" in self.facts["modules"]:
            # A kernel that hangs does not listen: the process is ended.
            options += ["--timeout", f"{limit / 2:.0f}", "--timeout-method", "thread"]
        outcomes = self.out / "tests.jsonl"
        options += ["--outcomes", str(outcomes)]
        earlier = [file for file in (outcomes, self.after and self.after / "tests.jsonl") if file and file.exists()]
        options += [word for file in earlier for word in ("--except-passed", str(file))]
        # With nothing left to run, which is good only where something has run before.
        good = (0, 5) if earlier else (0,)
        return self.python("-m", "pytest", *arguments, *options, environment=environment, good=good, name=name)

    def both(self, limit: float, place: str) -> list[Job]:
        """The tests there of each backend, side by side: where one fails in everything the other still has its say. In
        many processes, because it is the host that takes the time."""
        processes = max(2, (os.cpu_count() or 2) * 3 // 8)
        return [
            self.pytest(limit, place, "-m", CHOSEN, "-k", expression, processes=processes, name=name)
            for name, expression in (("cuda", "not triton"), ("triton", "triton"))
        ]

    def kernels(self, limit: float) -> list[Job] | str:
        """Each cell in each type on each backend against float64, and beside that the sanitizers."""
        if why := self.problem("pytest"):
            return why
        if self.device == "cpu":
            # Some, as a rehearsal.
            return [self.pytest(limit, "tests/gpu/test_gpu_precision.py", "-m", "gpu", "-k", "nan")]
        jobs = self.both(limit, "tests/gpu/test_gpu_ops.py")
        sanitizer = find_tool("compute-sanitizer")
        if sanitizer and not self.kit.missing("card_tests"):
            program = str(self.kit.program("card_tests"))
            jobs += [
                Job(
                    [sanitizer, "--tool", tool, *options, "--error-exitcode", "99", program, *UNDER_SANITIZERS],
                    name=tool,
                    stop=signal.SIGTERM,
                    informative=tool == "initcheck",
                )
                for tool, options in SANITIZERS.items()
            ]
        return jobs

    def tests(self, limit: float) -> list[Job] | str:
        return self.problem("pytest", on_card=True) or self.both(limit, "tests/gpu")

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
        options += ["--mode", "fwd,fwdbwd", "--seconds", "0.15", "--limit", f"{limit - 15:.0f}"]
        return [self.python(script, *options, "--case-limit", f"{limit / 3:.0f}", "--out", str(out))]

    def flashrnn(self, limit: float) -> list[Job] | str:
        return self.suites(limit, "flashrnn", "bfloat16,float16", HEADLINE, "cuda,cuda-graph", self.out)

    def grid(self, limit: float) -> list[Job] | str:
        return self.suites(limit, "grid", "bfloat16,float16,float32", GRID, "cuda,cuda-graph", self.out)

    def models(self, limit: float) -> list[Job] | str:
        return self.suites(limit, "corners,models", "bfloat16,float32", "", "cuda,cuda-graph", self.out)

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
        program = find_tool("ncu")
        if program is None:
            return "no ncu"
        cases = worst_of(load_all(self.out), 2)
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
                most=limit / 2,
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

    def stages(self, mode: str, wanted: Sequence[str] = ()) -> list[Stage]:
        """The run's stages in their order; `wanted`: those of them, or `cudnn`, which no run has by itself."""
        about = Stage("about", 25, self.about, most=60)
        runs = {
            "first": [
                about,
                Stage("microbench", 25, self.microbench, most=45),
                Stage("programs", 20, self.programs, most=40),
                Stage("kernels", 55, self.kernels, most=80, together=True),
                Stage("tests", 70, self.tests, most=130, together=True),
            ],
            "measure": [
                about,
                Stage("tests", 45, self.tests, most=60, together=True),
                Stage("flashrnn", 50, self.flashrnn, most=60),
                Stage("grid", 120, self.grid, most=150),
                Stage("models", 50, self.models, most=70),
                Stage("ncu", 35, self.ncu, most=45),
                Stage("triton", 45, self.triton, most=60),
                Stage("alone", 25, self.alone, most=60),
            ],
        }
        if not wanted:
            return runs[mode]
        known = {stage.name: stage for stage in [*runs[mode], Stage("cudnn", 60, self.cudnn, most=120)]}
        if wrong := [name for name in wanted if name not in known]:
            raise SystemExit(f"gpu_check: no stage is called {', '.join(wrong)}; there are: {', '.join(known)}")
        return [about, *(known[name] for name in wanted if name != "about")]

    def head(self) -> str:
        """What is known of the machine, a line each."""
        self.look()
        lines = [f"rnnfast: {self.kit.commit()}"] + [f"{key}: {value}" for key, value in self.facts.items() if value]
        return "\n".join(lines)

    def tail(self) -> str:
        """The tests that failed, and a table of the suites' results."""
        try:
            records = load_all(self.out) + load_all(self.out / "triton")
            ratios = ["", "ratio = torch.nn's time / rnnfast's time", short_table(records)] if records else []
        except (OSError, ValueError, KeyError) as error:
            # Half a file, of a suite that was killed, is no reason to lose the table.
            ratios = [f"the result files cannot be read: {error}"]
        return "\n".join([*failures(self.out / "tests.jsonl"), *ratios])


def failures(outcomes: Path, most: int = 12) -> list[str]:
    """The tests that failed, by the file that the tests write, and the last words of each."""
    if not outcomes.exists():
        return []
    rows = [json.loads(line) for line in outcomes.read_text(encoding="utf-8").splitlines()]
    last = {row["test"]: row for row in rows}
    wrong = [row for row in last.values() if row["outcome"] == "failed"]
    counts: dict[str, int] = {}
    for row in last.values():
        counts[row["outcome"]] = counts.get(row["outcome"], 0) + 1
    lines = [", ".join(f"{count} tests {outcome}" for outcome, count in counts.items())]
    for row in wrong[:most]:
        words = [line for line in row.get("text", "").splitlines() if line.strip()]
        lines.append(f"FAILED {row['test']}: {(words or ['?'])[-1].strip()[:160]}")
    return lines + [f"and {len(wrong) - most} more"] * (len(wrong) > most)


def interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=(*SECONDS, "facts"), help="which run; facts: only what is here, as JSON")
    parser.add_argument("folder", type=Path, nargs="?", help="for the results")
    parser.add_argument(
        "--after", type=Path, metavar="FOLDER", help="of an earlier run: what passed there is not repeated"
    )
    parser.add_argument("--seconds", type=float, help="for all stages together (default 200 and 400)")
    parser.add_argument(
        "--stages", default="", help="only these, with commas; cudnn (torch.nn's own times) is one more"
    )
    parser.add_argument("--kit", type=Path, default=card_kit.FOLDER, help="where `make card` has put its programs")
    parser.add_argument("--python", default=sys.executable, help="the Python that has torch (default: this one)")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal, tiny, without a card"
    )
    options = parser.parse_args()
    if options.run != "facts" and options.folder is None:
        parser.error("a folder for the results is needed")
    if options.after is not None and not (options.after / "tests.jsonl").exists():
        parser.error(f"--after {options.after}: there is no tests.jsonl")
    return options


def main() -> int:
    options = parse()
    if options.run == "facts":
        print(json.dumps(facts()))
        return 0
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, interrupt)
    out = options.folder.resolve()
    out.mkdir(parents=True, exist_ok=True)
    check = Check(options, out)
    if options.device == "cuda" and (why := check.kit.stale()):
        print(f"gpu_check: {why}", file=sys.stderr)
        return 2
    seconds = options.seconds or SECONDS[options.run]
    stages = check.stages(options.run, [name.strip() for name in options.stages.split(",") if name.strip()])
    run = Run(stages, seconds - min(RESERVE, seconds / 4), out, check.head, check.tail, check.state)
    interrupted = False
    try:
        run.run()
    except KeyboardInterrupt:
        interrupted = True
    print("\n" + (out / "table.txt").read_text(encoding="utf-8"), end="", flush=True)
    if interrupted:
        return 130
    return int(any(outcome.failed for outcome in run.outcomes))


if __name__ == "__main__":
    sys.exit(main())
