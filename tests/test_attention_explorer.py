"""The attention explorer without a browser: each slider picks another map, and says which."""

import base64
import re

import pytest
import torch

from ldm_edu.runtime import UserError
from ldm_edu.widgets import AttentionExplorer, spotlight

WORDS, STEPS = ["a", "red", "star"], ["t = 999", "t = 500", "clean"]


@pytest.fixture
def explorer() -> AttentionExplorer:
    draw = torch.Generator().manual_seed(0)
    pictures = torch.rand(3, 3, 8, 8, generator=draw) * 2 - 1
    maps = {f"layer {s}": torch.rand(3, 3, s, s, generator=draw) for s in (2, 4)}
    return AttentionExplorer(WORDS, STEPS, pictures, maps, start=(1, 1, 2), still_words=(1, 2))


def shown(explorer: AttentionExplorer) -> list[tuple[str, str]]:
    """Alt text and bytes of each picture."""
    return re.findall(r'<img alt="([^"]*)".*?src="data:image/png;base64,([^"]*)"', explorer.picture.value)


def test_the_light_falls_where_the_weights_are():
    picture, weights = torch.ones(3, 4, 4), torch.tensor([[0.0, 0.1], [0.2, 0.0]])
    lit = spotlight(picture, weights)
    torch.testing.assert_close(lit[:, 2:, :2], picture[:, 2:, :2])
    assert lit[0, 0, 3] < 0.5 and lit[0, 0, 0] < -0.7 and lit[0, 3, 3] == lit[0, 0, 0]
    torch.testing.assert_close(spotlight(picture, 0.001 * weights), lit)  # a map's own largest weight is its white


@pytest.mark.parametrize("name, value", [("word", "star"), ("layer", "layer 2")])
def test_word_and_layer_change_the_map_and_leave_the_picture(explorer: AttentionExplorer, name: str, value: str):
    before = shown(explorer)
    explorer.sliders[name].value = explorer.options[name].index(value)
    after = shown(explorer)
    assert after[0] == before[0] and after[1][1] != before[1][1]
    assert value in after[1][0] and value not in before[1][0]
    assert f"<b>{name}</b>: {value} " in explorer.readouts[name].value


def test_the_timestep_changes_both(explorer: AttentionExplorer):
    before = shown(explorer)
    assert before[0][0] == "picture at clean"
    assert before[1][0] == "places that read “red” in layer 4, clean"
    explorer.sliders["timestep"].value = 0
    after = shown(explorer)
    assert all(a[1] != b[1] and "t = 999" in a[0] for a, b in zip(after, before, strict=True))
    assert "t = 999 &nbsp;(1 of 3)" in explorer.readouts["timestep"].value


def test_every_position_shows_its_own_map(explorer: AttentionExplorer):
    seen = set()
    for w in range(3):
        for layer in range(2):
            for step in range(3):
                places = {"word": w, "layer": layer, "timestep": step}
                for name, place in places.items():
                    explorer.sliders[name].value = place
                seen.add(shown(explorer)[1])
                largest = explorer.maps[explorer.options["layer"][layer]][step, w].max()
                assert f" to {largest:.1%} of" in explorer.picture.value
    assert len(seen) == 18


def test_the_still_has_a_row_for_each_word(explorer: AttentionExplorer):
    data, metadata = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data and data["text/plain"] == AttentionExplorer.text
    alt = metadata["image/png"]["alt"]
    assert "red, star" in alt and "t = 999 to clean" in alt
    still = base64.b64decode(data["image/png"])
    explorer.sliders["layer"].value = 0
    assert explorer.still() != still
    explorer.still_words = [1]
    assert int.from_bytes(explorer.still()[20:24]) < int.from_bytes(still[20:24])  # a PNG's height


def test_maps_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"3 steps, 3 words; maps \{'x': \(3, 2, 2, 2\)\}"):
        AttentionExplorer(WORDS, STEPS, torch.zeros(3, 3, 4, 4), {"x": torch.ones(3, 2, 2, 2)})
    with pytest.raises(UserError, match="a picture a step"):
        AttentionExplorer(WORDS, STEPS, torch.zeros(2, 3, 4, 4), {"x": torch.ones(3, 3, 2, 2)})
    with pytest.raises(UserError, match=r"\(steps, words, h, w\).* maps \{'x': \(3, 3, 4\)\}"):
        AttentionExplorer(WORDS, STEPS, torch.zeros(3, 3, 4, 4), {"x": torch.ones(3, 3, 4)})
    with pytest.raises(UserError, match=r"a map \(h, w\).* these are \(64,\)"):
        spotlight(torch.zeros(3, 8, 8), torch.ones(64))
