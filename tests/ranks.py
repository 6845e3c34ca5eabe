"""Work done by several processes that gloo joins, as torchrun starts them, and the training steps they do.

No test framework is imported here: each process imports this file, and it has to be quick.
"""

import contextlib
import datetime
import os
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training import patches, tiny_network

from triton_instance_loss import InstanceLoss, WeightedSum

RANKS = 2


def run_ranks(work, folder, *arguments, seconds=120):
    """What work(rank, *arguments) returned in each process; whoever takes longer than `seconds` is ended."""
    context = torch.multiprocessing.spawn(_rank, (work, str(folder), arguments), nprocs=RANKS, join=False)
    deadline = time.monotonic() + seconds
    while not context.join(timeout=max(0.0, deadline - time.monotonic())):
        if time.monotonic() >= deadline:
            for process in context.processes:
                process.kill()
                process.join()
            raise TimeoutError(f"{work.__name__} did not end within {seconds} s")
    return [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(RANKS)]


def _rank(rank, work, folder, arguments):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/joined",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        torch.save(work(rank, *arguments), os.path.join(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


def joint_batch(device):
    """Four float64 patches whose numbers of lesions and of outputs differ."""
    images, labels = (volume.double().to(device) for volume in patches(4, (12, 12, 12)))
    labels[0] = labels[0] * (torch.arange(12, device=device) < 6)
    return images, labels


def network_and_loss(device, **options):
    """The same on every rank; all terms count."""
    network = tiny_network().double().to(device)
    loss = WeightedSum(InstanceLoss(rate_instead_number=True, **options), proximity=0.1)
    return network, loss


def gradients(network):
    """The gradient of every parameter, whole, on the CPU."""
    grads = [parameter.grad for parameter in network.parameters()]
    return [(grad.full_tensor() if hasattr(grad, "full_tensor") else grad).cpu() for grad in grads]


def share(rank, *volumes):
    """The samples of a batch that belong to `rank`."""
    return [volume.chunk(RANKS)[rank] for volume in volumes]


def one_step(network, loss, images, labels):
    """The gradient of a batch in one go."""
    loss(network(images), labels).backward()


def two_steps(network, loss, images, labels):
    """The same from two halves of the batch, of which only the second makes DDP exchange gradients."""
    (first, last), (first_labels, last_labels) = (volume.chunk(2) for volume in (images, labels))
    with getattr(network, "no_sync", contextlib.nullcontext)():
        (loss(network(first), first_labels) / 2).backward()
    (loss(network(last), last_labels) / 2).backward()


def sharded(network):
    """FSDP2: the parameters of `network` shared out over the ranks."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in network:
        fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh)
    whole = [parameter for parameter in network.parameters() if parameter.to_local().shape == parameter.shape]
    assert len(whole) < len(list(network.parameters())), "nothing is shared out"
    return network


DATA = {"instance_wise_reduce": "data"}
GLOBAL = {"process_group": "world"}
WRAPPERS = {"ddp": torch.nn.parallel.DistributedDataParallel, "fsdp": sharded}
STEPS = {"one step": one_step, "two steps": two_steps}
# What wraps the network, how the batch is gone through, and options of the loss.
RUNS = [(wrapper, steps, DATA) for wrapper in WRAPPERS for steps in STEPS] + [("ddp", "one step", GLOBAL)]
RUNS += [("ddp", "one step", {})]


def gradients_of_runs(rank, device):
    """The gradients of each of RUNS that this device can do, each rank on its half of the joint batch."""
    results = []
    for wrapper, steps, options in RUNS:
        if wrapper == "fsdp" and device != "cpu":
            results.append(None)
            continue
        network, loss = network_and_loss(device, **options)
        network = WRAPPERS[wrapper](network)
        STEPS[steps](network, loss, *share(rank, *joint_batch(device)))
        results.append(gradients(network))
    return results


# What rank 1 lacks: labels, outputs.
EMPTY = {"labels": (True, False), "outputs": (False, True), "both": (True, True)}


def sum_of_terms(outputs, labels):
    """What is trained on without `WeightedSum`."""
    return sum(InstanceLoss()(outputs, labels))


def losses_for_empty_patches():
    """Losses that lean on fewer and fewer terms, down to none at all."""
    loss = InstanceLoss(rate_instead_number=True)
    published = InstanceLoss(rate_instead_number=True, gradients="reference")
    return {
        "all terms": WeightedSum(loss, proximity=0.1),
        "terms of instances": WeightedSum(loss, pixel=0),
        "published gradients": WeightedSum(published, pixel=0),
        "no term": WeightedSum(loss, **dict.fromkeys(loss.terms._fields, 0)),
        "plain sum": sum_of_terms,
    }


def steps_with_an_empty_rank(rank, device):
    """A step of DDP for each loss and each thing that rank 1 may lack; what its losses were, and where it all ended.

    DDP waits for the gradient of every parameter: a loss without a graph would leave rank 0 waiting.
    """
    network = torch.nn.parallel.DistributedDataParallel(tiny_network().to(device))
    optimiser = torch.optim.SGD(network.parameters(), lr=1e-3)
    images, truth = share(rank, *(volume.to(device) for volume in patches(2, (12, 12, 12))))
    seen = {}
    for name, loss in losses_for_empty_patches().items():
        for lacking, (no_labels, no_outputs) in EMPTY.items():
            outputs, labels = network(images), truth
            if rank == 1:
                outputs = outputs - 20 if no_outputs else outputs + 20
                labels = 0 * labels if no_labels else labels
            value = loss(outputs, labels)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            finite = all(bool(grad.isfinite().all()) for grad in gradients(network))
            seen[name, lacking] = value.item(), value.requires_grad, finite
    return seen, [parameter.detach().cpu() for parameter in network.parameters()]


# By how much logits are lowered: lesions are found, or the network is sure that there is nothing.
SHIFTS = (0.0, 5.0, 10.0)


def gradients_beside_an_empty_rank(rank, device):
    """For each kind of gradients and each of SHIFTS the gradients of this rank alone, and those that DDP makes.

    The patches of rank 1 have no lesion.
    """
    images, labels = patches(4, (12, 12, 12))
    if rank == 1:
        images, labels = images - labels, 0 * labels
    results = {}
    for kind in ("surrogate", "log"):
        loss = WeightedSum(InstanceLoss(rate_instead_number=True, gradients=kind))
        for shift in SHIFTS:
            network = torch.nn.parallel.DistributedDataParallel(tiny_network().to(device))
            found = []
            for together in (False, True):
                network.zero_grad()
                with contextlib.nullcontext() if together else network.no_sync():
                    loss(network(images.to(device)) - shift, labels.to(device)).backward()
                found.append(gradients(network))
            results[kind, shift] = found
    return results


def metrics_of_halves(rank, average):
    """The metrics of all ranks, where rank 0 has three samples in two batches and rank 1 one."""
    from triton_instance_loss.torchmetrics import InstanceMetric

    metric = InstanceMetric(average=average, sizes=(20,))
    images, labels = joint_batch("cpu")
    for samples in ((slice(0, 1), slice(1, 3)), (slice(3, 4),))[rank]:
        metric.update(images[samples], labels[samples])
    return metric.compute()


def run_recipe(rank, block):
    """Run a block of docs/recipes.md; the gradients of its network, and how many voxels its labels have."""
    variables = {"__name__": "__main__"}
    exec(block, variables)
    return gradients(variables["network"]), variables["labels"].sum().item()
