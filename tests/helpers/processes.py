"""Trainings in processes of their own, so that they can be killed; imported by these processes, too."""

import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from diffstride.experiments.commands.main import main
from diffstride.experiments.models import TinyCNN
from diffstride.experiments.training import checkpoints

# A server that has imported everything starts a process in a tenth of a second, and without our threads.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["diffstride.experiments.training.fit", "diffstride.experiments.data.augment", "kornia.augmentation"]
)
MOMENTS = ("half written", "before the move", "after the move")


class Dropped(TinyCNN):
    """A network with random numbers of its own."""

    def __init__(self, width: int = 4, num_classes: int = 4, in_channels: int = 1):
        super().__init__(width=width, num_classes=num_classes, in_channels=in_channels, strides=[(2.0, 2.5)])
        self.down = nn.Sequential(nn.Dropout(0.2), self.down)


def fit(arguments, moment=None, saves=1):
    """`diffstride fit`, which kills itself at a moment of the n-th checkpoint that it writes."""
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if moment is not None:
        _kill_at(moment, saves)
    sys.exit(main(["fit", *arguments]))


def start(arguments, moment=None, saves=1):
    process = PROCESSES.Process(target=fit, args=(arguments, moment, saves))
    process.start()
    return process


def warm_up():
    """Have the server import everything."""
    process = PROCESSES.Process(target=int)
    process.start()
    process.join()


def ended(process):
    process.join()
    return process.exitcode


def killed_again_and_again(arguments, folder, kills, seed, seconds):
    """Bring a run to its end through kills at random moments, some of them while a checkpoint is written.

    Returns how many of the kills found the run at work and how many left a checkpoint unfinished.
    """
    draw = random.Random(seed)
    at_work = unfinished = 0
    for kill in range(kills):
        last = folder / "checkpoints" / "last.ckpt"
        if (folder / "result.json").exists():
            break
        more = ["--ckpt_path", "last"] if last.exists() else []
        if kill % 3 == 2:
            process = start([*arguments, *more], draw.choice(MOMENTS), draw.randint(1, 3))
        else:
            process = start([*arguments, *more])
            process.join(draw.uniform(0, 0.6 * seconds))
            process.kill()
        at_work += ended(process) == -signal.SIGKILL
        unfinished += any(folder.glob("checkpoints/*.tmp"))
    more = ["--ckpt_path", "last"] if (folder / "checkpoints" / "last.ckpt").exists() else []
    if not (folder / "result.json").exists():
        assert ended(start([*arguments, *more])) == 0
    return at_work, unfinished


def _kill_at(moment, saves):
    left = saves
    save, replace = torch.save, Path.replace

    def half(content, file):
        save(content, file)
        if counted("half written"):
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def move(path, target):
        before = counted("before the move") and path.suffix == ".tmp"
        if before:
            os.kill(os.getpid(), signal.SIGKILL)
        done = replace(path, target)
        if counted("after the move"):
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    def counted(name):
        nonlocal left
        left -= name == moment
        return name == moment and left == 0

    checkpoints.torch.save = half
    Path.replace = move
