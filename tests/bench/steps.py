"""What the comparisons with PyTorch share: arguments, windows of a text, optimizer steps and their speed."""

import argparse
import json
import random
import time

import torch


def parser(lr):
    """The arguments; `lr` is the default learning rate."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("ids", help="JSON array of the text's token ids")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--threads", type=int, default=2)
    return parser


def begin(arguments):
    """Fixes threads and seeds."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    random.seed(0)


def run(arguments, trained, loss_of, lr_at=None):
    """Trains the parameters `trained` by AdamW with gradients clipped to 1 and prints the speed.

    `loss_of` gives the loss of ids `[batch, length]`, `lr_at` the learning rate of a step where it is not constant.
    """
    optimizer = torch.optim.AdamW(trained, lr=arguments.lr, weight_decay=0.0)
    with open(arguments.ids) as file:
        ids = torch.tensor(json.load(file))
    times = []
    for step in range(arguments.steps):
        start = time.perf_counter()
        starts = [random.randrange(len(ids) - arguments.length) for _ in range(arguments.batch)]
        inputs = torch.stack([ids[at : at + arguments.length] for at in starts])
        loss = loss_of(inputs)
        if lr_at:
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        times.append(time.perf_counter() - start)
        print(f"step {step + 1} loss {loss.item():.4f} {inputs.numel() / times[-1]:.1f} tok/s", flush=True)
    counted = times[2:]
    tokens = arguments.batch * arguments.length
    print(f"{tokens * len(counted) / sum(counted):.1f} tok/s over {len(counted)} steps")
