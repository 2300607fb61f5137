"""Learn strides on waveforms and read them in Hz. Needs torch alone; takes seconds on a CPU.

Sounds are tones of 200 or 500 Hz with a louder hiss above 1 kHz, sampled at 4 kHz. The cost of strides makes the first
stride grow until its window ends just above the tones: at the edge, `1/(2 S d)`, plus the ramp of 62 Hz.
"""

import torch
from torch import nn

import diffstride as ds

RATE, SAMPLES = 4000, 1000


def make_batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sounds `[size, 1, SAMPLES]` and their labels, 0 for 200 Hz and 1 for 500 Hz."""
    labels = torch.randint(2, (size,))
    hertz = torch.tensor([200.0, 500.0])[labels].view(-1, 1, 1)
    tones = torch.sin(2 * torch.pi * (hertz * torch.arange(SAMPLES) / RATE + torch.rand(size, 1, 1)))
    hiss = torch.fft.rfft(torch.randn(size, 1, SAMPLES))
    hiss[..., : SAMPLES // 4] = 0  # nothing below 1 kHz
    return tones + 2 * torch.fft.irfft(hiss, n=SAMPLES), labels


def main(steps: int = 120) -> tuple[float, float]:
    """Train, and return the accuracy and the cut-off frequency of the first stride in Hz."""
    torch.manual_seed(0)
    model = nn.Sequential(
        # On long axes the ramp must be wide: 1/64 of the samples, which is RATE / 64 = 62 Hz.
        ds.DiffStrideConv1d(1, 16, 9, stride=1.5, padding=4, smoothness=SAMPLES / 64),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Conv1d(16, 16, 9, padding=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(16, 2),
    )
    weights, strides = ds.param_groups(model, lr=0.05, stride_lr=0.05)
    optimizer = torch.optim.SGD([weights, strides], momentum=0.9)
    for _ in range(steps):
        sounds, labels = make_batch(32)
        loss = nn.functional.cross_entropy(model(sounds), labels) + 0.5 * ds.stride_cost(model)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(strides["params"], 1.0)
        optimizer.step()
        ds.clamp_strides_(model)

    model.eval()
    sounds, labels = make_batch(256)
    accuracy = (model(sounds).argmax(1) == labels).float().mean().item()
    ((cutoff,),) = ds.cutoff_frequencies(model, 1 / RATE).values()  # the axis is sampled every 1 / RATE seconds
    print(f"accuracy {accuracy:.3f}, stride {ds.strides(model)}, which keeps frequencies up to {cutoff:.0f} Hz")
    return accuracy, cutoff


if __name__ == "__main__":
    main()
