"""τθ learns and matters, the objective is the paper's, and a picture hangs on its seed alone."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from ldm_edu.conditioning import TextConditioner
from ldm_edu.conditioning.text import UnknownWords
from ldm_edu.pipeline import LatentDiffusion
from ldm_edu.runtime import PictureNoise, UserError, noise
from ldm_edu.training.diffusion import DiffusionObjective
from ldm_edu.unet import UNet

PROMPTS = ["a red star", "a blue circle", "a red circle above a blue star", ""]


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return tiny.latent_diffusion()


def test_every_weight_of_the_conditioner_learns():
    model = tiny.latent_diffusion()
    model.unet = UNet(tiny.UNET)  # as training begins: with zeros that let no gradient through at first
    objective = DiffusionObjective(model, condition_dropout=0.1)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    tokens, z0 = model.conditioner.tokenize(PROMPTS), torch.randn(4, 2, 4, 4)
    for step in range(4):
        optimizer.zero_grad()
        loss, _ = objective((z0, tokens), torch.Generator().manual_seed(step))
        loss.backward()
        optimizer.step()
        learning = [n for n, p in model.conditioner.named_parameters() if p.grad is not None and p.grad.any()]
        assert step or not learning
    # A bias of the keys shifts all logits of a softmax alike: it has no effect, and no gradient but rounding.
    names = {n for n, _ in model.conditioner.named_parameters() if not n.endswith("key.bias")}
    assert len(names) > 20 and names <= set(learning), names - set(learning)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_objective_is_equation_3(prediction: str):
    model = tiny.latent_diffusion(prediction=prediction)
    z0, tokens = torch.randn(4, 2, 4, 4), model.conditioner.tokenize(PROMPTS)
    asked, captions = [], []

    def unet(z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        asked.append((z, t, context))
        return torch.full_like(z, 0.5)

    def loss_of(dropout: float, seed: int) -> Tensor:
        objective = DiffusionObjective(model, dropout)
        objective._modules["unet"] = unet  # in place of the network
        loss, readings = objective((z0, tokens), torch.Generator().manual_seed(seed))
        captions.append(asked[-1][2])
        return loss

    loss = loss_of(0.0, 1)
    z, t, context = asked[0]
    level = model.schedule.alphas_cumprod[t].float().view(-1, 1, 1, 1)
    epsilon = (z - level.sqrt() * z0) / (1 - level).sqrt()
    assert epsilon.mean().abs() < 0.4 and 0.7 < epsilon.std() < 1.3 and t.unique().numel() > 1
    target = {"eps": epsilon, "x0": z0, "v": level.sqrt() * epsilon - (1 - level).sqrt() * z0}[prediction]
    torch.testing.assert_close(loss, (target - 0.5).square().mean(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(context, model.context(PROMPTS))
    assert loss_of(0.0, 1) == loss and torch.equal(asked[1][0], z)
    loss_of(0.0, 2)
    assert not torch.equal(asked[2][0], z)
    # Condition dropout: the empty caption in place of all of them, or of some.
    loss_of(1.0, 1), [loss_of(0.5, seed) for seed in range(20)]
    empty = model.context([""])
    torch.testing.assert_close(captions[3], empty.expand(4, -1, -1))
    shares = [(c - empty).flatten(1).abs().amax(1) < 1e-6 for c in captions[4:]]
    assert 0.3 < torch.stack(shares)[:, :3].float().mean() < 0.7  # the fourth prompt is empty anyway


def test_another_caption_is_another_picture(model: LatentDiffusion):
    arguments = dict(num_steps=4, guidance_scale=2.0)
    one, again, other = (model.sample(p, **arguments) for p in ("a red star", "a red star", "a blue circle"))
    assert torch.equal(one, again) and (one - other).abs().mean() > 1e-3
    assert (one - model.sample("a red star", seeds=1, **arguments)).abs().mean() > 1e-2


def test_unknown_words_are_named_with_the_vocabulary(model: LatentDiffusion):
    with pytest.raises(UnknownWords, match="'green', 'dog'.*a, above, blue, circle, red, star") as error:
        model.steps("a green dog above a green star")
    assert "'above'" not in str(error.value) and "[PAD]" not in str(error.value)
    with_commas = TextConditioner.from_words([",", "star", "red"], length=8, channels=16, layers=1, heads=2)
    with pytest.raises(UnknownWords, match="never saw 'blue', '!' .*It knows these words: red, star[.]$"):
        with_commas.tokenize(["red star, blue star!"])
    assert torch.equal(model.conditioner.tokenize(["A RED star"]), model.conditioner.tokenize(["a red star"]))


def test_a_prompt_that_is_too_long_is_named(model: LatentDiffusion):
    fits = "a red star above a red star above"
    assert model.conditioner.tokenize([fits]).shape == (1, 8)
    with pytest.raises(UserError, match="9 tokens.*reads 8.*above a'"):
        model.steps(fits + " a")


def test_the_empty_caption_is_padding_alone(model: LatentDiffusion):
    tokens = model.conditioner.tokenize(["", "a red star"])
    assert tokens[0].unique().tolist() == [model.conditioner.tokenizer.token_to_id("[PAD]")]
    assert model.context(["", "a red star"]).shape == (2, 8, 16)


def test_a_pretrained_encoder_is_frozen_and_its_absence_worded(tmp_path: Path):
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "star": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(tmp_path / "clip")
    config = CLIPTextConfig(
        vocab_size=3, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, eos_token_id=1,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(tmp_path / "clip")
    encoder = TextConditioner.from_pretrained(tmp_path / "clip", length=8)
    assert encoder.frozen and not any(p.requires_grad for p in encoder.parameters()) and encoder.channels == 16
    assert encoder(encoder.tokenize(["star star", ""])).shape == (2, 8, 16)
    with pytest.raises(UserError, match="nowhere"):
        TextConditioner.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match="GPT2Model"):
        TextConditioner.from_pretrained(tmp_path / "clip", encoder="GPT2Model")


def test_a_pretrained_bert_comes_back_from_its_configuration(tmp_path: Path):
    own = TextConditioner.from_words(["a", "red", "star"], length=8, channels=16, layers=1, heads=2)
    fast = PreTrainedTokenizerFast(tokenizer_object=own.tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(tmp_path / "bert")
    config = BertConfig(
        vocab_size=5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8,
    )  # fmt: skip
    bert = BertModel(config).eval()
    bert.save_pretrained(tmp_path / "bert")
    loaded = TextConditioner.from_pretrained(tmp_path / "bert", encoder="BertModel", length=8)
    again = TextConditioner.from_config(json.loads(json.dumps(loaded.config())))
    again.load_state_dict(loaded.state_dict())
    tokens = own.tokenize(["a red star"])
    assert torch.equal(loaded.tokenize("a red star"), tokens) and torch.equal(again.tokenize("a red star"), tokens)
    wanted = bert(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(loaded(tokens), wanted)
    torch.testing.assert_close(again(tokens), wanted)


# a picture hangs on its seed alone


def test_noise_does_not_depend_on_the_batch():
    shape = (2, 4, 4)
    together = noise(shape, [5, 6, 7])
    assert together.shape == (3, *shape) and torch.equal(together[1], noise(shape, [6])[0])
    assert torch.equal(together.flip(0), noise(shape, [7, 6, 5]))
    assert not torch.equal(together[0], together[1])
    one, several = PictureNoise([6]), PictureNoise([5, 6])
    draws = [(one(shape)[0], several(shape)[1]) for _ in range(3)]  # each goes on where it stopped
    assert all(torch.equal(a, b) for a, b in draws) and not torch.equal(draws[0][0], draws[1][0])


@pytest.mark.parametrize("sampler, eta", [
    ("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0), ("plms", 0.0), ("dpm-solver", 0.0),
])  # fmt: skip
def test_a_picture_is_the_same_at_any_batch_size(model: LatentDiffusion, sampler: str, eta: float):
    arguments = dict(num_steps=5, sampler=sampler, eta=eta, precision="float32")
    together = model.sample(PROMPTS, seeds=3, **arguments)
    assert together.shape == (4, 3, 16, 16) and -1 <= together.min() and together.max() <= 1
    for i, prompt in enumerate(PROMPTS):
        alone = model.sample(prompt, seeds=[3 + i], **arguments)
        torch.testing.assert_close(alone[0], together[i], atol=1e-4, rtol=0)


def test_the_steps_of_a_model(model: LatentDiffusion):
    steps = list(model.steps(PROMPTS[:2], num_steps=4, seeds=[8, 9]))
    assert [s.t for s in steps] == [999, 749, 499, 249, -1]
    assert torch.equal(steps[0].z, noise((2, 4, 4), [8, 9])) and torch.equal(steps[-1].z, steps[-1].z0)
    assert torch.equal(model.to_image(steps[-1].z), model.sample(PROMPTS[:2], num_steps=4, seeds=[8, 9]))
    assert not any(s.z.requires_grad for s in steps) and torch.is_grad_enabled()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(model.to_latent(images), model.first_stage.encode(images) * 0.7)
    restored = model.first_stage.decode(model.first_stage.encode(images)).clamp(-1, 1)
    torch.testing.assert_close(model.to_image(model.to_latent(images)), restored, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(num_steps=0), "between 1 and 1000; it is 0"), (dict(num_steps=-3), "-3"), (dict(num_steps=1001), "1001"),
        (dict(guidance_scale=float("nan")), "nan"), (dict(guidance_scale=-1), "-1"),
        (dict(guidance_scale=float("inf")), "inf"), (dict(eta=1.5), "1.5"), (dict(eta=float("nan")), "nan"),
        (dict(sampler="euler"), "'euler'.*ddim, ddpm, plms, dpm-solver"),
        (dict(sampler="plms", eta=0.5), "eta belongs to ddim.*plms.*0.5"), (dict(seeds=[1, 2]), "1 prompts, 2 seeds"),
        (dict(seeds=[]), "0 seeds"), (dict(prompts=[]), "0 prompts"), (dict(precision="fp8"), "'fp8'"),
        (dict(seeds=None), r"Seeds are integers .*\[None\]"), (dict(seeds=torch.Generator()), "Seeds are integers"),
        (dict(seeds=1.5), r"Seeds are integers .*\[1.5\]"), (dict(num_steps="25"), "1000; it is '25'"),
        (dict(guidance_scale=None), "it is None"), (dict(guidance_scale="3"), "it is '3'"),
        (dict(eta=None), "it is None"), (dict(num_steps=None), "1000; it is None"),
        (dict(prompts=None), "A caption is a text, not None"),
        (dict(prompts=7), "A caption is a text, not 7"), (dict(prompts=["a red star", None], seeds=0), "not None"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named_before_anything_runs(model: LatentDiffusion, arguments: dict, words: str):
    with pytest.raises(UserError, match=words):
        model.steps(**{"prompts": "a red star"} | arguments)


@pytest.mark.parametrize("arguments", [dict(prediction="score"), dict(latent_scale=0.0), dict(latent_scale=math.nan)])
def test_a_model_of_wrong_parts_is_refused(model: LatentDiffusion, arguments: dict):
    with pytest.raises(UserError, match=str(*arguments.values())):
        LatentDiffusion(model.first_stage, model.unet, model.conditioner, model.schedule, **arguments)


def test_a_model_on_ones_own_first_stage_is_saved_with_it(tmp_path: Path):
    """Left out, as for a committed one, it could not be found again."""
    model = tiny.latent_diffusion()
    model.save(tmp_path / "mine", "# mine", embed_first_stage=False)
    again = LatentDiffusion.load(tmp_path / "mine")
    stages = (each.first_stage.state_dict() for each in (model, again))
    for (name, mine), theirs in zip(next(stages).items(), next(stages).values(), strict=True):
        torch.testing.assert_close(mine.half(), theirs.half(), msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_another_precision(dtype: torch.dtype):
    expected = tiny.latent_diffusion().sample("a red star", num_steps=3, precision="float32")
    model = tiny.latent_diffusion().to(dtype)
    picture = model.sample("a red star", num_steps=3, precision="float32")
    assert picture.dtype == torch.float32 and (picture - expected).abs().mean() < 0.05
    assert model.to_latent(picture).isfinite().all()


def test_seeds_of_numpy_and_a_single_prompt(model: LatentDiffusion):
    settings = dict(num_steps=2, precision="float32")
    expected = model.sample(["a red star"] * 2, seeds=[3, 4], **settings)
    for seeds in (np.int64(3), np.array([3, 4]), torch.tensor([3, 4])):
        assert torch.equal(model.sample(["a red star"] * 2, seeds=seeds, **settings), expected)
    assert torch.equal(model.context("a red star"), model.context(["a red star"]))


def test_a_model_made_without_autograd_draws_the_same():
    with torch.inference_mode():
        images = tiny.latent_diffusion().sample(PROMPTS[:2], num_steps=2)
    torch.testing.assert_close(images, tiny.latent_diffusion().sample(PROMPTS[:2], num_steps=2))


@pytest.mark.parametrize("shape", [(2, 16, 16), (1, 3, 16, 16), (64, 2)])
def test_latents_of_another_shape_are_refused(model: LatentDiffusion, shape: tuple[int, ...]):
    with pytest.raises(UserError, match=r"Latents are \(B, 2, h, w\); these are " + re.escape(str(shape))):
        model.to_image(torch.zeros(shape))


def test_half_a_model_encodes_and_decodes():
    model, images = tiny.latent_diffusion().bfloat16(), torch.rand(2, 3, 16, 16) * 2 - 1
    stage = model.first_stage
    assert stage.decode(stage.encode(images.bfloat16())).dtype == torch.bfloat16
    latents = model.to_latent(images)
    assert latents.dtype == model.unet.conv_in.weight.dtype and model.to_image(latents).dtype == torch.float32


def test_a_model_with_a_compiled_unet_is_saved_like_any_other(tmp_path: Path):
    model = tiny.latent_diffusion()
    expected = model.sample(PROMPTS[:2], num_steps=2)
    model.unet = torch.compile(model.unet, backend="eager")
    model.save(tmp_path / "model", "a card")
    back = LatentDiffusion.load(tmp_path / "model").sample(PROMPTS[:2], num_steps=2)
    assert (back - expected).abs().mean() < 0.01  # fp16 on disk
