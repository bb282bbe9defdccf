"""What was found, as one page that needs nothing else? Runs in, a self-contained index and an archive out."""

from __future__ import annotations

import base64
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment

from nbhelpers import plots
from nbhelpers.records import write_atomic
from nbhelpers.runs import Run

STAGED = ("pruning", "fine_tuning")  # kinds of runs whose result holds stages
LARGE_MODEL = 50 * 2**20  # model files above this stay out of the archive, which says so
FIXED_TIME = (1980, 1, 1, 0, 0, 0)  # the same archive for the same files

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 46rem; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem }
img { max-width: 100%; height: auto } .note { color: #666; font-size: .9rem }
.failed { color: #b00020; font-weight: 600 }
ul { padding-left: 1.1rem } li { margin: .15rem 0 } code { font-size: .85rem; overflow-wrap: anywhere }
"""
RUN = """<p>{{ run.headline }}</p>
{% if run.error %}<p class="failed">{{ run.error }}</p>{% endif %}
{% if run.generated %}<p class="note">On text that this project generated itself.</p>{% endif %}
{% if run.figure %}<img alt="{{ run.headline }}" src="data:image/png;base64,{{ run.figure }}">{% endif %}
<ul>{% for fact in run.facts %}<li{% if not fact.ok %} class="failed"{% endif %}>
{{ "holds" if fact.ok else "FAILED" }}: {{ fact.says }} <span class="note">({{ fact.saw }})</span></li>{% endfor %}</ul>
<p class="note"><code>{{ run.folder }}</code></p>"""
INDEX = (
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>What was found</title><style>"""
    + STYLE
    + """</style></head><body><h1>What was found</h1>
{% for entry in entries %}<section><h2>{{ entry.title }}</h2>
{% if entry.error %}<p class="failed">{{ entry.error }}</p>{% endif %}
{% for run in entry.runs %}"""
    + RUN
    + """{% endfor %}
{% if not entry.runs and not entry.error %}<p class="note">It made no run of its own; what it shows is in
<a href="notebooks/{{ entry.name }}.ipynb">{{ entry.name }}.ipynb</a>.</p>{% endif %}</section>{% endfor %}
</body></html>
"""
)


def index_page(entries: Sequence[dict], path: str | Path) -> Path:
    """Write the index of notebooks that ran. entries: {"title", "error" or None, "runs": list[Run]}."""
    shown = [entry | {"runs": [run_entry(run) for run in entry["runs"]]} for entry in entries]
    page = Environment(autoescape=True).from_string(INDEX).render(entries=shown)
    write_atomic(path, page)
    return Path(path)


def run_entry(run: Run) -> dict[str, Any]:
    """What a page shows of one run; of one that did not finish its error and no number."""
    result = run.result
    if result is None:
        return {"headline": headline(run), "error": failure(run), "facts": [], "folder": run.folder.name}
    figure = plots.png(plots.stages(result)) if run.kind in STAGED else None
    return {
        "headline": headline(run),
        "generated": (result.get("text") or {}).get("generated", False),
        "facts": result.get("facts") or [],
        "folder": run.folder.name,
        "figure": base64.b64encode(figure).decode() if figure else None,
    }


def headline(run: Run) -> str:
    """One sentence a run: its verdict, where its kind has one."""
    return (run.result or {}).get("verdict") or f"{run.name}: {run.status}"


def failure(run: Run) -> str | None:
    """The error that a run recorded last, on one line; None where it recorded none."""
    errors = [event for event in run.events if event.get("kind") == "error"]
    return f"{errors[-1].get('type')}: {' '.join(str(errors[-1].get('message')).split())}" if errors else None


def _holds_answers(path: Path) -> bool:
    """Whether a file holds texts of the rows that were asked: they stay here. path: below the folder that is packed."""
    return path.name.startswith("predictions.") or ".predictions" in path.parts


def archive(folder: str | Path, name: str = "results.zip") -> Path:
    """Everything in `folder` as one zip in it; weights above 50 MB are left out and named in LEFT_OUT.txt.

    Answers to rows of users (predictions) are left out too.
    """
    folder = Path(folder)
    target, beside, left_out = folder / name, folder / f".{name}.part", []
    with zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as bundle:
        for path in sorted(folder.rglob("*")):
            if not path.is_file() or path in (target, beside) or _holds_answers(path.relative_to(folder)):
                continue
            inside = path.relative_to(folder).as_posix()
            if path.suffix == ".safetensors" and path.stat().st_size > LARGE_MODEL:
                left_out.append(f"{inside} ({path.stat().st_size} bytes)")
                continue
            entry = zipfile.ZipInfo(inside, FIXED_TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            with path.open("rb") as source, bundle.open(entry, "w") as sink:
                while chunk := source.read(2**20):
                    sink.write(chunk)
        if left_out:
            bundle.writestr(zipfile.ZipInfo("LEFT_OUT.txt", FIXED_TIME), "\n".join(left_out) + "\n")
    beside.replace(target)
    return target
