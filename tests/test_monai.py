"""MONAI around the losses: its trainer with MetaTensor batches and half precision, deep supervision, bundles."""

import json

import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset, MetaTensor
from monai.losses import DeepSupervisionLoss, DiceLoss, TverskyLoss
from monai.transforms import Compose, EnsureTyped, RandFlipd
from training import fell, patches, tiny_network

from triton_instance_loss import InstanceCenterLoss, InstanceLoss, WeightedSum

pytest.importorskip("ignite", reason="MONAI's trainers need pytorch-ignite")

from monai.engines import SupervisedTrainer


class Watched(torch.nn.Module):
    """A loss that notes what goes in and what comes out."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss
        self.calls = []

    def forward(self, outputs, labels):
        value = self.loss(outputs, labels)
        self.calls.append((outputs, labels, value))
        return value


def loader(count=4, shape=(12, 12, 12)):
    """MetaTensor batches of two patches, randomly flipped, in the order of the data."""
    images, labels = patches(count, shape)
    data = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
    keys = ("image", "label")
    flip = RandFlipd(keys, prob=0.5, spatial_axis=0).set_random_state(0)
    return DataLoader(Dataset(data, Compose([EnsureTyped(keys), flip])), batch_size=2)


def train(device, network, loss, epochs=8, **options):
    """Losses of a training with MONAI's trainer."""
    network.to(device)
    trainer = SupervisedTrainer(
        device=device,
        max_epochs=epochs,
        train_data_loader=loader(),
        network=network,
        optimizer=torch.optim.Adam(network.parameters(), lr=0.03),
        loss_function=loss,
        **options,
    )
    trainer.logger.setLevel("ERROR")
    trainer.run()


def gradients_are_there(network):
    return all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in network.parameters())


@pytest.mark.filterwarnings("ignore:.*(GradScaler|CUDA is not available|not supported)")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_supervised_trainer(device, dtype):
    """MetaTensors from the DataLoader reach the loss in the dtype of autocast; a plain 0-d float32 tensor comes back.

    MONAI's `amp` is autocast on CUDA alone, so on the CPU the whole trainer runs inside autocast, which then must not
    keep the weights of the first step.
    """
    loss = Watched(WeightedSum(InstanceLoss(rate_instead_number=True)))
    network = tiny_network()
    amp = {"amp": True, "amp_kwargs": {"dtype": dtype}} if dtype != torch.float32 else {}
    with torch.autocast("cpu", dtype=dtype, enabled=bool(amp) and device.type == "cpu", cache_enabled=False):
        train(device, network, loss, **amp)
    for outputs, labels, value in loss.calls:
        assert type(outputs) is type(labels) is MetaTensor
        assert (outputs.dtype, outputs.device.type) == (dtype, device.type)
        assert type(value) is torch.Tensor
        assert (value.shape, value.dtype) == ((), torch.float32)
    assert all(type(value) is torch.Tensor for value in loss.loss.terms.values())
    assert gradients_are_there(network)
    assert fell([value.item() for *_, value in loss.calls[::2]])


class TwoHeads(torch.nn.Module):
    """A network with an output at full resolution and one at half of it."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = tiny_network(), tiny_network(seed=1)

    def forward(self, image):
        return [self.fine(image), self.coarse(torch.nn.functional.avg_pool3d(image, 2))]


def test_deep_supervision(device):
    loss = Watched(WeightedSum(InstanceLoss(rate_instead_number=True)))
    network = TwoHeads()
    supervised = Watched(DeepSupervisionLoss(loss))
    train(device, network, supervised)
    for number, (outputs, labels, value) in enumerate(supervised.calls):
        (fine, _, fine_value), (coarse, coarse_labels, coarse_value) = loss.calls[2 * number : 2 * number + 2]
        assert [level.shape for level in outputs] == [fine.shape, coarse.shape]
        assert torch.equal(coarse_labels, torch.nn.functional.interpolate(labels, (6, 6, 6), mode="nearest-exact"))
        assert type(value) is torch.Tensor
        torch.testing.assert_close(value, fine_value + coarse_value / 2)
    assert gradients_are_there(network.fine)
    assert gradients_are_there(network.coarse)
    assert fell([value.item() for *_, value in supervised.calls[::2]])


def from_json(config):
    """What a bundle makes of a config, once it was a JSON file."""
    return ConfigParser(json.loads(json.dumps({"loss": config}))).get_parsed_content("loss")


# One other value than the default for every option, as it stands in a JSON file.
OPTIONS = {
    "activation": "softmax",
    "num_out_chn": 3,
    "object_chn": [0, 2],
    "spatial_dims": 2,
    "reduce_segmentation": "sum",
    "instance_wise_reduce": "data",
    "num_iterations": 350,
    "segmentation_threshold": 0.7,
    "max_cc_out": 0,
    "mul_too_many": 7,
    "min_instance_size": 2,
    "centroid_offset": 5,
    "smoother": 1e-5,
    "instance_wise_loss_no_tp": False,
    "rate_instead_number": True,
    "gradients": "reference",
    "to_onehot_y": True,
    "ignore_index": 255,
    "process_group": "world",
    "spacing": [3.0, 0.5],
}


@pytest.mark.parametrize("family", [InstanceLoss, InstanceCenterLoss])
def test_every_argument_has_a_json_form(family):
    name = f"triton_instance_loss.{family.__name__}"
    loss = from_json({"_target_": name, **OPTIONS})
    assert type(loss) is family
    expected = family(**OPTIONS).options
    assert loss.options == expected
    defaults = vars(family().options)
    assert all(value != defaults[option] for option, value in vars(expected).items()), "a default proves nothing"
    nothing = dict.fromkeys(("loss_function_pixel", "loss_function_instance", "loss_function_center", "num_iterations"))
    assert from_json({"_target_": name, **nothing}).options == family().options


def test_nested_losses_and_weights_from_json():
    monai = {"_target_": "DiceLoss", "smooth_nr": 0}
    loss = from_json(
        {
            "_target_": "triton_instance_loss.WeightedSum",
            "loss": {
                "_target_": "triton_instance_loss.InstanceLoss",
                "loss_function_pixel": {"_target_": "monai.losses.TverskyLoss", "sigmoid": True, "alpha": 0.3},
                "loss_function_instance": monai,
                "loss_function_center": "@loss#loss#loss_function_instance",
                "rate_instead_number": True,
            },
            "pixel": 2,
            "proximity": 0.1,
        }
    )
    assert loss.loss.loss_function_instance is loss.loss.loss_function_center
    built = InstanceLoss(
        TverskyLoss(sigmoid=True, alpha=0.3), DiceLoss(smooth_nr=0), DiceLoss(smooth_nr=0), rate_instead_number=True
    )
    expected = WeightedSum(built, pixel=2, proximity=0.1)
    images, labels = patches(2, (9, 8, 7))
    assert loss(images, labels).item() == expected(images, labels).item()
    assert loss.terms == expected.terms
    assert loss.weights == expected.weights
