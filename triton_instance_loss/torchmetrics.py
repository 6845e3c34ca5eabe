"""Instance metrics over batches and processes, for torchmetrics and Lightning: `InstanceMetric`."""

import zlib
from typing import Any

import torch
from torch import Tensor

from . import checks
from .matching import rules
from .metrics import InstanceMetrics, Totals, instance_metrics, metrics_of_totals

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError(
        "triton_instance_loss.torchmetrics needs torchmetrics: `pip install 'triton_instance_loss[torchmetrics]'`."
    ) from error


class InstanceMetric(Metric):  # type: ignore[misc,unused-ignore]
    """The fields of `instance_metrics`, of all samples that `update` was given since the last `reset`.

    With `average="instances"` instances of all samples count together, as if they were of one: f1, for example, is that
    of the summed counts, and an image with many instances weighs more. With `average="samples"` each field is the mean
    over samples; so counts are those of a sample on average, and a share of nothing counts as 1.

    Args:
        average: "instances" or "samples".
        **options: keyword options of `instance_metrics`, same names, checks and defaults.

    Returns:
        `compute` and `forward` give a dict, name of the field -> float64 tensor: 0-d, or (classes,) if `object_chn` is
        a sequence, (strata,) with `sizes`, or (classes, strata). `update` takes what `instance_metrics` takes:
        outputs, labels, cc_label_batch, and as keywords cc_output_batch and ignore_mask.

    Raises:
        ImportError: torchmetrics is not installed.
        TypeError: An option is unknown or has the wrong type.
        ValueError: An option is not allowed.

    Note:
        States are sums, so that batches may have any size, and processes are joined by adding. A sample with NaN or
        infinity in its outputs makes all fields NaN. `update` does not wait for the device on CUDA. Before any sample
        "instances" has what two empty volumes have, and "samples" NaN. float64 needs a device that has it.

    Example:
        >>> import torch
        >>> metric = InstanceMetric(activation="none", spatial_dims=2)
        >>> labels, outputs = torch.zeros(2, 1, 1, 4, 8)
        >>> labels[..., :2, :2], labels[..., 3, 6:], outputs[..., :2, 1:3] = 1, 1, 1
        >>> for _ in range(3):
        ...     metric.update(outputs, labels)
        >>> found = metric.compute()
        >>> {name: found[name].item() for name in ("num_labels", "matched", "sensitivity", "precision")}
        {'num_labels': 6.0, 'matched': 3.0, 'sensitivity': 0.5, 'precision': 1.0}
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, *, average: str = "instances", **options: Any) -> None:
        super().__init__()
        checks.choice("average", average, ("instances", "samples"))
        self.average, self.options = average, options
        sizes = options.get("sizes")
        asked = rules(**{name: value for name, value in options.items() if name != "sizes"})
        limits = asked.sizes("sizes", sizes)
        several = not isinstance(asked.options.object_chn, int)
        shape = (len(asked.options.classes),) * several + (len(limits) + 1,) * bool(limits)
        for name in self._sums:
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        # A MetricCollection takes two metrics for one if their states have the same names and, after the first batch,
        # the same values: so with other options there is another name.
        self._samples = f"samples_{zlib.crc32(repr((asked, limits)).encode()):08x}"
        self.add_state(self._samples, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @property
    def _sums(self) -> tuple[str, ...]:
        """The states that are summed: totals over instances, or metrics over samples."""
        fields = Totals._fields if self.average == "instances" else InstanceMetrics._fields
        return tuple(f"sum_{name}" for name in fields)

    def update(
        self,
        outputs: Tensor,
        labels: Tensor,
        cc_label_batch: Tensor | None = None,
        *,
        cc_output_batch: Tensor | None = None,
        ignore_mask: Tensor | None = None,
    ) -> None:
        """Add the samples of a batch."""
        found = instance_metrics(
            outputs, labels, cc_label_batch, cc_output_batch=cc_output_batch, ignore_mask=ignore_mask, **self.options
        )
        found = InstanceMetrics(*(value.double() for value in found))
        values: InstanceMetrics | Totals = found
        if self.average == "instances":
            matched, correct = found.matched, found.num_outputs - found.false
            of_matched = found.segmentation_quality * matched, found.dice * matched
            values = Totals(found.num_outputs, found.num_labels, matched, correct, *of_matched)
        for name, value in zip(self._sums, values, strict=True):
            setattr(self, name, getattr(self, name) + value.sum(dim=0))
        setattr(self, self._samples, getattr(self, self._samples) + len(outputs))

    def compute(self) -> dict[str, Tensor]:
        """The metrics of all samples so far, in all processes."""
        sums = [getattr(self, name) for name in self._sums]
        if self.average == "instances":
            broken = 0.0 * sums[0]  # NaN if any sample was
            found = InstanceMetrics(*(value + broken for value in metrics_of_totals(*sums)))
        else:
            found = InstanceMetrics(*(value / getattr(self, self._samples) for value in sums))
        return found._asdict()
