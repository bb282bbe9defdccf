"""What instruction does the bundled text hold that the bundled models were never taught? Stories in, a list out.

The models have read such stories, and how they end; they have never seen the list. So fine-tuning has something to
teach that can be seen in the text at once: the form of the answer.
"""

from __future__ import annotations

import hashlib
import re

from nbhelpers import data, generated

BUNDLED = "bundled-instructions"
INSTRUCTION = "\nQuestion: Who is where, and who has what?\nAnswer:"
_ENDING = re.compile(r"(\w+) was in the (\w+) and had ([^.]+)\.")


def load_corpus(source: str) -> data.Corpus:
    """`bundled-instructions`, or whatever `data.load_corpus` knows."""
    if source != BUNDLED:
        return data.load_corpus(source)
    texts = generated.documents(data.BUNDLED_DOCUMENTS, seed=data.BUNDLED_SEED)
    documents = [found for text in texts if (found := as_instruction(text))]
    digest = hashlib.sha256("".join(f"{document.prompt}{document.text}" for document in documents).encode())
    parts = data.split_documents(documents)
    return data.Corpus(*parts, source=source, generated=True, sha256=digest.hexdigest())


def as_instruction(text: str) -> data.Document | None:
    """A story without its ending as the prompt, what the ending says as the list; None for a text that is no story.

    >>> told = "Leo met Rosa. In the end Leo was in the barn and had the bell and the cup."
    >>> told += " Rosa was in the inn and had nothing."
    >>> as_instruction(told).prompt
    'Leo met Rosa.\\nQuestion: Who is where, and who has what?\\nAnswer:'
    >>> print(as_instruction(told).text)
     Leo is in the barn with the bell and the cup. Rosa is in the inn with nothing.
    """
    endings = list(_ENDING.finditer(text))
    if len(endings) < 2:
        return None
    story = text[: text.rfind(".", 0, endings[0].start()) + 1]
    parts = [f"{name} is in the {place} with {things}" for name, place, things in (found.groups() for found in endings)]
    return data.Document(f" {'. '.join(parts)}.", story + INSTRUCTION)
