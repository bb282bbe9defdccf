"""Does a fine-tuning that is killed anywhere end as if it had not been? Twenty SIGKILLs at seeded random moments.

    python benchmarks/soak.py [--out benchmarks/results] [--readme README.md]      (this is `make soak`)

Each run is `nbhelpers finetune` in a process of its own. It says on a pipe where it is, and is killed from outside, at
a random share of what that part of the run took without a kill: before the first step, in a step, in a validation, in
the write of a checkpoint, after the last step while measuring and saving, and between the manifest's last word and
result.json. The part waits at its end for a kill that comes late, so that the kill falls into the part it is meant for;
nothing else is changed or slowed. Then the plain command goes on with --resume, unwatched. Some runs are killed twice.

Each must end with the loss of an uninterrupted run within 1e-5, show every step once with the losses of that run, and
count its attempts right. Writes soak.json and soak.md; exit code 1 where one does not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from _measuring import RESULTS, processor, publish, version

ROOT = Path(__file__).resolve().parent.parent
STEPS, CHECKPOINT_EVERY, VALIDATIONS = 24, 4, 8
TOLERANCE = 1e-5
METHODS = ("full", "lora")
COMMAND = "make soak"
MARK = "<!-- soak: made by benchmarks/soak.py -->"
PARTS = {
    "before": "before the first step",
    "step": "in a step",
    "validation": "in a validation",
    "checkpoint": "writing a checkpoint",
    "saving": "after the last step",
    "ending": "writing the result",
}
# The parts in which each run is killed, one after the other: twenty kills of sixteen runs.
KILLS = (
    *(("before",), ("before",), ("step",), ("step",), ("step",), ("validation",), ("validation",), ("validation",)),
    *(("checkpoint",), ("checkpoint",), ("checkpoint",), ("saving",)),
    *(("ending", "saving"), ("step", "checkpoint"), ("validation", "saving"), ("before", "step")),
)


@dataclass
class Kill:
    """One kill: in which part (and which one of them, by its step), after which share of its usual time."""

    number: int
    run: int
    seed: int
    part: str
    at: int
    share: float
    doing: str = ""
    left: str = ""


@dataclass
class Case:
    """One run that is killed, resumed and compared."""

    number: int
    method: str
    kills: list[Kill] = field(default_factory=list)
    found: dict = field(default_factory=dict)


def cases() -> list[Case]:
    """All kills, each drawn from a generator that is seeded with its number."""
    found, number = [], 0
    for run, parts in enumerate(KILLS, start=1):
        case = Case(run, METHODS[run % 2])
        for order, part in enumerate(parts):
            number += 1
            case.kills.append(draw(number, run, part, late=order > 0))
        found.append(case)
    return found


def draw(number: int, run: int, part: str, late: bool) -> Kill:
    """The moment of one kill. late: the second kill of a run, in the last third, which the first one did not reach."""
    generator = random.Random(number)
    first = 2 * STEPS // 3 if late else 1
    every = {"step": 1, "validation": STEPS // VALIDATIONS, "checkpoint": CHECKPOINT_EVERY}.get(part)
    last = STEPS if not late and len(KILLS[run - 1]) == 1 else STEPS if late else 2 * STEPS // 3 - 1
    at = generator.choice([step for step in range(first, last + 1) if step % every == 0]) if every else 0
    return Kill(number, run, number, part, at, generator.random())


# --- the process that is killed -------------------------------------------------------------------------------------


def victim(pipe: str, target: str, arguments: list[str]) -> None:
    """`nbhelpers finetune ...` in this process, which says on the pipe where it is. target: `part step`, or empty."""
    from nbhelpers import checkpoints, cli, fine_tuning, stages, tracking, trainer

    began = time.perf_counter()

    def say(what: str) -> None:
        os.write(int(pipe), f"{time.perf_counter() - began:.6f} {what}\n".encode())

    def enter(part: str, at: int = 0) -> None:
        say(f"enter {part} {at}")

    def leave(part: str, at: int = 0) -> None:
        say(f"leave {part} {at}")
        if target == f"{part} {at}":
            time.sleep(60)  # the kill is on its way

    def around(owner, name: str, part: str, at) -> None:
        plain = getattr(owner, name)

        def watched(self, *values, **named):
            step = at(self, *values)
            enter(part, step)
            try:
                return plain(self, *values, **named)
            finally:
                leave(part, step)

        setattr(owner, name, watched)

    around(trainer.FineTuner, "_validate", "validation", lambda tuner: tuner.progress.step)
    around(checkpoints.Folder, "save", "checkpoint", lambda folder, step, write: step)

    tell, training_step, told = stages.StagedExperiment._tell, trainer.FineTuner.training_step, trainer.FineTuner._tell

    def tell_stage(self, stage, **what):
        if stage == "loading":
            enter("before")
        if stage == "measuring" and what.get("at") == "fine_tuned":
            enter("saving")
        tell(self, stage, **what)

    def step(self, *values, **named):
        if not said:
            said.append(leave("before"))
        enter("step", self.progress.step + 1)
        return training_step(self, *values, **named)

    def tell_step(self, *values, **named):
        told(self, *values, **named)
        leave("step", self.progress.step)

    said: list = []
    stages.StagedExperiment._tell = tell_stage
    trainer.FineTuner.training_step, trainer.FineTuner._tell = step, tell_step

    finish, write_json = tracking.ExperimentTracker.finish, tracking.write_json

    def finishing(self, *values, **named):
        leave("saving")
        enter("ending")
        return finish(self, *values, **named)

    def writing(path, *values, **named):
        if Path(path).name == "result.json":
            leave("ending")
        return write_json(path, *values, **named)

    fine_tuning.ExperimentTracker.finish, tracking.write_json = finishing, writing
    sys.argv = ["nbhelpers", *arguments]
    cli.main()


# --- the process that kills -----------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return {**os.environ, **own}


def watched(arguments: list[str], kill: Kill | None, seconds: float) -> tuple[list[str], int]:
    """Run a victim; with `kill`, kill it `seconds` after it entered that part. (what it said, exit status)."""
    reading, writing = os.pipe()
    target = "" if kill is None else f"{kill.part} {kill.at}"
    command = [sys.executable, __file__, "--victim", str(writing), target, *arguments]
    process = subprocess.Popen(
        command, pass_fds=(writing,), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    os.close(writing)
    said = []
    with os.fdopen(reading) as lines:
        for line in lines:
            said.append(line.strip())
            if kill is not None and line.split(maxsplit=1)[1].strip() == f"enter {target}":
                time.sleep(seconds)
                os.kill(process.pid, signal.SIGKILL)
    process.stderr.read()
    return said, process.wait()


def arguments_of(method: str, text: Path, run: Path) -> list[str]:
    words = f"finetune --model tiny-gpt2 --method {method} --data {text} --out {run} --steps {STEPS} --batch-size 4"
    words += f" --window 64 --evaluation-windows 16 --sample-tokens 8 --device cpu --validations {VALIDATIONS}"
    return [*words.split(), "--learning-rate", "0.003", "--checkpoint-every", str(CHECKPOINT_EVERY), "--json"]


def durations(said: list[str]) -> dict[str, float]:
    """Seconds of each part of a run, by `part step`."""
    begun, took = {}, {}
    for line in said:
        moment, what, place = line.split(maxsplit=2)
        if what == "enter":
            begun[place] = float(moment)
        elif place in begun:
            took[place] = float(moment) - begun[place]
    return took


def doing(said: list[str]) -> str:
    """Where a killed process was, by what it had said: the innermost part that it had entered and not left."""
    open_parts, late = [], False
    for line in said:
        _, what, place = line.split(maxsplit=2)
        if what == "enter":
            open_parts.append(place)
        late = what == "leave" and open_parts[-1:] == [place]
        if what == "leave" and line is not said[-1] and place in open_parts:
            open_parts.remove(place)
    part, _, step = open_parts[-1].partition(" ") if open_parts else ("", "", "")
    where = PARTS.get(part, "starting") + (f", {step}" if step not in ("", "0") else "")
    return where + (" (at its end)" if late else "")


def left_behind(run: Path) -> str:
    """What the kill left in the checkpoint folder."""
    folder = run / "artefacts" / "fine_tuned"
    whole = sorted(int(p.name[11:]) for p in folder.glob("checkpoint-*") if (p / "COMPLETE").is_file())
    torn = [len(list(path.iterdir())) for path in folder.glob("partial-*")]
    said = f"checkpoint {whole[-1]}" if whole else "no checkpoint"
    return said + "".join(f", one torn with {files} files" for files in torn)


def carry_out(case: Case, text: Path, place: Path, references: dict[str, dict]) -> Case:
    """Kill as often as the case says, then go on to the end with the plain command, and look at what came out."""
    run = place / f"run-{case.number}"
    arguments, reference = arguments_of(case.method, text, run), references[case.method]
    for kill in case.kills:
        more = ["--resume"] if kill is not case.kills[0] else []
        took = reference["durations"].get(f"{kill.part} {kill.at}", 0.0)
        said, status = watched([*arguments, *more], kill, kill.share * took)
        kill.doing, kill.left = doing(said), left_behind(run)
        if status != -signal.SIGKILL:
            case.found = {"ok": False, "why": f"the process of kill {kill.number} ended with {status} before its kill"}
            return case
    done = subprocess.run(
        [sys.executable, "-m", "nbhelpers", *arguments, "--resume"], env=environment(), capture_output=True, text=True
    )
    if done.returncode:
        case.found = {"ok": False, "why": done.stderr.strip()[-500:]}
        return case
    case.found = compared(read(run), reference, attempts=len(case.kills) + 1)
    return case


def read(run: Path) -> dict:
    from nbhelpers.runs import read_run

    record = read_run(run)
    steps, losses = record.curve("train_loss", "fine_tuned")
    validations = record.curve("val_loss", "fine_tuned")
    return {
        "status": record.status,
        "final_loss": record.result["fine_tuned"]["nll"],
        "facts": record.result["all_facts_hold"],
        "steps": steps,
        "losses": losses,
        "validations": [list(part) for part in validations],
        "attempts": len(record.manifest["attempts"]),
        "statuses": [attempt["status"] for attempt in record.manifest["attempts"]],
        "attempt_events": sum(event["kind"] == "attempt" for event in record.events),
        "resumed_from": [event["step"] for event in record.events if event["kind"] == "resume"],
        "litter": [p.name for p in (run / "artefacts" / "fine_tuned").iterdir() if not (p / "COMPLETE").is_file()],
        "torn_lines": sum(record.torn.values()),
    }


def compared(found: dict, reference: dict, attempts: int) -> dict:
    """What was found, beside the run without a kill, and whether every promise was kept."""
    whole = reference["read"]
    difference = abs(found["final_loss"] - whole["final_loss"])
    curve = max(abs(a - b) for a, b in zip(found["losses"], whole["losses"], strict=False))
    promises = {
        "the same final loss": difference <= TOLERANCE,
        "each step once": found["steps"] == list(range(1, STEPS + 1)),
        "the same curve": curve <= TOLERANCE,
        "the same validations": found["validations"][0] == whole["validations"][0],
        "attempts counted": found["attempts"] == attempts == found["attempt_events"] + 1,
        "statuses": found["statuses"] == ["interrupted"] * (attempts - 1) + ["finished"],
        "no litter": not found["litter"],
        "facts hold": found["facts"] and found["status"] == "finished",
    }
    broken = [name for name, kept in promises.items() if not kept]
    kept = {name: found[name] for name in ("final_loss", "attempts", "resumed_from", "torn_lines")}
    return kept | {"difference": difference, "curve_difference": curve, "ok": not broken, "why": ", ".join(broken)}


def reference_run(method: str, text: Path, place: Path) -> dict:
    run = place / f"reference-{method}"
    said, status = watched(arguments_of(method, text, run), None, 0.0)
    if status:
        raise RuntimeError(f"the run without a kill ended with {status}")
    return {"read": read(run), "durations": durations(said)}


def summarise(done: list[Case], references: dict[str, dict], seconds: float) -> dict:
    losses = {method: reference["read"]["final_loss"] for method, reference in references.items()}
    rows = [
        {**vars(kill), "method": case.method, "killed": len(case.kills), **case.found}
        for case in done
        for kill in case.kills
    ]
    return {
        "kills": rows,
        "runs": len(done),
        "runs_ok": sum(case.found["ok"] for case in done),
        "uninterrupted": losses,
        "steps": STEPS,
        "seconds": round(seconds, 1),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": version("torch"),
        },
    }


def markdown(found: dict) -> str:
    """The README's section, every number from `found`."""
    machine, rows = found["machine"], found["kills"]
    whole = ", ".join(f"{method} {loss:.6f}" for method, loss in found["uninterrupted"].items())
    largest = max((row.get("difference", float("inf")) for row in rows), default=0.0)
    where = f"{machine['processor']}, {machine['cores']} cores, Python {machine['python']}, torch {machine['torch']}"
    intro = (
        f"{len(rows)} SIGKILLs at seeded random moments of {found['runs']} fine-tuning runs of {found['steps']} steps "
        f"(tiny-gpt2, a checkpoint every {CHECKPOINT_EVERY} steps), on {where}. {found['runs_ok']} of {found['runs']} "
        f"runs went on to the end with `--resume` and gave the loss of the run without a kill ({whole} nats a token), "
        "the same curve with each step once, and their attempts counted right; the largest difference of a final loss "
        f"is {largest:.1e}, allowed is {TOLERANCE:.0e}. A share is of what that part takes without a kill; runs that "
        f"stand there twice were killed twice. Made by `{COMMAND}` in {found['seconds']:.0f} s; all numbers are in "
        "[benchmarks/results/soak.json](benchmarks/results/soak.json)."
    )
    columns = ("kill (= seed)", "run", "method", "killed while", "share", "on disk then", "attempts")
    columns += ("final loss", "difference", "each step once")
    lines = [intro, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [row["number"], row["run"], row["method"], row["doing"], f"{row['share']:.2f}", row["left"]]
        if "final_loss" in row:
            cells += [row["attempts"], f"{row['final_loss']:.6f}", f"{row['difference']:.1e}"]
        else:
            cells += ["", "none", ""]
        cells.append("yes" if row["ok"] else f"FAILED: {row['why']}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def write_text(path: Path) -> Path:
    """Sixty generated documents, a row each."""
    from nbhelpers import generated

    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in generated.documents(60, seed=90_000)))
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=RESULTS)
    parser.add_argument("--readme")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--runs", type=int, nargs="*", help="only these runs, by number")
    options = parser.parse_args()
    began = time.monotonic()
    chosen = [case for case in cases() if not options.runs or case.number in options.runs]
    with tempfile.TemporaryDirectory(prefix="nbhelpers-soak-") as folder, ThreadPoolExecutor(options.workers) as pool:
        place = Path(folder)
        text = write_text(place / "text.jsonl")
        references = dict(zip(METHODS, pool.map(lambda m: reference_run(m, text, place), METHODS), strict=True))
        done = []
        for case in pool.map(lambda case: carry_out(case, text, place, references), chosen):
            print(f"run {case.number}: {'; '.join(kill.doing for kill in case.kills)}: {case.found}", flush=True)
            done.append(case)
    found = summarise(done, references, time.monotonic() - began)
    publish("soak", found, markdown(found), options.out, options.readme, MARK)
    return 0 if found["runs_ok"] == found["runs"] else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--victim"]:
        victim(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        sys.exit(main())
