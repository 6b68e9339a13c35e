"""The map of the whole: what it says, and that nothing on it covers anything else."""

from itertools import combinations

import pytest

from ldm_edu.runtime import UserError
from ldm_edu.widgets import system_map
from ldm_edu.widgets.system_map import BOXES


def test_the_map_bears_the_numbers_it_is_given():
    figure = system_map({"unet": "04"}, "everything: 06")
    words = {text.get_text() for text in figure.axes[0].texts}
    assert {"04", "everything: 06", "Latent space"} <= words
    with pytest.raises(UserError, match=r"no box \['engine'\]"):
        system_map({"engine": "17"}, "")


def test_the_boxes_of_the_map_stand_apart():
    gaps = {
        (a, b): max(x2 - x1 - w1, x1 - x2 - w2, y2 - y1 - h1, y1 - y2 - h2)
        for (a, (x1, y1, w1, h1, _)), (b, (x2, y2, w2, h2, _)) in combinations(BOXES.items(), 2)
    }
    assert {pair for pair, gap in gaps.items() if gap < 1.4} == {("unet", "attention")}, "a badge rises 1.3"
