"""What a plain PyTorch training loop costs, and where its memory goes: nothing here has to do with bilevel problems.

The lines marked with # <- are all that profiling adds. While it runs, `bilevel show run.jsonl` shows how far it is.
"""

import os

import torch
from bilevel_profiling import Recorder  # <-
from sklearn.datasets import load_digits

EPOCHS = 1 if os.environ.get("BILEVEL_EXAMPLE_SMALL") == "1" else 20
torch.manual_seed(0)

digits = load_digits()
images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
dataset = torch.utils.data.TensorDataset(images, labels)
loader = torch.utils.data.DataLoader(dataset, batch_size=256, shuffle=True)
net = torch.nn.Sequential(
    torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10)
)
optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)

with Recorder("run.jsonl", name="digits", append=True) as recorder:  # <-
    for _ in range(EPOCHS):
        for inputs, targets in recorder.watch(loader):  # <-
            optimizer.zero_grad()
            logits = net(inputs)
            loss = torch.nn.functional.cross_entropy(logits, targets)
            loss.backward()
            optimizer.step()
            recorder.log(loss=loss, accuracy=(logits.argmax(1) == targets).float().mean())  # <-

steps = recorder.record.iterations
milliseconds = 1e3 * sorted(step.wall_seconds for step in steps)[len(steps) // 2]
print(
    f"{len(steps)} iterations, {milliseconds:.1f} ms each; loss {steps[0].metrics['loss']:.2f} -> "
    f"{steps[-1].metrics['loss']:.2f}"
)
print(
    f"{max(step.peak_tensor_bytes or 0 for step in steps) / 2**20:.1f} MiB made by an iteration are alive at its peak, "
    f"most of it here:"
)
for entry in recorder.alive[:5]:  # <-
    print(
        f"{entry.bytes / 2**10:8.0f} KiB  {entry.count:2} x {entry.operator:20} "
        f"{'backward of ' * entry.backward}{entry.line} {entry.module}"
    )
