"""What happens if exactly these heads are closed? One model kept ready, measured and asked for a text on the spot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nbhelpers import attention, data, evaluate, memory, models
from nbhelpers.architecture import Geometry, geometry
from nbhelpers.experiments import PruningConfig
from nbhelpers.stages import check_window, first_words

TRYOUT_WINDOWS = 16  # test windows that are measured: seconds on a CPU, and said wherever the number is shown
SAMPLE_TOKENS = 40


@dataclass(frozen=True)
class Tried:
    """Perplexity on the first test windows with these heads closed, the model as it was loaded, and what it writes."""

    closed: list[tuple[int, int]]
    perplexity: float
    all_open: float
    windows: int
    sample: str


class Tryout:
    """A model as loaded (not fine-tuned), its gates opened and closed by hand. `close()` gives its memory back."""

    def __init__(self, config: PruningConfig) -> None:
        window = check_window(config.window, models.load_config(config.model))
        corpus = data.load_corpus(config.text)
        loaded = models.load_model(config.model, device=config.device, dtype=config.dtype)
        self.config, self.generated = config, corpus.generated
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        if not attention.is_installed(self.model):
            raise ValueError(
                f"heads of {config.model!r} cannot be closed one by one: its architecture has no gates here"
            )
        self.rows = data.rows(self.tokenizer, corpus.test, window)[:TRYOUT_WINDOWS]
        self.prompt = config.sample_prompt or first_words(corpus.test[0])
        self.all_open = evaluate.perplexity(self.model, self.rows).perplexity

    @property
    def geometry(self) -> Geometry:
        return geometry(self.model.config)

    def measure(self, closed: Iterable[Sequence[int]], should_stop: Callable[[], bool] | None = None) -> Tried:
        """Close exactly these heads, measure, and let the model write (greedily, so that only the heads differ)."""
        attention.close_heads(self.model, closed)
        found = evaluate.perplexity(self.model, self.rows, should_stop=should_stop)
        sample = evaluate.generate(self.model, self.tokenizer, self.prompt, max_new_tokens=SAMPLE_TOKENS, temperature=0)
        return Tried(attention.closed_heads(self.model), found.perplexity, self.all_open, len(self.rows), sample)

    def close(self) -> None:
        memory.release(self.model)
