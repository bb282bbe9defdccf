"""Does the map of heads show every head, and which matter? (Clicks on a run's heads: test_pruning_panel.py.)"""

from __future__ import annotations

from nbhelpers import head_map
from nbhelpers.pruning_panel import PruningPanel


def test_darker_is_more_important():
    assert head_map.shade(0) == "#e8f0f7" and head_map.shade(1) == "#00548c"
    assert head_map.shade(-1) == head_map.shade(0) and head_map.shade(2) == head_map.shade(1)


def test_a_model_with_many_heads_shows_a_few_layers_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(head_map, "MOST_BUTTONS", 12)
    made = PruningPanel(root=tmp_path)
    made.heads.show_scores([[0.1] * 6 for _ in range(5)], [[4, 0]])
    assert list(made.heads.layers.options) == [("0 to 1", 0), ("2 to 3", 2), ("4 to 4", 4)]
    assert set(made.heads.buttons) == {(layer, head) for layer in (0, 1) for head in range(6)}
    made.heads.layers.value = 4
    assert made.heads.buttons[4, 0].description == "✕" and len(made.heads.buttons) == 6
