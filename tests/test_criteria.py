"""Which losses have a fused form, that it equals the loss, the slow way, and registering a form."""

import copy
import functools
import inspect
import re
import warnings

import pytest
import torch
from monai import losses as monai_losses
from monai.losses import DiceCELoss, DiceLoss, FocalLoss, GeneralizedDiceLoss, MaskedDiceLoss, MaskedLoss, TverskyLoss
from torch.nn import functional as F

from triton_instance_loss import InstanceCenterLoss, InstanceLoss, criteria
from triton_instance_loss.criteria import FusedCriterion, Linear, fused_form, register_criterion
from triton_instance_loss.functional import instance_center_loss, instance_proximity_loss, instance_segmentation_loss

FUSED = [
    criteria.DiceLoss(),
    DiceLoss(),
    DiceLoss(jaccard=True),
    DiceLoss(squared_pred=True),
    DiceLoss(squared_pred=True, jaccard=True, smooth_nr=0.1, smooth_dr=0.2),
    DiceLoss(smooth_nr=0, smooth_dr=1e-3, batch=True),
    TverskyLoss(alpha=0.3, beta=0.7),
    torch.nn.MSELoss(),
    torch.nn.MSELoss(reduction="sum"),
    torch.nn.L1Loss(),
    torch.nn.BCELoss(),
]
SLOW = [
    DiceLoss(reduction="sum"),
    DiceLoss(weight=2.0),
    DiceLoss(to_onehot_y=True),
    DiceLoss(include_background=False),
    DiceLoss(soft_label=True),
    # an option of newer MONAI
    *([DiceLoss(ignore_index=2)] if "ignore_index" in inspect.signature(DiceLoss).parameters else []),
    TverskyLoss(soft_label=True),
    torch.nn.BCELoss(weight=torch.ones(1)),
    GeneralizedDiceLoss(),
    torch.nn.HuberLoss(),
    lambda u, w: ((u - w) ** 4).mean(),
]


def name(loss):
    return type(loss).__name__ if isinstance(loss, torch.nn.Module) else "function"


def batch(device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    outputs = 0.05 + 0.9 * torch.rand(2, 1, 4, 5, 3, generator=generator, dtype=torch.float64)
    labels = (torch.rand(2, 1, 4, 5, 3, generator=generator) > 0.8).double()
    return outputs.to(device).requires_grad_(), labels.to(device)


class Unrecognised(torch.nn.Module):
    """A loss of a type that has no fused form."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, u, w):
        return self.loss(u, w)


@pytest.mark.parametrize(("loss", "no_tp"), [(loss, True) for loss in FUSED] + [(FUSED[0], False), (FUSED[-1], False)])
def test_fused_equals_slow(backend, loss, no_tp):
    outputs, labels = batch(backend)
    results = []
    for criterion in (loss, Unrecognised(loss)):
        center = None if isinstance(loss, torch.nn.BCELoss) else criterion
        options = {"activation": "none", "segmentation_threshold": 0.8, "instance_wise_loss_no_tp": no_tp}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*no fused form.*")
            terms = InstanceLoss(None, criterion, center, **options)(outputs, labels)
        results.append((torch.stack(terms), *torch.autograd.grad(sum(terms), outputs)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("labels_are", ["binary", "fractions"])
@pytest.mark.parametrize("loss", [*FUSED, DiceLoss(batch=True), DiceLoss(squared_pred=True, batch=True)], ids=name)
def test_fused_pixel_equals_the_loss(loss, labels_are):
    """From the sums of the one pass, as if it were called on the raw tensors."""
    outputs, labels = batch("cpu", 1)
    if labels_are == "fractions":
        labels = labels + 0.25 * (labels == 0) * (outputs.detach() > 0.5)
    terms = InstanceLoss(loss, activation="none")(outputs, labels)
    expected = loss(outputs, labels)
    torch.testing.assert_close(terms.pixel, expected, rtol=1e-12, atol=0)
    (grad,), (truth,) = (torch.autograd.grad(value, outputs, retain_graph=True) for value in (terms.pixel, expected))
    torch.testing.assert_close(grad, truth, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("loss", [DiceLoss(), torch.nn.MSELoss(), TverskyLoss()], ids=name)
def test_fused_pixel_of_a_softmax_equals_the_loss_on_the_activated_output(backend, loss):
    generator = torch.Generator().manual_seed(2)
    outputs = torch.randn(2, 3, 4, 5, 3, generator=generator, dtype=torch.float64).to(backend).requires_grad_()
    labels = (torch.rand(2, 1, 4, 5, 3, generator=generator) > 0.8).to(backend)
    terms = InstanceLoss(loss, activation="softmax", num_out_chn=3)(outputs, labels)
    soft = outputs.softmax(1)[:, 1:2]
    hard = soft >= 1 / 3
    activated = hard.double() + (soft - soft.detach()) * (hard | labels)  # the background is right
    expected = loss(activated, labels.double())
    torch.testing.assert_close(terms.pixel, expected, rtol=1e-12, atol=0)
    (grad,), (truth,) = (torch.autograd.grad(value, outputs, retain_graph=True) for value in (terms.pixel, expected))
    torch.testing.assert_close(grad, truth, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("loss", SLOW, ids=name)
@pytest.mark.filterwarnings("ignore:single channel prediction")
def test_other_options_go_the_slow_way_with_one_warning(loss):
    assert fused_form(loss) is None
    with pytest.warns(UserWarning, match=r"has no fused form.*register_criterion") as caught:
        family = InstanceLoss(None, loss)
    assert len(caught) == 1
    assert type(loss).__name__ in str(caught[0].message) or "<lambda>" in str(caught[0].message)
    assert caught[0].filename == __file__
    outputs, labels = batch("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "single channel prediction")
        terms = family(4 * outputs - 2, labels)
    assert all(torch.isfinite(value) for value in terms)


class SubclassOfLogits(torch.nn.BCEWithLogitsLoss):
    """As nnU-Net's RobustCrossEntropyLoss is one of CrossEntropyLoss."""


class OfNnunet(torch.nn.Module):
    """As nnU-Net's Dice keeps its activation."""

    def __init__(self, apply_nonlin=None):
        super().__init__()
        self.apply_nonlin = apply_nonlin

    def forward(self, u, w):
        return (u - w).square().mean()


class OfModels(OfNnunet):
    """As segmentation_models_pytorch says that it takes logits."""

    def __init__(self, from_logits=True):
        super().__init__()
        self.from_logits = from_logits


class WithAnActivation(OfNnunet):
    """A loss of somebody's own, with an activation as a part of it."""

    def __init__(self):
        super().__init__()
        self.activate = torch.nn.Sigmoid()


class Holds(torch.nn.Module):
    """Several losses, in a list that is no module list."""

    def __init__(self, *losses):
        super().__init__()
        self.losses = [*losses]

    def forward(self, u, w):
        return sum(loss(u, w) for loss in self.losses)


@functools.wraps(F.cross_entropy)
def wrapped(u, w):
    return F.cross_entropy(u, w)


ACTIVATING = [
    (DiceLoss(sigmoid=True), "DiceLoss(sigmoid=True)"),
    (DiceLoss(softmax=True), "DiceLoss(softmax=True)"),
    (DiceLoss(other_act=torch.tanh), "DiceLoss(other_act=tanh)"),
    (TverskyLoss(sigmoid=True), "TverskyLoss(sigmoid=True)"),
    (GeneralizedDiceLoss(softmax=True), "GeneralizedDiceLoss(softmax=True)"),
    (MaskedDiceLoss(sigmoid=True), "MaskedDiceLoss(sigmoid=True)"),
    (monai_losses.HausdorffDTLoss(sigmoid=True), "HausdorffDTLoss(sigmoid=True)"),
    (monai_losses.DeepSupervisionLoss(DiceLoss(sigmoid=True)), "DiceLoss(sigmoid=True) in DeepSupervisionLoss"),
    (DiceCELoss(), "DiceCELoss"),
    (DiceCELoss(sigmoid=True), "DiceCELoss"),
    (monai_losses.DiceFocalLoss(), "DiceFocalLoss"),
    (monai_losses.GeneralizedDiceFocalLoss(), "GeneralizedDiceFocalLoss"),
    (monai_losses.NACLLoss(classes=2, dim=3), "NACLLoss"),
    (FocalLoss(), "FocalLoss"),
    (FocalLoss(use_softmax=True), "FocalLoss"),
    (torch.nn.BCEWithLogitsLoss(), "BCEWithLogitsLoss"),
    (torch.nn.CrossEntropyLoss(), "CrossEntropyLoss"),
    (torch.nn.MultiLabelSoftMarginLoss(), "MultiLabelSoftMarginLoss"),
    (torch.nn.SoftMarginLoss(), "SoftMarginLoss"),
    (F.binary_cross_entropy_with_logits, "binary_cross_entropy_with_logits"),
    (F.cross_entropy, "cross_entropy"),
    (F.multilabel_soft_margin_loss, "multilabel_soft_margin_loss"),
    (functools.partial(F.cross_entropy, label_smoothing=0.1), "cross_entropy in partial of cross_entropy"),
    (functools.partial(DiceLoss(sigmoid=True)), "DiceLoss(sigmoid=True) in partial of DiceLoss"),
    (SubclassOfLogits(), "SubclassOfLogits"),
    (OfNnunet(torch.sigmoid), "OfNnunet(apply_nonlin=sigmoid)"),
    (OfNnunet(torch.nn.Softmax(1)), "OfNnunet(apply_nonlin=Softmax(dim=1))"),
    (OfModels(), "OfModels(from_logits=True)"),
    (WithAnActivation(), "Sigmoid in WithAnActivation"),
    (MaskedLoss(DiceLoss(sigmoid=True)), "DiceLoss(sigmoid=True) in MaskedLoss"),
    (MaskedLoss(F.cross_entropy), "cross_entropy in MaskedLoss"),
    (Unrecognised(Unrecognised(FocalLoss())), "FocalLoss in Unrecognised"),
    (Holds(DiceLoss(), torch.nn.BCEWithLogitsLoss()), "BCEWithLogitsLoss in Holds"),
    (torch.nn.BCEWithLogitsLoss().forward, "BCEWithLogitsLoss in forward"),
    (wrapped, "cross_entropy"),
]
activating = pytest.mark.parametrize(("loss", "what"), ACTIVATING, ids=[what for _, what in ACTIVATING])


@activating
@pytest.mark.parametrize("family", [InstanceLoss, InstanceCenterLoss])
@pytest.mark.parametrize("name", ["loss_function_instance", "loss_function_center"])
def test_criteria_that_activate_by_themselves_are_refused(loss, what, family, name):
    message = f"{name} must be a loss of volumes that are activated already (0 and 1, or probabilities), but {what}"
    message = re.escape(message) + r" activates them again.*: (leave the activation out|take a loss of probabilities)"
    with pytest.raises(ValueError, match=message):
        family(**{name: loss})
    ours = family()
    with pytest.raises(ValueError, match=message):
        ours.edit_parameters(**{name: loss})
    with pytest.raises(ValueError, match=message):
        setattr(ours, name, loss)
    assert getattr(ours, name) is None


@activating
@pytest.mark.parametrize("function", [instance_segmentation_loss, instance_center_loss, instance_proximity_loss])
def test_functions_refuse_them_too(loss, what, function):
    outputs, labels = batch("cpu")
    with pytest.raises(ValueError, match="criterion must be a loss of volumes that are activated already"):
        function(outputs, labels, criterion=loss)


def test_what_to_do_instead():
    with pytest.raises(ValueError, match=re.escape("leave the activation out: DiceLoss().")):
        InstanceLoss(None, DiceLoss(sigmoid=True))
    with pytest.raises(ValueError, match=re.escape("leave the activation out: OfModels(from_logits=False).")):
        InstanceLoss(None, OfModels())
    with pytest.raises(ValueError, match=re.escape("take a loss of probabilities instead, such as DiceLoss().")):
        InstanceLoss(None, DiceCELoss())


@pytest.mark.parametrize("loss", [loss for loss, _ in ACTIVATING], ids=[what for _, what in ACTIVATING])
def test_the_pixel_criterion_sees_logits_and_may_activate(loss):
    family = InstanceLoss(loss)
    family.loss_function_pixel = loss
    assert family.loss_function_pixel is loss


class Network(torch.nn.Module):
    """Its sigmoid is a layer, and what it makes is no loss."""

    def __init__(self):
        super().__init__()
        self.layer, self.sigmoid = torch.nn.Conv3d(1, 1, 1), torch.nn.Sigmoid()

    def forward(self, volume):
        return self.sigmoid(self.layer(volume))


class Perceptual(torch.nn.Module):
    """A distance of features."""

    def __init__(self):
        super().__init__()
        self.network = Network().double()

    def sigmoid(self, volume):
        """A method of that name is no option."""
        return volume.sigmoid()

    def forward(self, u, w):
        return (self.network(u) - self.network(w)).square().mean()


@pytest.mark.parametrize(
    "loss",
    [
        OfNnunet(),
        OfNnunet(torch.nn.Identity()),
        OfModels(from_logits=False),
        MaskedLoss(DiceLoss()),
        Perceptual(),
        functools.partial(F.binary_cross_entropy, reduction="mean"),
        lambda u, w: F.binary_cross_entropy_with_logits(torch.logit(u, 1e-3), w),  # it knows what it does
    ],
)
@pytest.mark.filterwarnings("ignore:.*no fused form", "ignore:No mask value")
def test_other_criteria_stay_open(loss):
    outputs, labels = batch("cpu")
    center = None if "binary" in repr(loss) else loss
    terms = InstanceLoss(None, loss, center, activation="none", segmentation_threshold=0.8)(outputs, labels)
    assert all(torch.isfinite(value) for value in terms)


def test_a_type_with_a_registered_form_stays_open():
    """Its form is evaluated and the loss not called, so what it does to logits does not matter; in a wrapper too."""
    form = FusedCriterion("absolute_error", Linear(prediction=1), Linear(label=1, constant=1))
    register_criterion(SubclassOfLogits, lambda loss: form)
    try:
        InstanceLoss(None, SubclassOfLogits(), SubclassOfLogits())
        with pytest.warns(UserWarning, match="no fused form"):
            InstanceLoss(None, Unrecognised(SubclassOfLogits()))
        register_criterion(SubclassOfLogits, lambda loss: None)  # with these options there is none
        with pytest.raises(ValueError, match="SubclassOfLogits activates them again"):
            InstanceLoss(None, SubclassOfLogits())
    finally:
        criteria._FORMS.clear()
        criteria._FORMS.update(FORMS)


@pytest.mark.parametrize("name", ["loss_function_pixel", "loss_function_instance", "loss_function_center"])
@pytest.mark.filterwarnings("ignore:.*no fused form")
def test_setting_a_criterion_checks_it(name):
    loss = InstanceLoss(**{name: DiceLoss()})
    message = re.escape(f"{name} must be a callable loss(outputs, labels), or None for Dice, got 'dice'")
    for wrong in (functools.partial(setattr, loss, name), lambda value: loss.edit_parameters(**{name: value})):
        with pytest.raises(TypeError, match=message):
            wrong("dice")
        assert isinstance(getattr(loss, name), DiceLoss)
    for criterion in (torch.nn.MSELoss(), torch.nn.functional.mse_loss, None, DiceLoss()):
        setattr(loss, name, criterion)
        assert getattr(loss, name) is criterion
        assert isinstance(getattr(copy.deepcopy(loss), name), type(criterion))
    with pytest.raises(ValueError, match="loss_function_center must take values of 1"):
        loss.loss_function_center = torch.nn.BCELoss()


def test_setting_a_slow_criterion_warns_at_the_caller():
    loss, huber = InstanceLoss(), torch.nn.HuberLoss()
    with pytest.warns(UserWarning, match="loss_function_instance: HuberLoss") as caught:
        loss.loss_function_instance = huber
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss.loss_function_instance = huber  # the same again
        loss.edit_parameters(max_cc_out=3)
    with pytest.raises(ValueError, match="loss_function_center must be a loss of volumes"):
        loss.edit_parameters(loss_function_instance=None, loss_function_center=FocalLoss())
    assert loss.loss_function_instance is huber


def test_functional_warns_at_the_caller():
    outputs, labels = batch("cpu")
    with pytest.warns(UserWarning, match="criterion: HuberLoss") as caught:
        instance_segmentation_loss(outputs, labels, criterion=torch.nn.HuberLoss())
    assert caught[0].filename == __file__


def test_functional_center_with_a_criterion_without_a_fused_form(backend):
    outputs, labels = batch(backend)
    dice = criteria.DiceLoss()
    options = {"activation": "none", "segmentation_threshold": 0.8}
    results = []
    for criterion in (dice, Unrecognised(dice)):
        value = instance_center_loss(outputs, labels, criterion=criterion, **options)
        results.append((value, *torch.autograd.grad(value, outputs)))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-14)


def test_empty_side_and_zero_smoothing_stay_finite(backend):
    """A formula that divides by sums sees no zeros of unused rows, in value and gradient."""
    outputs, labels = batch(backend)
    terms = InstanceLoss(None, DiceLoss(smooth_nr=0, smooth_dr=0), activation="none")(outputs, labels)
    (grad,) = torch.autograd.grad(terms.instance_label + terms.instance_output + terms.proximity, outputs)
    assert torch.isfinite(grad).all()


class RelativeError(torch.nn.Module):
    """sum |u - w| / (1 + sum w)."""

    def forward(self, u, w):
        return (u - w).abs().sum() / (1 + w.sum())


def test_registering_a_form(backend):
    outputs, labels = batch(backend)
    outputs = 4 * outputs - 2
    with pytest.warns(UserWarning, match="RelativeError"):
        slow = InstanceLoss(None, RelativeError(), RelativeError())(outputs, labels)
    register_criterion(
        RelativeError,
        lambda loss: FusedCriterion("absolute_error", Linear(prediction=1), Linear(label=1, constant=1)),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fused = InstanceLoss(None, RelativeError(), RelativeError())(outputs, labels)
    finally:
        criteria._FORMS.clear()
        criteria._FORMS.update(FORMS)
    torch.testing.assert_close(torch.stack(fused), torch.stack(slow))


FORMS = dict(criteria._FORMS)


def test_subclasses_are_not_taken_for_their_parents():
    class Other(DiceLoss):
        pass

    assert fused_form(Other()) is None


def test_bad_registrations():
    with pytest.raises(ValueError, match=r"quantity must be one of 'mass', .*, got 'entropy'"):
        FusedCriterion("entropy", Linear(label=1))
    with pytest.raises(ValueError, match=r"batch must be one of 'mean', 'sum', got 'max'"):
        FusedCriterion("mass", Linear(label=1), batch="max")
    with pytest.raises(TypeError, match="numerator must be a Linear, got <function"):
        FusedCriterion("mass", lambda sums: sums.label)
    with pytest.raises(TypeError, match="denominator must be a Linear or None, got 2"):
        FusedCriterion("mass", Linear(label=1), 2)
    with pytest.raises(TypeError, match="fuse must be a callable"):
        register_criterion(RelativeError, None)
    with pytest.raises(TypeError, match=r"loss_type must be a class or its 'module.qualified_name', got 3"):
        register_criterion(3, lambda loss: None)
