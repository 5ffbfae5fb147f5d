"""DPO on a list of pairs."""

from fastrl import Trainer

pairs = [
    {"prompt": f"What is {a} + {b}?", "chosen": str(a + b), "rejected": str(a * b + 1)}
    for a in range(10)
    for b in range(10)
    if a + b != a * b + 1
]
trainer = Trainer(
    "smollm2-135m-instruct",
    pairs,
    algorithm="dpo",
    steps=20,
    rows_per_step=8,
    data={"held_out": 20},
    loss={"beta": 0.1},
    optimizer={"lr": 1e-5},
)
print(trainer.train().after)
