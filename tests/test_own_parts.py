"""Parts of one's own in a LatentDiffusion: what a denoiser, a conditioner or a first stage is given, and may be."""

import copy
from collections.abc import Callable, Sequence

import pytest
import tiny
import torch
from torch import Tensor, nn

from ldm_edu.autoencoder import AutoencoderConfig, FirstStage
from ldm_edu.conditioning import TextConditioner
from ldm_edu.diffusion import SCHEDULES, Schedule
from ldm_edu.layers import Attention
from ldm_edu.pipeline import LatentDiffusion
from ldm_edu.runtime import UserError
from ldm_edu.training import Settings, fit
from ldm_edu.training.diffusion import DiffusionObjective, DiffusionSettings, train_diffusion
from ldm_edu.unet import SpatialTransformer, UNet
from ldm_edu.unet.fast import Denoiser
from ldm_edu.unet.transformer import TransformerBlock

NAMES = ["", "star", "circle", "ring"]


class Classes(nn.Module):
    """A class to M = 2 vectors. Its tokens are `(B, *shape)`: the class's number, again and again."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(len(NAMES), 32)
        self.seen: list[Tensor] = []

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        numbers = torch.tensor([NAMES.index(caption) for caption in captions])
        return numbers.view(-1, *[1] * len(self.shape)).expand(-1, *self.shape).clone()

    def forward(self, tokens: Tensor) -> Tensor:
        self.seen.append(tokens)
        return self.embedding(tokens.flatten(1)[:, 0] if self.shape else tokens).view(-1, 2, 16)


class Shouting(Classes):
    """Every time another length: as many tokens as letters."""

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        return torch.ones(len(captions), max(map(len, captions)) or 1, dtype=torch.long)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens)[..., :16]


class WithoutEmpty(Classes):
    def tokenize(self, captions: Sequence[str]) -> Tensor:
        if "" in captions:
            raise UserError("There is no empty class.")
        return super().tokenize(captions)


def model_with(**parts: nn.Module) -> LatentDiffusion:
    """The tiny model with other parts."""
    model = tiny.latent_diffusion()
    given = {name: parts.get(name, getattr(model, name)) for name in ("first_stage", "unet", "conditioner")}
    return LatentDiffusion(**given, schedule=Schedule(), latent_size=4).eval()


# conditioners


def after_dropout(*shape: int) -> Tensor:
    """What the conditioner gets of six classes, of which every second one is dropped."""
    model = model_with(conditioner=Classes(*shape))
    tokens = model.conditioner.tokenize(["star", "circle", "ring", "star", "ring", "ring"])
    DiffusionObjective(model, 0.5)((torch.ones(6, 2, 4, 4), tokens), torch.Generator().manual_seed(0))
    (seen,) = model.conditioner.seen
    return seen


@pytest.mark.parametrize("shape", [(), (5,), (6,), (5, 3), (6, 3)])
def test_a_condition_is_dropped_whole_whatever_the_shape_of_its_tokens(shape: tuple[int, ...]):
    expected, seen = after_dropout(1)[:, 0], after_dropout(*shape)
    assert 0 < (expected == 0).sum() < 6
    assert torch.equal(seen, expected.view(-1, *[1] * len(shape)).expand(-1, *shape))


def test_without_guidance_no_empty_condition_is_asked_for():
    model = model_with(conditioner=WithoutEmpty(1))
    assert model.sample(["star", "ring"], num_steps=1, guidance_scale=1).isfinite().all()
    with pytest.raises(UserError, match="no empty class"):
        model.sample(["star"], num_steps=1)


def test_guidance_needs_contexts_of_one_length():
    model = model_with(conditioner=Shouting(1))
    assert model.sample(["ring"], num_steps=1, guidance_scale=1).isfinite().all()
    with pytest.raises(UserError, match=r"with the condition it is \(1, 4, 16\), without it \(1, 1, 16\)"):
        model.sample(["ring"], num_steps=1)


def test_a_model_without_a_condition_as_the_message_advises():
    model = model_with(conditioner=TextConditioner.from_words([], length=1, channels=16, layers=1, heads=2))
    settings = DiffusionSettings(steps=1, pictures=4, batch_size=2, log_every=1, save_every=1)
    train_diffusion("it", model, settings, torch.zeros(4, 3, 16, 16).__getitem__, [""] * 4, "", None)
    assert model.sample([""] * 2, num_steps=1, guidance_scale=1).isfinite().all()


def test_dropout_of_a_conditioner_ends_with_its_training():
    class Dropping(Classes):
        def forward(self, tokens: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(tokens), 0.5, self.training)

    model = model_with(conditioner=Dropping(1))
    tokens = model.conditioner.tokenize(["star"] * 2)
    fit(DiffusionObjective(model, 0.1), lambda g: (torch.randn(2, 2, 4, 4, generator=g), tokens),
        Settings(steps=1, batch_size=2, log_every=1, save_every=1))  # fmt: skip
    assert torch.equal(model.sample(["star"], num_steps=2), model.sample(["star"], num_steps=2))


# first stages


class Normed(FirstStage):
    """f = 4, with batch norm and dropout."""

    kind = "normed"

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.config = AutoencoderConfig(latent_channels=2, channels=32, channel_multipliers=(1, 1, 1))
        self.down = nn.Sequential(nn.Conv2d(3, 2, 4, 4), nn.BatchNorm2d(2), nn.Dropout(0.5))
        self.up = nn.Sequential(nn.BatchNorm2d(2), nn.ConvTranspose2d(2, 3, 4, 4))

    def encode(self, images: Tensor) -> Tensor:
        return self.down(images)

    def decode(self, latent: Tensor) -> Tensor:
        return self.up(latent)


def test_a_frozen_first_stage_stays_in_evaluation():
    model = model_with(first_stage=Normed().train())
    before = copy.deepcopy(model.first_stage.state_dict())
    for mode in (True, False):
        assert model.train(mode) is model and model.unet.training == model.training == mode
        assert not any(part.training for part in model.first_stage.modules())
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(model.train().to_latent(images)[:1], model.to_latent(images[:1]))
    model.to_image(model.to_latent(images))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.first_stage.state_dict().items())
    assert not any(part.training for part in model_with(first_stage=Normed()).first_stage.modules()), "from the first"


# denoisers


class Pooling(UNet):
    """Reads the mean of the context, too."""

    def forward(self, z: Tensor, t: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(z, t, context) + context.mean((1, 2))[:, None, None, None]


class Plain(nn.Module):
    config = tiny.UNET

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.read = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(16, 2)

    def forward(self, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.enter(z) + self.read(context.mean(1))[:, :, None, None]


class Average(nn.Module):
    """In place of an attention to the context."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return x + self.linear(context).mean(1, keepdim=True)


class Doubled(Attention):
    """The same weights, and the context read twice as loud."""

    def keys_and_values(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.project(2 * context)


class Flat(nn.Module):
    """In place of a whole transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return x + self.linear(context).mean(1)[:, :, None, None]


def with_parts(kind: type[nn.Module], name: str, part: Callable[[], nn.Module]) -> UNet:
    """The tiny UNet with others in the place of its parts of this name."""
    unet = UNet(tiny.UNET)
    for module in list(unet.modules()):
        if isinstance(getattr(module, name, None), kind):
            setattr(module, name, part())
    return tiny.stirred(unet)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny.stirred(Pooling(tiny.UNET)), lambda: tiny.stirred(Plain()),
        lambda: with_parts(Attention, "cross_attention", Average),
        lambda: with_parts(Attention, "cross_attention", lambda: Doubled(16, 2, 16)),
        lambda: with_parts(SpatialTransformer, "transformer", Flat),
    ],
    ids=["a subclass", "any module", "cross-attention", "a subclass of Attention", "transformer"],
)  # fmt: skip
def test_a_denoiser_of_ones_own_gets_the_context(
    make: Callable[[], nn.Module], compiled: bool, monkeypatch: pytest.MonkeyPatch
):
    """As in training; and it draws and encodes like any other."""
    monkeypatch.setattr("ldm_edu.unet.fast.compiled", lambda network: network)
    model = model_with(unet=make())
    z, t, context = torch.randn(2, 2, 4, 4), torch.tensor([3, 500]), model.context(["a red star", "a blue circle"])
    with torch.no_grad():
        torch.testing.assert_close(Denoiser(model.unet, compiled)(z, t, context), model.unet(z, t, context))
    one, other = (model.sample(prompt, num_steps=2, compiled=compiled) for prompt in ("a red star", "a blue circle"))
    assert not torch.equal(one, other) and model.to_latent(one).shape == (1, 2, 4, 4)
    tokens = model.conditioner.tokenize(["a red star", "a blue circle"])
    assert DiffusionObjective(model, 0.1)((z, tokens), torch.Generator())[0].isfinite()


def test_our_own_unet_still_keeps_keys_and_values(monkeypatch: pytest.MonkeyPatch):
    unet, given = tiny.latent_diffusion().unet, []
    blocks = [block for block in unet.modules() if isinstance(block, TransformerBlock)]
    for network in (unet, torch.compile(unet, backend="eager")):
        handle = blocks[0].register_forward_pre_hook(lambda block, inputs: given.append(type(inputs[1])))
        Denoiser(network)(torch.zeros(1, 2, 4, 4), torch.tensor([3]), torch.zeros(1, 8, 16))
        handle.remove()
    assert given == [dict, dict]


# saving


@pytest.mark.parametrize(
    "change, words",
    [
        ({"conditioner": Classes(1)}, "conditioner Classes"), ({"unet": Pooling(tiny.UNET)}, "Pooling"),
        ({"schedule": "mine"}, "the schedule 'mine'"), ({"schedule": "linear"}, "the schedule 'linear'"),
    ],
)  # fmt: skip
def test_what_cannot_be_saved_is_kept_otherwise(change: dict, words: str, monkeypatch: pytest.MonkeyPatch):
    model = tiny.latent_diffusion()
    if kind := change.get("schedule"):  # registered, also under a name that is taken
        monkeypatch.setitem(SCHEDULES, kind, lambda T, start, end: torch.linspace(start, end, T, dtype=torch.float64))
        change = {"schedule": Schedule(kind, start=0.001, end=0.02)}
    for name, part in change.items():
        setattr(model, name, part)
    with pytest.raises(UserError, match=f"{words}.*save_model.*latent_scale, latent_size, prediction and schedule"):
        model.description()
