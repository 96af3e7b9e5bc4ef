"""ham.py by several processes, on CPUs or GPUs: the figures of one, up to the order of addition.

    torchrun --nproc-per-node=2 -m extras.parallel --dataset cifar100 --tasks 20

Each process passes its share of every batch through the model and gets the features of all others;
from there on all do the same. So the batch size stays that of the whole batch, and what is read, drawn
and decided is as in one process. Process 0 prints and writes; a stopped run goes on by this
command only. For ham.py's own methods.

Whole batches of 32 are too small to be worth splitting for a small ViT on a GPU: there, start several
runs at once instead (extras/run_all.py --jobs). It helps ViT-B/16, and the extraction of features.
"""

import dataclasses
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

import ham
from extras import baselines


def own(n):
    """This process's rows of a batch of n; all of them where there are fewer than processes."""
    rank, count = dist.get_rank(), dist.get_world_size()
    return slice(n * rank // count, n * (rank + 1) // count) if n >= count else slice(n)


class Gathered(torch.autograd.Function):
    """The features of a whole batch of n from those of the own rows. (m, D) -> (n, D)"""

    @staticmethod
    def forward(ctx, features, n):
        ctx.rows, ctx.weight = own(n), 1.0
        if len(features) == n:  # everyone has passed all of them
            ctx.weight = 1 / dist.get_world_size()
            return features.clone()
        batch = features.new_zeros(n, features.shape[1])
        batch[ctx.rows] = features
        return add_up(batch)  # the shares may differ in size: gloo could not gather them

    @staticmethod
    def backward(ctx, gradient):
        return ctx.weight * gradient[ctx.rows], None


def add_up(x):
    """The sum over all processes, in place."""
    with ham.input_error("another process has ended", "the same command goes on"):
        dist.all_reduce(x)
    return x


def split(vit):
    """Let a model pass its own rows only, and give the features of all."""
    sizes = []

    def before(_, inputs):
        sizes.append(len(inputs[0]))
        return inputs[0][own(sizes[-1])]

    vit.register_forward_pre_hook(before)
    vit.register_forward_hook(lambda *x: Gathered.apply(x[-1].float(), sizes.pop()))


def added_up(start):
    """`start` of a method, whose factors and scalars then get the gradients of the whole batch."""

    def started():
        trained = start()
        for x in [*baselines.factors(trained.adapter), trained.alpha, trained.alpha_groups]:
            if x.requires_grad and x.numel():
                x.register_hook(lambda gradient: add_up(gradient.clone()))
        return trained

    return started


def run(config):
    """As ham.run, in every process; those behind process 0 write to a folder that is thrown away."""
    rank = dist.get_rank()
    if rank:
        dist.barrier()  # process 0 downloads what is not there
    vit, method, data, loss = baselines.prepare(config)
    if not rank:
        dist.barrier()
    if loss is not ham.task_loss or isinstance(method, baselines.SAFM):
        raise ham.InputError(f"--method {config.method}: its loss needs the batch in one process")
    split(vit)
    method.start = added_up(method.start)
    with tempfile.TemporaryDirectory() as out:
        if rank:
            folder, _ = ham.open_run(vit, method, data)
            kept = [x for x in folder.iterdir() if x.name in ("state.pt", "results.json")]
            (Path(out) / folder.name).mkdir()
            for file in kept:
                shutil.copy(file, Path(out) / folder.name)
            method.config = dataclasses.replace(method.config, out=out)
        dist.barrier()  # now process 0 may write
        return ham.learn(vit, method, data)


def about(*given, alone=ham.about):
    return alone(*given) | {"processes": dist.get_world_size()}


if __name__ == "__main__":
    if "RANK" not in os.environ:
        sys.exit("torchrun --nproc-per-node=2 -m extras.parallel ...")
    if torch.cuda.is_available():  # from here on "cuda" is a GPU of its own
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()  # gloo for CPUs, nccl for GPUs
    ham.about = about
    with open(os.devnull, "w") as nowhere:
        if dist.get_rank():
            sys.stdout, sys.stderr.isatty = nowhere, lambda: False  # no lines, no bars
        ham.main(None, run, baselines.Config)
    dist.destroy_process_group()
