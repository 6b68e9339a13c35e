"""`ldm-edu evaluate` of a text model: what each group asks for, and what counts as faithful."""

import re

import pytest
import torch
from torch import Tensor

from ldm_edu.datasets.captions import SAME_SIZE, Thing
from ldm_edu.datasets.shapes import COLOUR_NAMES, ShapeScenes
from ldm_edu.evaluation.faithfulness import GROUPS, OPEN, faithfulness, wanted_things
from ldm_edu.runtime import UserError

COUNT, SEED = 10, 3
OTHER = {"small": "large", "large": "small"} | dict(zip(COLOUR_NAMES, COLOUR_NAMES[1:] + COLOUR_NAMES[:1], strict=True))
SIDES = {"above", "below", "left", "right"}
SIZE_WORDS = {word for words in SAME_SIZE.values() for word in words}


class Painter:
    """Stands in for a model: it paints the scene that it is asked for, or in some groups that of its neighbour."""

    device = torch.device("cpu")

    def __init__(self, *confused: str) -> None:
        self.confused, self.calls = confused, []

    def sample(self, prompts: list[str], **options: object) -> Tensor:
        self.calls.append({"prompts": prompts} | options)
        seen = sum(len(call["prompts"]) for call in self.calls) - len(prompts)
        group = [name for name in GROUPS for _ in asked(name)][seen]
        scenes = ShapeScenes(64, count=COUNT, seed=SEED, **GROUPS[group])
        return scenes.images(range(COUNT)).roll(int(group in self.confused), dims=0)[options["seeds"]]

    def said(self) -> dict[str, list[str]]:
        """The captions of each group."""
        texts = iter([prompt for call in self.calls for prompt in call["prompts"]])
        return {group: [next(texts) for _ in asked(group)] for group in GROUPS}

    def to_latent(self, images: Tensor) -> Tensor:
        return images / 2

    def to_image(self, z: Tensor) -> Tensor:
        return z * 2


def asked(group: str) -> list[int]:
    """Which scenes a group asks for: without colours, two of one shape could not be told apart."""
    found = [i for i, things in enumerate(scenes_of(group)) if len({t.shape for t in things}) > 1]
    return found if group == "no_colours" else list(range(COUNT))


def scenes_of(group: str) -> list[tuple[Thing, ...]]:
    return wanted_things(ShapeScenes(64, count=COUNT, seed=SEED, **GROUPS[group]))


def test_each_group_is_counted():
    painter = Painter()
    report = faithfulness(painter, COUNT, SEED, num_steps=7, guidance_scale=2.0, batch_size=4)
    shares = dict.fromkeys((*GROUPS, "ceiling"), 1.0) | {"shuffled": 0.0}
    assert report == {"faithfulness": shares, "captions": COUNT, "seed": SEED}
    assert [i for call in painter.calls for i in call["seeds"]] == [i for group in GROUPS for i in asked(group)]
    assert 0 < len(asked("no_colours")) < COUNT
    sizes = [len(asked(group)[k : k + 4]) for group in GROUPS for k in range(0, len(asked(group)), 4)]
    assert [len(call["prompts"]) for call in painter.calls] == sizes
    assert all(call["num_steps"] == 7 and call["guidance_scale"] == 2 for call in painter.calls)
    assert [call["seeds"] for call in painter.calls[:3]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("group", GROUPS)
def test_a_wrong_picture_counts_in_its_group_alone(group: str):
    shares = faithfulness(Painter(group), COUNT, SEED)["faithfulness"]
    assert shares[group] == 0 and shares["ceiling"] == 1
    assert all(shares[other] == 1 for other in GROUPS if other != group)


@pytest.mark.parametrize("attribute", ["size", "colour"])
def test_what_a_caption_leaves_open_is_open(monkeypatch: pytest.MonkeyPatch, attribute: str):
    """Pictures in which every size, or every colour, is another one are right where no caption said it."""

    def of_another(scenes: ShapeScenes) -> list[tuple[Thing, ...]]:
        return [
            tuple(t._replace(**{attribute: OTHER[getattr(t, attribute)]}) for t in things)
            for things in wanted_things(scenes)
        ]

    painter, group = Painter(), f"no_{attribute}s"
    monkeypatch.setattr("ldm_edu.evaluation.faithfulness.wanted_things", of_another)
    shares = faithfulness(painter, COUNT, SEED)["faithfulness"]
    assert [name for name, share in shares.items() if share] == [group]
    assert shares[group] == 1


def test_a_group_that_has_nothing_to_ask_has_no_share(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ldm_edu.evaluation.faithfulness.leave_open", lambda things, **_: things)
    assert faithfulness(Painter(), COUNT, SEED)["faithfulness"]["no_colours"] is None


def test_captions_that_leave_something_open_say_all_the_rest():
    painter = Painter()
    faithfulness(painter, COUNT, SEED)
    for group, captions in painter.said().items():
        for caption, i in zip(captions, asked(group), strict=True):
            things = scenes_of(group)[i]
            words = set(re.findall(r"\w+", caption))
            named = group != "no_colours"
            assert all((f"{t.colour} " if named else "") + t.shape in caption for t in things), caption
            assert len(things) == 1 or SIDES & words
            assert words & set(COLOUR_NAMES) == ({t.colour for t in things} if named else set()), caption
            assert bool(words & SIZE_WORDS) == (group != "no_sizes")
        if group in OPEN:
            assert {"there", "and", "picture"} <= set(" ".join(captions).split())  # every phrasing


def test_refused():
    for arguments, words in (((0, 1), "must be at least 2; it is 0"), ((4, 0), "Seed 0 makes the training scenes")):
        with pytest.raises(UserError, match=words):
            faithfulness(Painter(), *arguments)
