"""The frozen vision model that stage 1 draws latents to, on a tiny ViT of timm's."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config
from tiny_experiment import equal, metrics, training, weights
from torchvision.transforms import functional as TF

from modeling.layers import to_pil
from modeling.vision_teacher import VisionConfig, VisionTeacher, spread_tokens
from training import checkpoint as ckpt
from training.loading import load_tokenizer

MODEL = "test_vit"  # patches of 16 px, width 64


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vision") / "vit.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model(MODEL).state_dict(), path)
    return path


def test_its_features_are_timms_on_images_prepared_by_timm(weights_file):
    teacher = VisionTeacher(VisionConfig(MODEL, str(weights_file)), grid=4)
    net = timm.create_model(MODEL, dynamic_img_size=True).eval()
    net.load_state_dict(load_file(weights_file))
    image = torch.rand(3, 64, 64)
    config = resolve_model_data_config(net)
    prepare = create_transform(**config | {"input_size": (3, 64, 64), "crop_pct": 1.0})
    pil = to_pil(image)
    with torch.no_grad():
        expected = net.forward_features(prepare(pil)[None])[:, net.num_prefix_tokens :]
    features = teacher(TF.to_tensor(pil)[None])
    assert features.shape == (1, 16, teacher.width)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", [MODEL, "no_such_vit"])
def test_what_is_no_such_model_or_file_is_named(model, tmp_path):
    with pytest.raises(ValueError, match=f"vision.model={model}.*absent"):
        VisionTeacher(VisionConfig(model, str(tmp_path / "absent.safetensors")), grid=2)


def test_tokens_are_repeated_in_order():
    tokens = torch.arange(3.0).view(1, 3, 1)
    assert spread_tokens(tokens, 7).flatten().tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_a_run_learns_to_say_the_models_features_and_its_tokenizer_loads(
    chain, tmp_path, weights_file
):
    options = ["losses.vision_weight=1", f"vision.model={MODEL}", f"vision.weights={weights_file}"]
    options += training(max_steps=30, log_every_steps=1)
    options += ["optimizer.learning_rate=3e-3"]
    run = chain.run_in(tmp_path, "tokenizer", *options)
    values = [line["vision"] for line in metrics(run)]
    assert values[-1] < values[0] - 0.2
    tokenizer = load_tokenizer(run)
    assert equal(tokenizer.state_dict(), weights(run, ckpt.EMA_FILE))
    assert tokenizer.encode(torch.rand(1, 3, 32, 32)).mean.shape == (1, 16, 4)
