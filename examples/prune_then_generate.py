"""What does a model write before and after half of its attention heads are closed and it is fine-tuned for a moment?

    python examples/prune_then_generate.py [--model tiny-llama] [--level 0.5] [--steps 20] [--out DIR]

Everything is bundled: no download. The run leaves a run directory; the pruned model is read back from it.
"""

from __future__ import annotations

import argparse

from nbhelpers import evaluate, models
from nbhelpers.experiments import PruningConfig, PruningExperiment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--text", default="bundled")
    parser.add_argument("--level", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--evaluation-windows", type=int, default=16)
    parser.add_argument("--prompt", default="The doctor said")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--out", default="runs/prune_then_generate")
    options = parser.parse_args()

    config = PruningConfig(
        name=f"{options.model} {options.level:g}",
        model=options.model,
        text=options.text,
        level=options.level,
        steps=options.steps,
        window=options.window,
        evaluation_windows=options.evaluation_windows,
        control=False,
        device="cpu",
    )
    result = PruningExperiment.run(config, run_dir=options.out)
    print(f"closed {len(result['pruned_heads'])} of {result['total_heads']} heads by {result['strategy']}")
    for stage in ("baseline", "pruned", "fine_tuned"):
        if result[stage]:
            print(f"{stage:<10}  perplexity {result[stage]['perplexity']:.3f}")
    held = sum(fact["ok"] for fact in result["facts"])
    print(f"{held} of {len(result['facts'])} checked facts hold")
    for label, name in (("before", options.model), ("after", f"{options.out}/model")):
        loaded = models.load_model(name, device="cpu")
        said = evaluate.generate(
            loaded.model, loaded.tokenizer, options.prompt, max_new_tokens=options.tokens, temperature=0
        )
        print(f"{label:<10}  {said!r}")


if __name__ == "__main__":
    main()
