"""What a run prints: all that its figures depend on, a line per task, the result."""

import functools

import torch

from extras import datasets, provenance

say = functools.partial(print, flush=True)


def start(learner):
    """The block a run begins with. learner: ham.Learner"""
    c, data, w0 = learner.c, learner.data, learner.ham.w0
    mean, std = data.transform["mean"], data.transform["std"]
    hub = "the timm hub" if c.dataset != "demo" else "pre-training on other drawn classes"
    what = "held-out training" if c.validate else "test"
    order, threads = " ".join(map(str, data.order[:6])), torch.get_num_threads()
    say(f"method  {c.method}, seed {c.seed}, {c.device}, {c.precision}, {threads} threads")
    say(f"model   {c.model}, weights from {c.weights or hub}")
    say(f"input   {c.img_size} px, crop {c.crop_pct}, mean {mean}, std {std}")
    say(f"data    {c.dataset}: {len(data.names)} classes in {c.tasks} tasks, order {order} ...")
    say(f"        {sum(learner.train_sizes)} training images, {sum(learner.sizes)} {what} images")
    if split := datasets.split_file(c):
        say(f"        test images listed in {split.name}, sha256 {provenance.sha256(split)}")
    if w0:
        number = f"{learner.trained:,} parameters trained per task"
        say(f"LoRA    rank {c.rank} on {len(w0)} layers ({c.layers}), lr {c.lr:g}, {number}")
    if c.method == "ham":
        say(f"groups  {c.merge}, {c.grouping}, τ {c.tau}, G_max {c.g_max}, ρ {c.rho} of {c.prune}")


def seconds_left(learner):
    """Estimate: a training step takes three forward passes, a test image one."""
    done, passes = len(learner.records), 3 * (learner.c.epochs or 0) + 2
    work = [passes * n + seen for n, seen in zip(learner.train_sizes, learner.seen)]
    oracle = sum(learner.train_sizes) + learner.seen[-1]
    return sum(learner.seconds.values()) * (sum(work[done:]) + oracle) / sum(work[:done])


def task(learner):
    """The line of the last task, with what is left of the run."""
    r, done, c, left = learner.records[-1], len(learner.records), learner.c, seconds_left(learner)
    text = f"task {done:3}/{c.tasks}  accuracy {r['accuracy']:5.1f}  "
    text += f"forgetting {r['forgetting']:4.1f}"
    if c.method == "ham":
        s, j = r["similarities"], r["group"]
        group = f"joins group {j}, s {s[j]:+.3f}" if j < len(s) else f"opens group {j}"
        text += f"  α {r['alpha']:.2f}  {group:23}"
    text += f"  {sum(r['seconds'].values()):6.1f} s"
    say(text + (f", {left / 60:.1f} min left" if done < c.tasks else ""))
    if done == 1 and left > 3600:
        say("        shorter: --images-per-class, --test-images-per-class, --epochs, --img-size")


def end(results, folder):
    """The measures, the speed, where they were written. results: what results.json holds"""
    for key in ("final_accuracy", "average_incremental_accuracy", "forgetting"):
        say(f"{key.replace('_', ' '):30}{results[key]:6.1f} %")
    if results["images_per_second"]["training"]:
        speed = "training {training:.0f}, inference {inference:.0f}"
        say(f"images per second             {speed.format(**results['images_per_second'])}")
    model = " and model.safetensors" * (folder / "model.safetensors").is_file()
    say(f"written: {folder}/results.json{model}\n")
