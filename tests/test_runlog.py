"""log.txt holds what was said while the run was active, and leaves logging as it was."""

import logging
import re
import warnings

import pytest
from run_folders import tracker

from nbhelpers.runs import read_run


@pytest.fixture(autouse=True)
def library_log_level():
    library = logging.getLogger("nbhelpers")
    before = library.level
    yield
    library.setLevel(before)


def test_log_txt_holds_library_logging_and_warnings_while_the_run_is_active(tmp_path):
    library = logging.getLogger("nbhelpers")
    library.setLevel(logging.WARNING)
    before = (library.level, list(library.handlers), warnings.showwarning)
    with tracker(tmp_path):
        logging.getLogger("nbhelpers.heads").info("closing 3 heads")
        logging.getLogger("nbhelpers.heads").debug("too much")
        logging.getLogger("somebody.else").error("not ours")
        library.warning("careful 🚀")
    with pytest.warns(DeprecationWarning, match="old thing") as others, tracker(tmp_path / "b"):
        warnings.warn("old thing", DeprecationWarning, stacklevel=1)
    assert len(others) == 1, "whoever listened before still hears it"
    assert (library.level, library.handlers, warnings.showwarning) == before
    library.warning("after the run")
    text = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert re.search(r"INFO nbhelpers\.heads: closing 3 heads", text) and "WARNING nbhelpers: careful 🚀" in text
    assert not re.search("too much|not ours|after the run", text)
    assert "DeprecationWarning: old thing" in (tmp_path / "b" / "log.txt").read_text()
    events = read_run(tmp_path).events
    assert [event["message"] for event in events if event["kind"] == "warning"] == ["careful 🚀"]


def test_overlapping_runs_each_get_the_log_and_the_last_one_restores(tmp_path):
    library = logging.getLogger("nbhelpers")
    library.setLevel(logging.WARNING)
    before = (library.level, list(library.handlers), warnings.showwarning)
    first, second = tracker(tmp_path / "a").start(), tracker(tmp_path / "b").start()
    library.info("both")
    first.finish()
    library.info("second only")
    second.finish()
    assert (library.level, library.handlers, warnings.showwarning) == before
    assert "second only" not in (tmp_path / "a" / "log.txt").read_text()
    assert all(word in (tmp_path / "b" / "log.txt").read_text() for word in ("both", "second only"))
