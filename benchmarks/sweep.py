"""What does a sparsity sweep save beside cells that each do everything by themselves?

    python benchmarks/sweep.py [--quick] [--rounds N] [--out benchmarks/results] [--readme README.md]

The same cells (plans/sparsity_12.yaml: 12 rows, 9 trainings), four ways, by wall time from the start of the first
process to the end of the last, each process with one thread (two make such small models slower):

- sweep: `nbhelpers sweep run`, one process.
- workers: the same with `--workers 2`. All other ways have one process at a time.
- alone: nbhelpers again, each cell in a process and folder of its own: it loads, scores, masks, evaluates the model as
  it is and masked, trains, merges, evaluates. The 3 rows that are aliases are not run twice here either.
- libraries: each cell a process of transformers, torch.nn.utils.prune, Trainer + peft and lm-evaluation-harness (its
  `hf` model, the harness's own HellaSwag task), doing the same; batch 32 everywhere.

Writes sweep.json and sweep.md; --quick makes two steps on few rows and writes nothing unless --out is given.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _measuring import RESULTS, machine, publish

SWEEP, WORKERS = "nbhelpers, one sweep", "nbhelpers, one sweep of 2 workers"
ALONE, LIBRARIES = "nbhelpers, each cell alone", "libraries, each cell alone"
WAYS = (SWEEP, WORKERS, ALONE, LIBRARIES)
PLAN, TASK, MODEL = "plans/sparsity_12.yaml", "hellaswag", "tiny-llama"
ROUNDS, SHARE, OVERHEAD = 2, 1 / 3, 0.10  # what was promised: a third of the time, 10 % of a job
COMMAND = "python benchmarks/sweep.py --rounds {rounds} --readme README.md"
MARK = "<!-- sweep: made by benchmarks/sweep.py -->"


def plan(quick: bool) -> dict:
    import yaml

    found = yaml.safe_load(Path(PLAN).read_text())
    if (found["base"]["model"], found["base"]["task"]) != (MODEL, TASK):
        raise ValueError(f"{PLAN} is of another model or task than this benchmark")
    if quick:
        found["base"] |= {"steps": 2, "limit": 8}
        found["axes"]["sparsity"] = [0, 0.5]
    return found


def measure(quick: bool, rounds: int, scratch: Path) -> dict:
    """Seconds of each way in each round, in turn."""
    from nbhelpers import grid, jobkinds, sweep

    wanted = plan(quick)
    assert jobkinds.KINDS
    expansion = grid.expand(grid.read_plan(wanted))
    path = scratch / "plan.json"
    path.write_text(json.dumps(wanted))
    cells = [cell(job.config) for job in expansion.jobs.values()]
    rows = exported(scratch)
    first = {job: number for number, job in reversed(list(enumerate((row.job for row in expansion.rows), 1)))}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    accuracies: dict[str, list[float]] = {}
    overheads: list[float] = []
    for turn in range(rounds):
        folder = scratch / f"sweep-{turn}"
        seconds[SWEEP].append(timed(["-m", "nbhelpers", "sweep", "run", path, "--out", folder]))
        done = [row for row in sweep.results(folder) if not row["alias"]]
        accuracies[SWEEP] = [row["tuned"] for row in done]
        overheads += [row["overhead_share"] for row in done]
        folder = scratch / f"workers-{turn}"
        seconds[WORKERS].append(timed(["-m", "nbhelpers", "sweep", "run", path, "--out", folder, "--workers", 2]))
        accuracies[WORKERS] = [row["tuned"] for row in sweep.results(folder) if not row["alias"]]
        total, found = 0.0, []
        for number in first.values():
            own = scratch / f"alone-{turn}-{number}"
            words = ["-m", "nbhelpers", "sweep", "run", path, "--out", own, "--only", number]
            total += timed(words)
            found.append(sweep.results(own)[number - 1]["tuned"])
        seconds[ALONE].append(total)
        accuracies[ALONE] = found
        total, found = 0.0, []
        for number, values in enumerate(cells):
            told = scratch / f"libraries-{turn}-{number}.json"
            total += timed([__file__, "--child", json.dumps(values | {"rows": rows, "told": str(told)})])
            found.append(json.loads(told.read_text())["tuned"])
        seconds[LIBRARIES].append(total)
        accuracies[LIBRARIES] = found
    return {"cells": cells, "seconds": seconds, "accuracies": accuracies, "overhead_shares": overheads}


def cell(config: dict) -> dict:
    names = ("sparsity", "importance", "mode", "steps", "learning_rate", "batch_size", "lora_rank", "lora_alpha")
    return {name: config[name] for name in (*names, "seed", "limit")}


def exported(scratch: Path) -> dict[str, str]:
    """The bundled rows as files, for the harness and for the peer's training."""
    from nbhelpers import generated_tasks

    found = {}
    for split in ("evaluation", "train"):
        path = scratch / f"{split}.jsonl"
        rows = generated_tasks.rows(generated_tasks.story_ending, split)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found[split] = str(path)
    return found


def timed(words: list) -> float:
    """Wall seconds of a Python process from its start to its end. RuntimeError where it failed."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))[:200]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return time.perf_counter() - started


# A cell as one writes it with the libraries ---------------------------------------------------------------------------


def by_libraries(values: dict) -> dict:
    """Load, evaluate, prune, evaluate, LoRA by Trainer, merge, mask again (sparse to sparse), evaluate."""
    import torch
    import transformers
    from parity import harness, task_folder
    from peft import LoraConfig, get_peft_model
    from torch.nn.utils import prune

    from nbhelpers import models  # only for where the bundled model lies

    torch.manual_seed(values["seed"])
    source = models.locate(MODEL)[1]
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    with tempfile.TemporaryDirectory() as folder:
        tasks = task_folder(Path(folder), {TASK: Path(values["rows"]["evaluation"])})

        def accuracy() -> float:
            found = harness(model, tokenizer, TASK, tasks, values["limit"], batch=values["batch_size"])
            return found["results"]["acc,none"]

        told, masks = {"dense": accuracy()}, {}
        linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n}
        if values["sparsity"]:
            choose = {"magnitude": prune.l1_unstructured, "random": prune.random_unstructured}[values["importance"]]
            for name, module in linears.items():
                choose(module, "weight", values["sparsity"])
                masks[name] = module.weight_mask.clone()
                prune.remove(module, "weight")
            told["masked"] = accuracy()
        settings = LoraConfig(
            task_type="CAUSAL_LM", r=values["lora_rank"], lora_alpha=values["lora_alpha"], target_modules="all-linear"
        )
        adapted = get_peft_model(model, settings)
        train_by_trainer(adapted, tokenizer, values, folder)
        model = adapted.merge_and_unload(safe_merge=True).eval()
        if values["mode"] == "sparse_to_sparse":
            for name, module in model.named_modules():
                if name in masks:
                    module.weight.data *= masks[name]
        told["tuned"] = accuracy()
    return told


def train_by_trainer(adapted, tokenizer, values: dict, folder: str) -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    rows = [json.loads(line) for line in Path(values["rows"]["train"]).read_text().splitlines()]
    train = []
    for row in rows:
        prompt = tokenizer(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")["input_ids"]
        answer = tokenizer(f" {row['endings'][int(row['label'])]}", add_special_tokens=False)["input_ids"]
        train.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})

    def padded(batch: list[dict]) -> dict:
        longest = max(len(row["input_ids"]) for row in batch)
        column = {"input_ids": 0, "labels": -100}
        found = {
            name: torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in batch])
            for name, fill in column.items()
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in batch])
        return found | {"attention_mask": (torch.arange(longest) < lengths[:, None]).long()}

    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=values["steps"],
        per_device_train_batch_size=values["batch_size"],
        learning_rate=values["learning_rate"],
        max_grad_norm=1.0,
        use_cpu=not torch.cuda.is_available(),
        seed=values["seed"],
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    Trainer(model=adapted, args=arguments, train_dataset=train, data_collator=padded).train()


# Tables ---------------------------------------------------------------------------------------------------------------


def summarise(found: dict) -> dict:
    """Ratios within each round, their median, and what was promised."""
    seconds = found["seconds"]
    ratios = {
        way: {
            name: [ours / theirs for ours, theirs in zip(seconds[way], seconds[name], strict=True)]
            for name in (ALONE, LIBRARIES)
        }
        for way in (SWEEP, WORKERS)
    }
    overhead = statistics.median(found["overhead_shares"])
    targets = [
        *(
            {"what": f"time of {way} beside {name}", "wanted": SHARE, "seen": statistics.median(taken)}
            for way, beside in ratios.items()
            for name, taken in beside.items()
        ),
        {
            "what": "share of a job that is neither training nor evaluating, median",
            "wanted": OVERHEAD,
            "seen": overhead,
        },
    ]
    return found | {
        "ratios": ratios,
        "targets": [one | {"met": one["seen"] <= one["wanted"]} for one in targets],
    }


def markdown(found: dict) -> str:
    """The README's section, every number from `found`."""
    machine, values = found["machine"], found["cells"][0]
    lines = [
        (
            f"The {len(found['cells'])} trainings of `{PLAN}` ({MODEL}, {TASK} rows generated by this project, "
            f"{values['steps']} steps of batch {values['batch_size']}) as one sweep and as processes that each load, "
            "score, mask and evaluate the baseline by themselves, one after another; wall seconds, "
            f"{found['rounds']} round{'s in turn' * (found['rounds'] > 1)} on {machine['processor']}, threads a "
            f"process: {machine['threads']}, torch {machine['torch']}, transformers {machine['transformers']}, peft "
            f"{machine['peft']}. The libraries are transformers, torch.nn.utils.prune, Trainer + peft and "
            "lm-evaluation-harness. Made by "
            f"`{COMMAND.format(rounds=found['rounds'])}`; all numbers are in "
            "[benchmarks/results/sweep.json](benchmarks/results/sweep.json)."
        ),
        "",
        f"| way | seconds, by round | of the time of {ALONE} | of {LIBRARIES} | accuracy of the tuned cells, mean |",
        "|---|---|---|---|---|",
    ]
    for way in WAYS:
        taken = ", ".join(f"{seconds:.0f}" for seconds in found["seconds"][way])
        beside = [
            f"{statistics.median(found['ratios'][way][name]):.2f}" if way in found["ratios"] else ""
            for name in (ALONE, LIBRARIES)
        ]
        lines.append(f"| {way} | {taken} | {' | '.join(beside)} | {statistics.fmean(found['accuracies'][way]):.3f} |")
    lines.append("")
    for one in found["targets"]:
        kept = "met" if one["met"] else "NOT met"
        lines.append(f"- {one['what']}: at most {one['wanted']:.2f} was promised, {one['seen']:.2f} measured: {kept}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two steps, few rows: does it run?")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out")
    parser.add_argument("--readme")
    options = parser.parse_args()
    if options.child:
        values = json.loads(options.child)
        Path(values["told"]).write_text(json.dumps(by_libraries(values)))
        return

    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are measured, and of what machine() tells
    here = machine("transformers", "peft")
    rounds = 1 if options.quick else options.rounds
    with tempfile.TemporaryDirectory() as scratch:
        found = summarise(measure(options.quick, rounds, Path(scratch)) | {"machine": here, "rounds": rounds})
    out = options.out or (None if options.quick else RESULTS)
    publish("sweep", found, markdown(found), out, options.readme, MARK)


if __name__ == "__main__":
    main()
