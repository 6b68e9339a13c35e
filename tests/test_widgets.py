"""The widgets without a browser: values are set from Python, and what a person would see is read back."""

import base64
import html
import io
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import ldm_edu.widgets
from ldm_edu.diffusion import Step
from ldm_edu.runtime import UserError
from ldm_edu.widgets import (
    Frame,
    FrameSlider,
    LossCurve,
    PromptBox,
    TimestepSlider,
    latent_channels,
    show,
    show_figure,
)
from ldm_edu.widgets.curve import _smooth
from ldm_edu.widgets.pictures import spread

PROMPT = "a small red star above a large blue circle"
TIMESTEPS = (999, 666, 333, -1)


def fake_steps(batch: int = 1):
    """Four steps of a sampler on 4x8x8 latents."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, batch, 4, 8, 8, generator=generator)
    for i, t in enumerate(TIMESTEPS):
        yield Step(t, clean if t < 0 else noise + i, clean + (3 - i))


def fake_decode(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, 4, 8, 8) to images (B, 3, 64, 64)."""
    return torch.tanh(latents[:, :3]).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


class FakeModel:
    """What a prompt box asks of a model; it knows only the words of PROMPT."""

    def __init__(self):
        self.calls = []

    def steps(self, prompts, **settings):
        self.calls.append((prompts, settings))
        unknown = [word for word in prompts[0].split() if word not in PROMPT]
        if unknown:
            raise UserError(f"Unknown words: {', '.join(unknown)} <of {len(PROMPT.split())}>.")
        yield from fake_steps(len(prompts))

    to_image = staticmethod(fake_decode)


def images_in(markup: str) -> list[tuple[str, np.ndarray]]:
    """The (alt text, pixels) of every `<img>` in HTML."""
    found = re.findall(r'<img alt="([^"]*)".*?src="data:image/png;base64,([^"]*)"', markup)
    return [(html.unescape(alt), pixels(base64.b64decode(data))) for alt, data in found]


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_the_slider_changes_pictures_alt_text_and_readout():
    slider = TimestepSlider(fake_steps(), fake_decode, alt=PROMPT)
    seen = []
    for index, label in enumerate(("t = 999", "t = 666", "t = 333", "clean")):
        slider.slider.value = index
        panels = images_in(slider.picture.value)
        assert [alt for alt, _ in panels] == [f"zₜ at {label}: {PROMPT}", f"predicted z₀ at {label}: {PROMPT}"]
        assert label in slider.readout.value and f"frame {index + 1} of 4" in slider.readout.value
        seen.append(tuple(picture.tobytes() for _, picture in panels))
    assert len({z for z, _ in seen}) == len({z0 for _, z0 in seen}) == 4


def test_the_frames_are_the_decoded_latents_pixel_for_pixel():
    slider = TimestepSlider(fake_steps(), fake_decode)
    slider.slider.value = 1
    step = list(fake_steps())[1]
    for (_, shown), latent in zip(images_in(slider.picture.value), (step.z, step.z0), strict=True):
        expected = ((fake_decode(latent)[0] + 1) * 127.5).round().byte().permute(1, 2, 0)
        np.testing.assert_array_equal(shown, expected)


def test_the_slider_starts_on_the_last_frame_and_the_play_button_drives_it():
    slider = TimestepSlider(fake_steps(), fake_decode)
    assert slider.slider.value == slider.slider.max == slider.play.max == 3
    slider.play.value = 2
    assert slider.slider.value == 2 and "t = 333" in slider.readout.value
    assert slider.slider.continuous_update
    assert "ldm-timestep" in slider._dom_classes


def test_a_batch_stands_on_one_sheet():
    slider = TimestepSlider(fake_steps(batch=4), fake_decode)
    assert images_in(slider.picture.value)[0][1].shape == (64 + 2 + 64, 64 + 2 + 64, 3)


def test_frames_need_not_come_from_a_sampler():
    ramp = [torch.full((1, 3, 4, 4), value) for value in (-1.0, 0.0, 1.0)]
    slider = FrameSlider((Frame(f"{i} %", {"grey": image}) for i, image in enumerate(ramp)), "Light")
    slider.slider.value = 0
    assert slider.readout.value.startswith("<b>Light</b>: 0 %")
    assert images_in(slider.picture.value)[0][1].max() == 0
    with pytest.raises(UserError, match="same captions"):
        slider.append(Frame("3 %", {"another": ramp[0]}))


@pytest.mark.parametrize("make", [TimestepSlider, lambda s, d, alt: PromptBox(FakeModel(), alt)])
def test_the_still_is_a_film_strip_with_alt_and_constant_text(make):
    data, metadata = make(fake_steps(), fake_decode, alt=PROMPT)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert data["text/plain"] in (TimestepSlider.text, PromptBox.text)
    strip = pixels(base64.b64decode(data["image/png"]))
    assert strip.shape[1] > 4 * 128 and strip.std() > 20
    alt = metadata["image/png"]["alt"]
    assert alt == f"Film strip of {PROMPT}: zₜ and predicted z₀, from t = 999 to clean"


def test_without_a_frame_there_is_no_still():
    data, metadata = PromptBox(FakeModel())._repr_mimebundle_()
    assert "image/png" not in data and metadata == {}


def test_the_prompt_box_passes_its_settings_on_and_shows_the_picture():
    model = FakeModel()
    box = PromptBox(model, num=2)
    assert not model.calls  # without a prompt nothing is drawn
    box.prompt.value, box.guidance.value, box.seed.value, box.num_steps.value = f" {PROMPT} ", 4.5, 7, 3
    box.button.click()
    settings = {"num_steps": 3, "guidance_scale": 4.5, "seeds": [7, 8]}
    assert model.calls == [([PROMPT, PROMPT], settings)]
    assert images_in(box.frames.picture.value)[1][0] == f"predicted z₀ at clean: {PROMPT}"
    torch.testing.assert_close(box.images, fake_decode(list(fake_steps(2))[-1].z))
    assert box.progress.value == box.progress.max == 3
    assert not box.button.disabled and box.progress.layout.visibility == "hidden"


def test_enter_draws_too():
    model = FakeModel()
    box = PromptBox(model)
    box.prompt.value = PROMPT
    box.prompt._handle_custom_msg({"event": "submit"}, [])
    assert len(model.calls) == 1


@pytest.mark.parametrize(
    ("prompt", "words"), [("   ", "The prompt is empty"), ("a zebra", "Unknown words: zebra &lt;of 9&gt;.")]
)
def test_what_the_model_refuses_is_said_in_words(prompt, words):
    box = PromptBox(FakeModel(), PROMPT)
    before = box.frames.picture.value
    box.prompt.value = prompt
    box.button.click()
    assert words in box.message.value
    assert box.frames.picture.value == before  # the last good picture stays
    assert not box.button.disabled
    box.prompt.value = PROMPT
    box.button.click()
    assert box.message.value == ""


def test_a_fault_of_the_program_is_not_hidden_as_the_users():
    class Broken(FakeModel):
        def steps(self, prompts, **settings):
            raise RuntimeError("a fault")

    box = PromptBox(Broken())
    box.prompt.value = PROMPT
    with pytest.raises(RuntimeError, match="a fault"):
        box.draw()
    assert not box.button.disabled


def test_show_puts_native_pixels_and_alt_text_on_the_page():
    image = torch.linspace(-1, 1, 3 * 50 * 70).reshape(1, 3, 50, 70)
    shown = show(image, "a ramp of 'grey' & \"colour\"", scale=3)
    ((alt, picture),) = images_in(shown._repr_html_())
    assert alt == "a ramp of 'grey' & \"colour\""
    np.testing.assert_array_equal(picture, ((image[0] + 1) * 127.5).round().byte().permute(1, 2, 0))
    assert 'width="210"' in shown._repr_html_() and "image-rendering: pixelated" in shown._repr_html_()
    assert repr(shown) == "<1 picture: a ramp of 'grey' & \"colour\">"


def test_show_lays_out_sheets_captions_and_sizes():
    batch = torch.zeros(6, 3, 64, 64)
    ((_, sheet),) = images_in(show(batch, "six", columns=3)._repr_html_())
    assert sheet.shape == (130, 196, 3)
    captioned = show(batch[:2], "two", captions=["<first>", "second"])._repr_html_()
    assert [alt for alt, _ in images_in(captioned)] == ["two: <first>", "two: second"]
    assert "&lt;first&gt;" in captioned
    sizes = show([torch.zeros(3, 32, 32), torch.zeros(3, 8, 8)], "large and small", scale=2)._repr_html_()
    assert sizes.count("width: 64px; max-width") == 2  # seen at one size


def test_a_latent_is_enlarged_in_the_file_where_a_viewer_would_blur_it():
    latent = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)
    ((_, picture),) = images_in(show(latent, "a latent", scale=10)._repr_html_())
    assert picture.shape == (80, 80, 3)
    np.testing.assert_array_equal(picture[::10, ::10], picture[9::10, 9::10])


def test_a_figure_has_alt_text_too():
    figure = Figure(figsize=(3, 2))
    figure.subplots().plot([1, 2])
    markup = show_figure(figure, "a line")._repr_html_()
    assert images_in(markup)[0][1].shape == (400, 600, 3) and 'width="300"' in markup
    assert "pixelated" not in markup  # shrunk like that, strokes of letters would be left out
    with pytest.raises(UserError, match="Alt text"):
        show_figure(figure, "")


def test_even_a_still_of_pure_noise_is_small():
    noise = [Frame(f"t = {t}", {name: torch.randn(1, 3, 64, 64) for name in ("noise", "more")}) for t in range(9)]
    assert len(FrameSlider(noise).still()) < 100_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(1, 4, 8, 8), "latents"), r"\(4, 8, 8\)"),
        ((torch.zeros(0, 3, 8, 8), "none"), "nothing"),
        ((torch.zeros(1, 3, 8, 8), " "), "Alt text"),
        ((torch.zeros(2, 3, 8, 8), "two", None, None, ["one"]), "2 pictures .* 1 captions"),
    ],
)
def test_show_refuses_in_words(arguments, words):
    with pytest.raises(UserError, match=words):
        show(*arguments)


def test_the_curve_is_drawn_at_most_so_often_and_complete_at_the_end():
    curve = LossCurve("loss", every=3600)
    assert "image/png" not in curve._repr_mimebundle_()[0]
    curve(1, {"loss": 2.0, "ignored": 1.0})
    first, first_still = curve.picture.value, curve.still()
    for step in range(2, 50):
        curve(step, {"loss": 2.0 / step})
    assert curve.picture.value == first and curve.still() != first_still  # the file's picture has every step
    curve.redraw()
    ((alt, picture),) = images_in(curve.picture.value)
    assert alt.startswith("Curve of loss from 2 to 0.04") and alt.endswith("in 49 steps")
    assert picture.shape == (320, 640, 3)
    assert "image/png" in curve._repr_mimebundle_()[0]


def test_the_curve_is_eager_when_it_may_be():
    curve = LossCurve("a", "b", log_scale=True, every=0)
    drawings = set()
    for step in range(1, 4):
        curve(step, {"a": 1 / step, "b": step})
        drawings.add(curve.picture.value)
    assert len(drawings) == 3


def test_one_bad_loss_is_a_gap_in_the_curve_and_not_its_end():
    curve = LossCurve("loss", every=3600)
    for step in range(1, 51):
        curve(step, {"loss": {10: float("nan"), 20: float("inf")}.get(step, 1.0)})
    assert np.isfinite(_smooth(curve.values["loss"])).all()
    assert np.isnan(_smooth([1.0, float("nan"), 1.0], share=0.1)).tolist() == [False, True, False]
    assert _smooth([1.0] * 20 + [1e20] + [1.0] * 79)[[0, -1]].tolist() == [1.0, 1.0]  # one that is huge, likewise
    curve.redraw()
    assert "from 1 to 1 in" in curve.still_alt()


def test_a_prompt_box_keeps_what_it_was_given():
    box = PromptBox(SimpleNamespace(to_image=None), guidance_scale=15, num_steps=200, seed=2**40)
    assert (box.guidance.value, box.num_steps.value, box.seed.value) == (15, 200, 2**40)


def test_latent_channels_are_grey_images_around_the_mean():
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 50 + 7
    grey = latent_channels(latents)
    assert grey.shape == (8, 3, 8, 8) and grey.abs().max() <= 1
    torch.testing.assert_close(grey[:, 0], grey[:, 2])
    assert grey.mean().abs() < 0.05
    assert latent_channels(torch.zeros(1, 4, 8, 8).half()).abs().max() == 0  # a flat channel is grey, not NaN


def test_spread_keeps_both_ends():
    assert spread(26, 6) == [0, 5, 10, 15, 20, 25]
    assert spread(3, 6) == [0, 1, 2] and spread(10, 1) == [0]
    assert spread(1000, 7)[0] == 0 and spread(1000, 7)[-1] == 999


def test_no_widget_needs_a_browser_to_follow_another():
    for file in Path(ldm_edu.widgets.__file__).parent.glob("*.py"):
        assert "jslink" not in file.read_text(encoding="utf-8"), file
