"""Makes the expected numbers of the test `follows_pytorch` in compiler/src/train/optimizer.rs.

Run with any Python that has torch; prints the weights after 20 steps.
"""

import torch

w = torch.tensor([1.0, -2.0, 0.5, 3.0], requires_grad=True)
b = torch.tensor([0.25, 4.0], requires_grad=True)
target = torch.tensor([0.1, -1.5, 0.7, 2.0])
optimizer = torch.optim.AdamW(
    [{"params": [w], "weight_decay": 0.1}, {"params": [b], "weight_decay": 0.0}],
    lr=0.05,
    betas=(0.9, 0.95),
    eps=1e-8,
)
for step in range(20):
    for group in optimizer.param_groups:
        group["lr"] = 0.05 * (1 - step / 40)
    optimizer.zero_grad()
    loss = ((w - target) ** 4).sum() + ((b - 1) ** 2).sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([w, b], 1.0)
    optimizer.step()
print(torch.__version__, [f"{x:.7f}" for x in w.tolist()], [f"{x:.7f}" for x in b.tolist()])
